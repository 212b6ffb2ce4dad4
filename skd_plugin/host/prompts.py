"""Prompts as OpenRLHF makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any


def render_prompts(rows: Iterable[Mapping[str, Any]], options: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """The prompts that OpenRLHF makes of a dataset's rows.

    Raises:
        KeyError: a row has no column of the name data.input_key.
    """
    from openrlhf.datasets.prompts_dataset import preprocess_data  # which imports transformers: seconds

    chat = tokenizer.apply_chat_template if options["data.apply_chat_template"] else None
    template, key = options["data.input_template"], options["data.input_key"]
    return [preprocess_data(row, template, key, apply_chat_template=chat)[0] for row in rows]


def load_rows(options: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The rows of data.prompt_dataset, whatever OpenRLHF can load: names on the Hub, folders, mixtures."""
    from openrlhf.datasets.utils import blending_datasets

    strategy = SimpleNamespace(
        print=lambda *_: None, is_rank_0=lambda: False, args=SimpleNamespace(use_ms=options["use_ms"])
    )
    return blending_datasets(
        options["data.prompt_dataset"],
        options["data.prompt_probs"],
        strategy,
        options["train.seed"],
        max_count=options["data.max_samples"],
        dataset_split=options["data.prompt_split"],
    )
