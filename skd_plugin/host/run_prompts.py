"""The prompts of a run, in the controller."""

from __future__ import annotations

from typing import Any

from openrlhf.datasets import PromptDataset

from skd_plugin.host.prompts import PromptError, PromptForm

UNNAMED = "default"  # what OpenRLHF calls the source of a prompt that names none


class RunPrompts(PromptDataset):
    """OpenRLHF's dataset of prompts, made by the same function as those that were checked before the start."""

    def __init__(self, dataset: Any, tokenizer: Any, strategy: Any, input_template: str | None = None) -> None:
        """Raises RuntimeError for a row that makes no prompt: of a large dataset not every row was looked at."""
        super().__init__([], tokenizer, strategy, input_template)
        data = strategy.args.data
        form = PromptForm.of(
            {f"data.{name}": value for name, value in vars(data).items()}, tokenizer, strategy.args.skd
        )
        for number, row in enumerate(dataset, start=1):
            try:
                self.prompts.append(form.prompt(row))
            except PromptError as error:
                raise RuntimeError(f"row {number} of the prompts: {error}; take it out of the dataset") from error
            self.labels.append("" if data.label_key is None else row[data.label_key])
            self.images.append(None)
            source = row.get("datasource")
            self.datasources.append(UNNAMED if source is None else str(source))
