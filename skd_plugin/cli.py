"""The `skd` command."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from skd_plugin.errors import RecipeError, unknown_key
from skd_plugin.terminal import say


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 the recipe or the command line is wrong, 130 stopped by Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "rollout": _rollout, "check": _check, "eval": _eval, "report": _report}
    if not argv or argv[0] not in commands:
        print(USAGE)
        return 0 if argv in ([], ["-h"], ["--help"]) else 2
    try:
        with _renamed_options_in_one_line():
            return commands[argv[0]](argv[1:])
    except RecipeError as error:
        say(f"skd {argv[0]}: {error}")
        return 2
    except KeyboardInterrupt:  # before or after the work that has its own words for it
        say(f"skd {argv[0]}: stopped by the user")
        return 130


@contextmanager
def _renamed_options_in_one_line() -> Iterator[None]:
    """Other warnings are shown as ever."""
    from skd_plugin.config.recipe import RenamedOption

    with warnings.catch_warnings():
        warnings.simplefilter("default", RenamedOption)
        as_ever = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **others: Any) -> None:
            if issubclass(category, RenamedOption):
                say(f"notice: {message}")
            else:
                as_ever(message, category, *where, **others)

        warnings.showwarning = show
        yield


USAGE = """\
usage: skd COMMAND RECIPE.yaml [key=value ...] [--flag value ...]

  skd train    RECIPE   distil the student of the recipe        (skd train --help lists every option)
  skd rollout  RECIPE   sample interleaved responses, no training
  skd check    RECIPE   find what is wrong before a run         (skd check --help)
  skd eval     RECIPE   measure students: scores, distance to the teacher, pay-off  (skd eval --help)
  skd report   RUN...   one HTML page of run folders: curves, comparison, traces token by token

A key is skd.<option> or openrlhf.<option>; a flag is --skd.<option> or any flag of OpenRLHF's train_ppo_ray."""


def _train(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        parser = _flag_parser()
        parser.prog = "skd train RECIPE.yaml [key=value ...]"
        parser.usage = "%(prog)s [--flag value ...]"
        print(parser.format_help())
        return 0
    from skd_plugin.config.host_options import host_defaults
    from skd_plugin.prepare.load_run import load_run
    from skd_plugin.prepare.servers import ask_servers
    from skd_plugin.run.supervisor import supervise

    run = load_run(*_recipe_and_overrides(argv))
    ask_servers(run.skd, {**host_defaults(), **run.host})
    return supervise(run)


def _rollout(argv: list[str]) -> int:
    from skd_plugin.rollout_command import run_rollout

    parser = _own_parser(
        "rollout",
        "RECIPE.yaml [key=value ...] --prompts FILE --out FILE [--samples N] [--raw] [--teacher NAME]",
        "Sample interleaved responses and write their traces; no training.",
    )
    parser.add_argument(
        "--prompts",
        required=True,
        help="a dataset like openrlhf.data.prompt_dataset, whose prompts are made as skd train makes them; or lines "
        'of {"prompt": "..."} or {"prompt_ids": [1, 2, 3]}, and "reference" if the method needs it',
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="texts go in as they are, without the recipe's chat or input_template",
    )
    parser.add_argument("--samples", type=int, default=1, help="responses a prompt")
    parser.add_argument("--teacher", help="of several teachers (skd.teachers), the one that all prompts have")
    parser.add_argument("--out", required=True, help="trace file to write, one JSON line a response")
    own, rest = parser.parse_known_args(argv)
    given = _recipe_and_overrides(rest)
    return run_rollout(*given, own.prompts, own.samples, own.out, raw=own.raw, teacher=own.teacher)


def _check(argv: list[str]) -> int:
    from skd_plugin.check.command import run_check

    parser = _own_parser(
        "check",
        "RECIPE.yaml [key=value ...] [--dry-run] [--no-self-test]",
        "Find what is wrong before a run. Exit status: 0 nothing failed, 1 a check failed, 2 the recipe is wrong.",
    )
    parser.add_argument("--dry-run", action="store_true", help="run one real step in a run folder that is thrown away")
    parser.add_argument(
        "--no-self-test", dest="self_test", action="store_false", help="do not start an engine with the teacher in it"
    )
    own, rest = parser.parse_known_args(argv)
    return run_check(*_recipe_and_overrides(rest), self_test=own.self_test, dry_run=own.dry_run)


def _eval(argv: list[str]) -> int:
    from skd_plugin.evaluate.plan import make_plan

    own, rest = _eval_parser().parse_known_args(argv)
    # A key=value after a list of names is no name.
    overrides = [item for names in (own.student, own.measure) for item in names if _is_override(item)]
    students, measures = ([item for item in names if not _is_override(item)] for names in (own.student, own.measure))
    where, given = _recipe_and_overrides([*rest, *overrides])
    plan = make_plan(where, given, students, measures, own.samples, own.k, own.temperature)

    from skd_plugin.evaluate.command import run_eval

    return run_eval(plan, where, own.out)


def _eval_parser() -> argparse.ArgumentParser:
    from skd_plugin.evaluate.plan import DEFAULT_SAMPLES, MEASURES

    parser = _own_parser(
        "eval",
        "RECIPE.yaml|RUN [key=value ...] [--student MODEL_OR_RUN ...] [--measure NAME ...] "
        "[--samples N] [--k K ...] [--temperature T] [--out eval.json]",
        "Measure students on the held-out prompts of a recipe; of a run folder, the student before and after. "
        "docs/eval.md says what each number is.",
    )
    parser.add_argument(
        "--student", nargs="+", default=[], help="models or run folders to compare (default: the recipe's student)"
    )
    parser.add_argument(
        "--measure", nargs="+", default=["all"], help=f"all, or some of {', '.join(MEASURES)} (default: all)"
    )
    parser.add_argument(
        "--samples", type=int, default=DEFAULT_SAMPLES, help="sampled responses a prompt (default: %(default)s)"
    )
    parser.add_argument("--k", type=int, nargs="+", help="of pass@k (default: those of 1 4 16 within --samples)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of what is sampled (default: %(default)s)")
    parser.add_argument("--out", default="eval.json", help="file to write (default: %(default)s)")
    return parser


def _report(argv: list[str]) -> int:
    from skd_plugin.report.command import run_report

    parser = _own_parser(
        "report",
        "RUN [RUN ...] [--out report.html] [--png DIR] [--traces N]",
        "One self-contained HTML page of one or several run folders; see docs/report.md.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a folder that skd train wrote; the run may still go on"
    )
    parser.add_argument("--out", default="report.html", help="page to write (default: %(default)s)")
    parser.add_argument("--png", metavar="DIR", help="also write the curves as PNG files into this folder")
    parser.add_argument(
        "--traces", type=int, default=5000, help="responses of each run, evenly spread (default: %(default)s)"
    )
    own = parser.parse_args(argv)
    return run_report(own.runs, own.out, own.png, own.traces)


def _own_parser(command: str, usage: str, description: str) -> argparse.ArgumentParser:
    """Of the flags that a command has beside those of a recipe, of which none may be taken for one of them."""
    name = f"skd {command}"
    return argparse.ArgumentParser(prog=name, usage=f"{name} {usage}", description=description, allow_abbrev=False)


def _recipe_and_overrides(argv: list[str]) -> tuple[str, list[str]]:
    """`RECIPE key=value --flag value` -> the recipe and every override as key=value.

    Raises:
        RecipeError: no recipe, or a flag that neither OpenRLHF nor this plugin has.
    """
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        raise RecipeError("name the recipe first, e.g. skd train recipes/quickstart.yaml")
    positional = [item for item in argv[1:] if _is_override(item)]
    flags = [item for item in argv[1:] if item not in positional]
    parser = _flag_parser()
    values, unknown = parser.parse_known_args(flags)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise RecipeError(unknown_key(unknown[0].split("=")[0], known))
    # OpenRLHF's parser has made typed values, which JSON (a part of YAML) carries unchanged; ours are still text.
    given = {key: v if key.startswith("skd.") else json.dumps(v) for key, v in vars(values).items()}
    return argv[0], positional + [f"{key}={value}" for key, value in given.items()]


def _is_override(item: str) -> bool:
    return item.startswith(("skd.", "openrlhf.")) and "=" in item


def _flag_parser() -> argparse.ArgumentParser:
    """OpenRLHF's own parser and our --skd.* flags; only what is given on the command line comes out of it."""
    from skd_plugin.config.host_options import host_parser
    from skd_plugin.config.recipe import RENAMED
    from skd_plugin.config.schema import field_docs

    parser = host_parser()
    parser.allow_abbrev = False
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.dest != "help":
            action.metavar = action.metavar or action.dest.split(".")[-1].upper()
            action.dest = f"openrlhf.{action.dest}"
    group = parser.add_argument_group("speculative knowledge distillation")
    for name, (default, text) in field_docs().items():
        shown = "" if default is None else f" (default {default})"
        group.add_argument(
            f"--{name}", default=argparse.SUPPRESS, metavar="VALUE", help=(text + shown).replace("%", "%%")
        )
    for old in RENAMED:
        group.add_argument(f"--{old}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
