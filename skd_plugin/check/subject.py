"""What is checked: a recipe, read as far as it can be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from skd_plugin.config import host_rules
from skd_plugin.config.host_options import HostOptions, host_defaults, host_parser
from skd_plugin.config.recipe import load_recipe
from skd_plugin.config.run import Run
from skd_plugin.config.schema import SKDConfig, parse_skd
from skd_plugin.errors import RecipeError
from skd_plugin.host.prompts import load_rows, render_prompts
from skd_plugin.prepare.load_run import load_run, on_cpu
from skd_plugin.prepare.rows import read_rows
from skd_plugin.words import first_line


@dataclass(frozen=True)
class Subject:
    """`run` and `error`: one of them is None. What could not be read is None too."""

    skd: SKDConfig | None
    options: dict[str, Any] | None  # all of OpenRLHF's, dotted, resolved
    run: Run | None
    error: str | None
    cpu: bool

    @property
    def teacher(self) -> str | None:
        return self.skd.teacher.model_name_or_path if self.skd else None

    @property
    def student(self) -> str | None:
        return self.options.get("actor.model_name_or_path") if self.options else None


def read_subject(recipe: str, overrides: Sequence[str]) -> Subject:
    """Raises RecipeError: the file is no recipe; there is nothing to check."""
    content = load_recipe(recipe, overrides)
    run = skd = options = error = None
    try:
        skd = parse_skd(content.get("skd") or {})
        options = given_options(content, skd)
        run = load_run(recipe, overrides)
    except RecipeError as wrong:
        error = str(wrong)
    if run is not None:
        options = vars(host_parser().parse_args(run.host_argv()))
    return Subject(skd, options, run, error, run.cpu if run else on_cpu(skd.device if skd else "auto"))


def given_options(content: dict[str, Any], skd: SKDConfig) -> dict[str, Any]:
    """OpenRLHF's options as a recipe and the defaults give them: the best that is known before they are checked."""
    return {**host_defaults(), **host_rules.complete(content.get("openrlhf") or {}, cpu=on_cpu(skd.device))}


class PromptError(Exception):
    """The prompts cannot be had; the message says why."""


def read_prompts(run: Run, options: HostOptions, tokenizer: Any) -> list[str]:
    """Every prompt of the run, as the host makes them.

    Raises:
        PromptError: the dataset does not load, or its rows do not make prompts.
    """
    try:
        return render_prompts(islice(_rows(run, options), options["data.max_samples"]), options, tokenizer)
    except KeyError as error:
        raise PromptError(f"a row has no column {error} (openrlhf.data.input_key)") from error
    except (OSError, ValueError, ImportError) as error:  # what `datasets` and a chat template raise
        raise PromptError(first_line(error)) from error


def _rows(run: Run, options: HostOptions) -> Iterable[Mapping[str, Any]]:
    if run.data:
        return run.data["train"]
    path = Path(options["data.prompt_dataset"])
    if path.suffix in (".json", ".jsonl") and path.is_file():
        return [row.values for row in read_rows(path, option="openrlhf.data.prompt_dataset")]
    return load_rows(options)


def on_a_cluster() -> bool:
    return "RAY_ADDRESS" in os.environ
