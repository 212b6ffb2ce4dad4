"""Each of OpenRLHF's options is honoured, refused or without effect, and the table of docs/options.md says which."""

from __future__ import annotations

from skd_plugin.config.host_options import host_defaults
from skd_plugin.config.host_rules import FIXED, REWARD_FREE
from skd_plugin.config.host_support import HONOURED, OTHERWISE, WITHOUT_EFFECT, support_of


def test_every_option_stands_in_one_table_and_no_table_has_another() -> None:
    options = host_defaults()
    kinds = {name: support_of(name).kind for name in options}  # raises for one in none, or in several
    assert set(kinds.values()) == {"honoured", "refused", "without effect"}
    assert HONOURED | OTHERWISE.keys() | WITHOUT_EFFECT.keys() | FIXED.keys() | REWARD_FREE.keys() <= options.keys()
