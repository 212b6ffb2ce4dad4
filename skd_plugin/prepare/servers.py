"""A teacher that is elsewhere, asked before anything heavy starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skd_plugin.config.context import engine_len
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.schema import SKDConfig
from skd_plugin.errors import RecipeError
from skd_plugin.models import common_vocab_size, joined_ends_words, load_tokenizer
from skd_plugin.served.probe import probe
from skd_plugin.served.teacher import Server


def ask_servers(skd: SKDConfig, options: HostOptions) -> list[str]:
    """What the teacher's servers say of themselves, if it has any.

    Args:
        options: all of OpenRLHF's, with the limit on a response.

    Raises:
        RecipeError: one of them is not what the recipe asks for.
    """
    if not skd.is_served:
        return []
    teacher, student = skd.the_teacher.model_name_or_path, options["actor.model_name_or_path"]
    server = Server.of(skd.the_teacher, skd.loss.teacher_top_k)
    longest = engine_len(options, skd.longest_teacher_prompt)
    return probe(server, load_tokenizer(teacher, "teacher"), common_vocab_size(teacher, student), longest)


def refuse_joined_ends(tokenizer: Any, end_ids: Sequence[int]) -> None:
    """Raises RecipeError where tokens are to be one end event: a server says what each of a few tokens has, and of an
    end that is not among them nothing.
    """
    words = joined_ends_words(tokenizer, end_ids)
    if words is not None:
        raise RecipeError(
            f"{words}; but the teacher is elsewhere (skd.teacher.url), and what it gives to all of them together is "
            "not known. Take a pair that ends alike, or set skd.end_tokens=apart, and each is itself"
        )
