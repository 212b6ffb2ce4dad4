"""The checks in their order. Each goes on with what the ones before it have read; one that fails stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from skd_plugin.check.dry_run import run_dry
from skd_plugin.check.engine_parts import asked_for
from skd_plugin.check.environment import check_device, check_versions, device_memory
from skd_plugin.check.findings import Finding
from skd_plugin.check.memory_budget import check_memory, fits_twice, teacher_rounding
from skd_plugin.check.model_pair import Model, check_models, load_pair
from skd_plugin.check.rollout_words import check_rule
from skd_plugin.check.self_test import NUM_PROMPTS, make_pair, make_trial, run_pair_test, run_self_test
from skd_plugin.check.steps import check_steps
from skd_plugin.check.subject import Subject, read_subject
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.run import Run
from skd_plugin.words import short_name

Progress = Callable[[str], None]  # is told what is going on


def run_checks(
    recipe: str, overrides: Sequence[str], folder: Path, progress: Progress, *, self_test: bool, dry_run: bool
) -> Iterator[Finding]:
    """
    Args:
        folder: for temporary files; its owner removes it.

    Raises:
        RecipeError: the file is no recipe; there is nothing to check.
    """
    versions = check_versions()
    yield from versions
    subject = read_subject(recipe, overrides)
    yield check_device(subject.cpu, subject.options)
    yield _recipe(subject, versions)
    progress("reading the models and the prompts")
    teacher, student, missing = load_pair(subject.teacher, subject.student)
    yield from (finding for finding in missing if finding.remedy != subject.error)  # the recipe's line says it
    prompts = subject.run.prompts if subject.run is not None else ()
    if subject.run is not None and student is not None:
        yield check_steps(subject.options, subject.run.num_prompts, prompts, student.tokenizer)
    if teacher is not None and student is not None:
        yield from check_models(
            teacher, student, subject.options, prompts, refused=subject.run is None, joined=subject.end_ids
        )
    if subject.models is not None:
        yield check_rule(subject.models.skd)
        if teacher is not None and student is not None:
            memory = device_memory(subject.cpu)
            pair = teacher.config, student.config
            yield from check_memory(*pair, subject.models.skd, subject.options, cpu=subject.cpu, device=memory)
    if subject.run is None or teacher is None or student is None or not prompts:
        wanted = {"self-test": self_test, "dry run": dry_run}
        yield from (Finding(name, "there is no run to test", "not run") for name, on in wanted.items() if on)
        return
    if self_test:
        ids = student.tokenizer([str(prompt) for prompt in prompts[:NUM_PROMPTS]], add_special_tokens=False).input_ids
        yield from _self_test(subject.run, subject.options, teacher, ids, folder, progress)
    else:
        yield asked_for(subject.run.skd)
    if dry_run:
        progress("dry run: one step of the real run, with everything that it starts (minutes)")
        yield from run_dry(recipe, overrides, subject.run)


def _self_test(
    run: Run, options: HostOptions, teacher: Model, prompts: list[list[int]], folder: Path, progress: Progress
) -> Iterator[Finding]:
    if not run.cpu and not torch.cuda.is_available():
        remedy = "run skd check on a node that will run an engine"
        yield Finding("self-test", "no GPU on this machine", "not run", remedy)
        return
    model, student = run.skd.teacher.model_name_or_path, options["actor.model_name_or_path"]
    rounding = teacher_rounding(teacher.config, run.skd)
    if rounding is not None:
        model = student
        yield Finding("self-test", f"the teacher is rounded ({rounding}); the student is tested in both places")
    elif not run.cpu and not fits_twice(teacher.config, run.skd, options, device_memory(run.cpu)):
        model = student
        yield Finding("self-test", "two teachers do not fit in one engine; the student is tested in both places")
    trial = make_trial(model, run.skd, options, prompts, cpu=run.cpu)
    findings = run_self_test(trial, folder, progress)
    yield from findings
    if findings[0].level == "ok" and (student != run.skd.teacher.model_name_or_path or rounding is not None):
        yield run_pair_test(make_pair(trial, run.skd, student), rounding, folder, progress)


def _recipe(subject: Subject, versions: Sequence[Finding]) -> Finding:
    if any(finding.level == "failed" for finding in versions):  # which is the one error that load_run then gives
        return Finding("recipe", "not read: the versions come first", "not run")
    if subject.error is not None:
        return Finding("recipe", "skd train would refuse it", "failed", subject.error)
    student, teacher = short_name(subject.student or "-"), short_name(subject.teacher or "-")
    return Finding("recipe", f"loads; student {student}, teacher {teacher}")
