"""What is checked: a recipe, read as far as it can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from skd_plugin.check.finding import first_line
from skd_plugin.config import host_rules
from skd_plugin.config.host_options import host_parser
from skd_plugin.config.recipe import load_recipe
from skd_plugin.config.schema import SKDConfig
from skd_plugin.errors import RecipeError
from skd_plugin.prepare.load_run import Run, load_run, parse_skd


@dataclass(frozen=True)
class Subject:
    """`run` and `error`: one of them is None. What could not be read is None too."""

    skd: SKDConfig | None
    options: dict[str, Any] | None  # all of OpenRLHF's, dotted, resolved
    run: Run | None  # in a temporary folder
    run_dir: Path | None  # the real one
    error: str | None
    cpu: bool

    @property
    def teacher(self) -> str | None:
        return self.skd.teacher.model_name_or_path if self.skd else None

    @property
    def student(self) -> str | None:
        return self.options.get("actor.model_name_or_path") if self.options else None


def read_subject(recipe: str, overrides: Sequence[str], folder: Path) -> Subject:
    """`folder` takes the place of the run folder, where `load_run` writes the prompts of a task.

    Raises:
        RecipeError: the file is no recipe; there is nothing to check.
    """
    content = load_recipe(recipe, overrides)
    run = skd = options = run_dir = error = None
    try:
        skd = parse_skd(content.get("skd") or {})
        run_dir = Path(skd.run_dir).resolve()
        options = given_options(content, skd)
        run = load_run(recipe, [*overrides, f"skd.run_dir={folder}"])
    except RecipeError as wrong:
        error = str(wrong)
    if run is not None:
        options = vars(host_parser().parse_args(run.host_argv()))
    return Subject(skd, options, run, run_dir, error, run.cpu if run else on_cpu(skd))


def on_cpu(skd: SKDConfig | None) -> bool:
    import torch

    return not torch.cuda.is_available() if skd is None or skd.device == "auto" else skd.device == "cpu"


def given_options(content: dict[str, Any], skd: SKDConfig) -> dict[str, Any]:
    """The host's options as a recipe and the defaults give them: the best that is known before they are checked."""
    defaults = {action.dest: action.default for action in host_parser()._actions if action.option_strings}
    return {**defaults, **host_rules.complete(content.get("openrlhf") or {}, cpu=on_cpu(skd))}


class PromptError(Exception):
    """The prompts cannot be had; the message says why."""


def read_prompts(options: dict[str, Any], tokenizer: Any) -> list[str]:
    """Every prompt of the run, as the host makes them.

    Raises:
        PromptError: the dataset does not load, or its rows do not make prompts.
    """
    from openrlhf.datasets.prompts_dataset import preprocess_data

    template = tokenizer.apply_chat_template if options["data.apply_chat_template"] else None
    key, limit = options["data.input_key"], options["data.max_samples"]
    try:
        rows = _rows(options)
        return [
            preprocess_data(row, options["data.input_template"], key, apply_chat_template=template)[0]
            for _, row in zip(range(limit), rows, strict=False)
        ]
    except KeyError as error:
        raise PromptError(f"a row has no column {error} (openrlhf.data.input_key)") from error
    except (OSError, ValueError, ImportError) as error:  # what `datasets` and a chat template raise
        raise PromptError(first_line(error)) from error


def _rows(options: dict[str, Any]) -> Any:
    path = Path(options["data.prompt_dataset"])
    if path.suffix in (".json", ".jsonl") and path.is_file():
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
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


def on_a_cluster() -> bool:
    return "RAY_ADDRESS" in os.environ
