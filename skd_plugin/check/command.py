"""`skd check`: every check, one after the other, and a table of what they found."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from skd_plugin.check import budget, environment, models, recipe, sampler
from skd_plugin.check.finding import Finding, exit_status
from skd_plugin.check.subject import PromptError, Subject, read_prompts, read_subject
from skd_plugin.check.table import findings_table, verdict


def run_check(recipe_path: str, overrides: Sequence[str], *, self_test: bool, dry_run: bool) -> int:
    """Returns 0 (nothing failed), 1 (a check failed), 2 (the recipe is wrong) or 130 (Ctrl-C).

    Raises:
        RecipeError: the file is no recipe; there is nothing to check.
    """
    _be_quiet()
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="skd-check-"))
    findings: list[Finding] = []
    check = _Check(recipe_path, overrides, folder)
    try:
        with console.status("reading the recipe") as spinner:
            for finding in check.findings(self_test, dry_run, spinner.update):
                findings.append(finding)
    except KeyboardInterrupt:
        console.print("Stopped; this is what had been found:")
        _show(findings, recipe_path, console)
        return 130
    finally:
        if not any(finding.name.startswith("self-test") and finding.level == "failed" for finding in findings):
            shutil.rmtree(folder)  # else its log is named in the table
    _show(findings, recipe_path, console)
    return exit_status(findings, recipe_is_wrong=check.recipe_is_wrong)


def _show(findings: list[Finding], title: str, console: Console) -> None:
    if findings:
        console.print(findings_table(findings, f"skd check {title}"))
        console.print(verdict(findings))


def _be_quiet() -> None:
    """The libraries' own warnings would break into the table; what matters of them is a finding."""
    import transformers
    from datasets.utils import logging as datasets_logging

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()


class _Check:
    """The checks in order; each goes on with what the ones before it have read."""

    def __init__(self, recipe_path: str, overrides: Sequence[str], folder: Path) -> None:
        self._path, self._overrides, self._folder = recipe_path, overrides, folder
        self.recipe_is_wrong = False

    def findings(self, self_test: bool, dry_run: bool, progress: Any) -> Iterator[Finding]:
        versions = environment.check_versions()
        yield from versions
        subject = read_subject(self._path, self._overrides, self._folder / "run")
        yield environment.check_device(subject.cpu, subject.options)
        if any(finding.level == "failed" for finding in versions):  # which is the one error that load_run then gives
            yield Finding("recipe", "not read: the versions come first", "not run")
        else:
            self.recipe_is_wrong = subject.error is not None
            yield recipe.check_recipe(subject)
        progress("reading the models")
        teacher, student, missing = models.load_pair(subject.teacher, subject.student)
        if subject.error is None:
            yield from missing
        prompts: list[str] = []
        if subject.run is not None and student is not None:
            try:
                prompts = read_prompts(subject.options, student.tokenizer)
                yield recipe.check_steps(subject.options, prompts, student.tokenizer)
            except PromptError as error:
                yield Finding("prompts", str(error), "failed", "see openrlhf.data in the recipe")
        yield from _pair(subject, teacher, student, prompts)
        if subject.skd is not None:
            yield sampler.check_rule(subject.skd)
        if teacher is not None and student is not None and subject.options is not None:
            device = environment.device_memory(subject.cpu)
            yield from budget.check_memory(
                teacher.config, student.config, subject.skd, subject.options, cpu=subject.cpu, device=device
            )
        yield from self._runs(subject, student, prompts, self_test, dry_run, progress)

    def _runs(
        self, subject: Subject, student: Any, prompts: list[str], self_test: bool, dry_run: bool, progress: Any
    ) -> Iterator[Finding]:
        """The two checks that start something."""
        wanted = [name for name, on in (("self-test", self_test), ("dry run", dry_run)) if on]
        if subject.run is None or not prompts:
            yield from (Finding(name, "there is no run to test", "not run") for name in wanted)
            return
        if self_test:
            yield from self._self_test(subject, student, prompts, progress)
        if dry_run:
            from skd_plugin.check.dry_run import run_dry
            from skd_plugin.config import load_recipe
            from skd_plugin.config.run import parse_skd

            progress("dry run: one step of the real run (minutes)")
            run_dir = Path(parse_skd(load_recipe(self._path, self._overrides)["skd"]).run_dir).resolve()
            yield from run_dry(self._path, self._overrides, subject.run, run_dir)

    def _self_test(self, subject: Subject, student: Any, prompts: list[str], progress: Any) -> Iterator[Finding]:
        from skd_plugin.check.self_test import make_trial, run_self_test

        if not subject.cpu and not torch.cuda.is_available():
            yield Finding(
                "self-test", "no GPU on this machine", "not run", "run skd check on a node that will run the engine"
            )
            return
        ids = student.tokenizer(prompts[:8], add_special_tokens=False).input_ids
        yield from run_self_test(
            make_trial(subject.skd, subject.options, ids, cpu=subject.cpu), self._folder, progress
        )


def _pair(subject: Subject, teacher: Any, student: Any, prompts: list[str]) -> Iterator[Finding]:
    if teacher is None or student is None:
        return
    yield models.check_vocabulary(teacher, student, refused=subject.run is None)
    if subject.options is not None:
        yield models.check_template(teacher, student, subject.options, prompts)
    if prompts:
        yield models.check_first_prompt(prompts[0], student.tokenizer)
    yield from models.check_end_tokens(teacher, student)
    yield models.check_padding(student)
