"""The checks in their order. Each goes on with what the ones before it have read; one that fails stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from skd_plugin.check import dry_run, environment, memory_budget, model_pair, sampler, self_test, steps
from skd_plugin.check.findings import Finding
from skd_plugin.check.subject import PromptError, Subject, read_prompts, read_subject
from skd_plugin.words import short_name


class Checks:
    """
    Args:
        folder: for temporary files; its owner removes it.
        progress: is told what is going on.
    """

    def __init__(self, path: str, overrides: Sequence[str], folder: Path, progress: Callable[[str], None]) -> None:
        self._path, self._overrides, self._folder, self._progress = path, overrides, folder, progress
        self.recipe_is_wrong = False

    def all(self, *, self_test: bool, dry_run: bool) -> Iterator[Finding]:
        yield from self._recipe()
        yield from self._models()
        yield from self._sizes()
        if self._subject.run is None or not self._prompts:
            wanted = {"self-test": self_test, "dry run": dry_run}
            yield from (Finding(name, "there is no run to test", "not run") for name, on in wanted.items() if on)
            return
        yield from self._self_test() if self_test else [sampler.asked_for(self._subject.skd)]
        if dry_run:
            yield from self._dry_run()

    def _recipe(self) -> Iterator[Finding]:
        versions = environment.check_versions()
        yield from versions
        self._subject = read_subject(self._path, self._overrides)
        yield environment.check_device(self._subject.cpu, self._subject.options)
        if any(finding.level == "failed" for finding in versions):  # which is the one error that load_run then gives
            yield Finding("recipe", "not read: the versions come first", "not run")
        else:
            self.recipe_is_wrong = self._subject.error is not None
            yield _recipe_finding(self._subject)

    def _models(self) -> Iterator[Finding]:
        subject = self._subject
        self._progress("reading the models and the prompts")
        self._teacher, self._student, missing = model_pair.load_pair(subject.teacher, subject.student)
        self._prompts: list[str] = []
        yield from (finding for finding in missing if finding.remedy != subject.error)  # the recipe's line says it
        if subject.run is not None and self._student is not None:
            try:
                self._prompts = read_prompts(subject.run, subject.options, self._student.tokenizer)
                yield steps.check_steps(subject.options, self._prompts, self._student.tokenizer)
            except PromptError as error:
                yield Finding("prompts", str(error), "failed", "see openrlhf.data in the recipe")
        if self._teacher is None or self._student is None:
            return
        yield model_pair.check_vocabulary(self._teacher, self._student, refused=subject.run is None)
        yield model_pair.check_template(self._teacher, self._student, subject.options, self._prompts)
        if self._prompts:
            yield model_pair.check_first_prompt(self._prompts[0], self._student.tokenizer)
        yield from model_pair.check_end_tokens(self._teacher, self._student)
        yield model_pair.check_padding(self._student)

    def _sizes(self) -> Iterator[Finding]:
        subject = self._subject
        if subject.skd is not None:
            yield sampler.check_rule(subject.skd)
        if self._teacher is None or self._student is None:
            return
        self._device = environment.device_memory(subject.cpu)
        pair = self._teacher.config, self._student.config
        yield from memory_budget.check_memory(
            *pair, subject.skd, subject.options, cpu=subject.cpu, device=self._device
        )

    def _self_test(self) -> Iterator[Finding]:
        subject = self._subject
        if not subject.cpu and not torch.cuda.is_available():
            remedy = "run skd check on a node that will run an engine"
            yield Finding("self-test", "no GPU on this machine", "not run", remedy)
            return
        model = subject.teacher
        if not subject.cpu and not memory_budget.fits_twice(
            self._teacher.config, subject.skd, subject.options, self._device
        ):
            model = subject.student
            yield Finding("self-test", "two teachers do not fit in one engine; the student is tested in both places")
        prompts = self._student.tokenizer(self._prompts[: self_test.NUM_PROMPTS], add_special_tokens=False).input_ids
        trial = self_test.make_trial(model, subject.skd, subject.options, prompts, cpu=subject.cpu)
        yield from self_test.run_self_test(trial, self._folder, self._progress)

    def _dry_run(self) -> Iterator[Finding]:
        self._progress("dry run: one step of the real run, with everything that it starts (minutes)")
        yield from dry_run.run_dry(self._path, self._overrides, self._subject.run)


def _recipe_finding(subject: Subject) -> Finding:
    if subject.error is not None:
        return Finding("recipe", "skd train would refuse it", "failed", subject.error)
    student, teacher = short_name(subject.student or "-"), short_name(subject.teacher or "-")
    return Finding("recipe", f"loads; student {student}, teacher {teacher}")
