"""The checks in their order. Each goes on with what the ones before it have read; one that fails stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from skd_plugin.check.dry_run import run_dry
from skd_plugin.check.engine_parts import asked_for
from skd_plugin.check.environment import check_device, check_versions, device_memory
from skd_plugin.check.findings import Finding
from skd_plugin.check.memory_budget import check_memory, fits_twice, teacher_rounding
from skd_plugin.check.model_pair import Model, check_models, try_to_load
from skd_plugin.check.rollout_words import check_rule
from skd_plugin.check.self_test import NUM_PROMPTS, make_pair, make_trial, run_pair_test, run_self_test
from skd_plugin.check.servers import check_servers
from skd_plugin.check.steps import check_steps
from skd_plugin.check.subject import Subject, read_subject
from skd_plugin.config.host_options import HostOptions
from skd_plugin.config.run import Run
from skd_plugin.config.teacher import teacher_words
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
    student, missing = try_to_load(subject.student, "student")
    yield from _new(missing, subject)
    if subject.run is not None and student is not None:
        yield check_steps(subject.options, subject.run.num_prompts, subject.run.prompts, student.tokenizer)
    if subject.models is not None:
        yield check_rule(subject.models.skd)
    loaded = {name: try_to_load(model, "teacher") for name, model in subject.teachers.items()}
    for name, (teacher, missing) in loaded.items():
        own = subject.of_teacher(name)
        others = [other for key, (other, _) in loaded.items() if key != name and other is not None]
        pair = _of_pair(own, teacher, student, others, folder, progress, self_test=self_test)
        yield from (finding.of_teacher(name) for finding in chain(_new(missing, own), pair))
    if subject.run is None:
        if dry_run:
            yield Finding("dry run", "there is no run to test", "not run")
    elif dry_run:
        progress("dry run: one step of the real run, with everything that it starts (minutes)")
        yield from run_dry(recipe, overrides, subject.run)


def _new(missing: list[Finding], subject: Subject) -> Iterator[Finding]:
    """Those that the recipe's line does not say."""
    return (finding for finding in missing if finding.remedy != subject.error)


def _of_pair(
    subject: Subject,
    teacher: Model | None,
    student: Model | None,
    others: Sequence[Model],
    folder: Path,
    progress: Progress,
    *,
    self_test: bool,
) -> Iterator[Finding]:
    """What is found of the student beside the one teacher of `subject`; `others` are the run's other teachers."""
    prompts = subject.run.prompts if subject.run is not None else ()
    if teacher is not None and student is not None:
        yield from check_models(
            teacher, student, subject.options, prompts, refused=subject.run is None, joined=subject.end_ids
        )
    if subject.models is not None and teacher is not None and student is not None:
        memory, pair = device_memory(subject.cpu), (teacher.config, student.config)
        more = [other.config for other in others]
        options, skd = subject.options, subject.models.skd
        yield from check_memory(*pair, skd, options, cpu=subject.cpu, device=memory, others=more)
    if subject.run is None or teacher is None or student is None or not prompts:
        if self_test:
            yield Finding("self-test", "there is no run to test", "not run")
    elif subject.run.skd.is_served:
        progress("asking the teacher's servers")
        yield from check_servers(subject.run.skd, subject.options, self_test=self_test)
    elif self_test:
        ids = student.tokenizer([str(prompt) for prompt in prompts[:NUM_PROMPTS]], add_special_tokens=False).input_ids
        yield from _self_test(subject.run, subject.options, teacher, ids, folder, progress)
    else:
        yield asked_for(subject.run.skd)


def _self_test(
    run: Run, options: HostOptions, teacher: Model, prompts: list[list[int]], folder: Path, progress: Progress
) -> Iterator[Finding]:
    if not run.cpu and not torch.cuda.is_available():
        remedy = "run skd check on a node that will run an engine"
        yield Finding("self-test", "no GPU on this machine", "not run", remedy)
        return
    model, student = run.skd.the_teacher.model_name_or_path, options["actor.model_name_or_path"]
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
    if findings[0].level == "ok" and (student != run.skd.the_teacher.model_name_or_path or rounding is not None):
        yield run_pair_test(make_pair(trial, run.skd, student), rounding, folder, progress)


def _recipe(subject: Subject, versions: Sequence[Finding]) -> Finding:
    if any(finding.level == "failed" for finding in versions):  # which is the one error that load_run then gives
        return Finding("recipe", "not read: the versions come first", "not run")
    if subject.error is not None:
        return Finding("recipe", "skd train would refuse it", "failed", subject.error)
    student = short_name(subject.student or "-")
    teachers = [f"{teacher_words(name)} {short_name(model or '-')}" for name, model in subject.teachers.items()]
    return Finding("recipe", f"loads; student {student}, {', '.join(teachers)}")
