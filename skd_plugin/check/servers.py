"""Whether the servers of a teacher that is elsewhere are what the recipe asks for."""

from __future__ import annotations

from collections.abc import Iterator

from skd_plugin.check.findings import Finding
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.schema import SKDConfig
from skd_plugin.errors import RecipeError
from skd_plugin.prepare.servers import ask_servers


def check_servers(skd: SKDConfig, options: HostOptions, *, self_test: bool) -> Iterator[Finding]:
    """Args: self_test: whether one is asked for. There is none, as it takes the teacher's weights."""
    try:
        found = ask_servers(skd, options)
    except RecipeError as error:
        yield Finding("teacher's servers", "not what the recipe asks for", "failed", str(error))
    else:
        said = f"log-probabilities of the {skd.loss.teacher_top_k} most probable tokens, and our tokens"
        yield Finding("teacher's servers", f"{'; '.join(found)}: {said}")
    if self_test:
        yield Finding("self-test", "the teacher is elsewhere; --dry-run tries one step of the run", "not run")
