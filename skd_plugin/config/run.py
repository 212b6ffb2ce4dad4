"""A run: every option of it, and the prompts that its tasks have made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from skd_plugin.config.host_options import HostOptions, host_arguments, host_parser
from skd_plugin.config.recipe import flatten, use_new_names
from skd_plugin.config.schema import SKDConfig
from skd_plugin.run_folder import RunFolder


class PromptRow(TypedDict):
    """A prompt of a task, as a row of the dataset that OpenRLHF reads."""

    input: str
    label: str  # of tasks.label.Label.to_json
    datasource: str  # the task's name
    teacher_prompt: NotRequired[str]  # as the teacher reads it, where it has prompts of its own
    teacher: NotRequired[str]  # its name, where there are several


DATA_DIGEST = "data_sha256"  # key of config.yaml, beside the options


@dataclass(frozen=True)
class Run:
    skd: SKDConfig
    host: HostOptions  # those that differ from OpenRLHF's own defaults, or may
    cpu: bool
    data: Mapping[str, Sequence[PromptRow]] = field(default_factory=dict, compare=False, repr=False)
    """By split, "train" and "test"; empty where the prompts are a dataset of the user's. Not in config.yaml."""
    num_prompts: int = field(default=0, compare=False, repr=False)
    """Of training; known before the start only."""
    prompts: Sequence[str] = field(default=(), compare=False, repr=False)
    """Some of training, as the models will read them; likewise."""
    data_digest: str = field(default="", compare=False, repr=False)
    """SHA-256 of what training and evaluations read of their prompts."""

    notices: Sequence[str] = field(default=(), compare=False, repr=False)
    """What people are told before the start."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.skd.run_dir))

    def host_argv(self) -> list[str]:
        return host_arguments(self.host, host_parser())

    def flat_options(self) -> dict[str, Any]:
        """Every option of the run by its full dotted name."""
        ours = flatten(self.skd.model_dump(), "skd.")
        ours["skd.teachers"] = list(self.skd.teachers)  # traces say which by its place
        return {**ours, **{f"openrlhf.{key}": value for key, value in self.host.items()}}

    def save(self) -> None:
        """Writes config.yaml and the prompts into the run folder; `Run.load` reads the options back in the process
        that starts OpenRLHF, which reads the prompts itself."""
        options = {"openrlhf": dict(self.host), "skd": self.skd.model_dump(), "cpu": self.cpu}
        self.folder.write_config({**options, DATA_DIGEST: self.data_digest})
        for split, rows in self.data.items():
            self.folder.prompts(split).replace(rows)

    @classmethod
    def load(cls, folder: RunFolder) -> Run:
        """Without the prompts."""
        content = folder.read_config()
        use_new_names(content)  # of a run before an option was renamed
        return cls(SKDConfig(**content["skd"]), content["openrlhf"], content["cpu"])
