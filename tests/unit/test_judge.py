"""What a model wrote reaches nothing, takes no longer than it may, and the next response is checked all the same."""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from skd_plugin.tasks import find_task, judge
from skd_plugin.tasks.judge import JudgeError, NoAnswer
from skd_plugin.tasks.reasoning_gym import CHECK, EVALUATING
from tests.waiting import wait_for

RUN = "tests.unit.test_judge:run"


def run(code: str) -> Any:
    """The checker of these tests: what an answer does that is evaluated."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names.get("answer")


def ask(code: str, limit_s: float = 60.0) -> Any:
    return judge.ask(RUN, code, limit_s=limit_s)


@pytest.mark.parametrize(
    "code",
    [
        "open({file!r}, 'w')",
        "open({file!r})",
        "__import__('pathlib').Path({file!r}).touch()",
        "__import__('os').open({file!r}, 1 | 64)",
        "__import__('os').mkdir({file!r})",
        "__import__('os').system('touch ' + {file!r})",
        "__import__('subprocess').run(['touch', {file!r}])",
        "__import__('os').fork()",
        "__import__('os').execv('/bin/touch', ['touch', {file!r}])",
        "__import__('socket').create_connection(('127.0.0.1', {port}))",
        "__import__('ctypes').CDLL(None).system(b'true')",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "answer = open('/etc/passwd').read()",
        "'a' * 10**11",
        "[0] * 10**10",
        "raise SystemExit",
    ],
)
def test_nothing_is_reached(code: str, tmp_path: Path) -> None:
    file = tmp_path / "made"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        with pytest.raises(NoAnswer):
            ask(code.format(file=str(file), port=server.getsockname()[1]))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not file.exists()
    assert ask("answer = 1 + 1") == 2


def test_the_kernel_holds_where_pythons_wall_is_climbed(tmp_path: Path) -> None:
    """In a process without the audit hook: Landlock alone."""
    code = (
        "from skd_plugin.tasks.judge_process import landlock\n"
        "import sys\nprint(landlock([sys.prefix]))\n"
        f"for do in (lambda: open({str(tmp_path / 'made')!r}, 'w'), lambda: open('/etc/passwd')):\n"
        "    try:\n        do(); print('reached')\n    except PermissionError:\n        print('denied')\n"
        "print(len(open(sys.prefix + '/pyvenv.cfg').read()) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.stdout.startswith("False"):
        pytest.skip("this kernel has no Landlock")
    assert done.stdout.split() == ["True", "denied", "denied", "True"], done.stdout + done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("code", ["9**9**9", "while True: pass", "(lambda f: f(f))(lambda f: f(f))"])
def test_an_answer_that_never_ends_is_none(code: str) -> None:
    """Two of them hold the interpreter's lock, or would for ever."""
    ask("1")  # the process is there
    started = time.monotonic()
    with pytest.raises(NoAnswer):
        ask(code, limit_s=0.5)
    assert time.monotonic() - started < 30  # and not for ever
    assert ask("answer = 2") == 2


def test_what_is_printed_is_no_answer() -> None:
    assert ask("print('{\"answer\": 7}'); answer = 2") == 2


def test_a_checker_that_fails_by_itself_is_an_error() -> None:
    with pytest.raises(JudgeError, match=r"run failed at \('1/0',\): ZeroDivisionError"):
        ask("1/0")
    with pytest.raises(JudgeError, match=r"does not start: .*(?s:.)*No module named 'nowhere'"):
        judge.ask("nowhere:f", 1)


def test_many_threads_ask_at_once() -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(ask(f"answer = {n} * {n}"))) for n in range(24)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [n * n for n in range(24)]


def children() -> list[psutil.Process]:
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in alive if "judge_process.py" in " ".join(p.cmdline())]


def test_a_process_that_is_killed_is_replaced() -> None:
    ask("1")
    for process in children():
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert ask("answer = 3") == 3


def test_nothing_is_left_of_a_parent_that_dies() -> None:
    code = (
        "import os\nfrom skd_plugin.tasks import judge\nimport psutil\n"
        "judge.ask('tests.unit.test_judge:run', '1')\n"
        "print(*[p.pid for p in psutil.Process().children()], flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    (pid,) = map(int, done.stdout.split())
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "its end")


# --- the checkers of reasoning-gym ---


def _called(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function calls: ("own", name of a method) or ("", the object)."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            yield "", function.__globals__.get(name, getattr(builtins, name, None))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if owner in ("self", "cls"):
                yield "own", node.func.attr
            else:
                yield "", getattr(function.__globals__.get(owner), node.func.attr, None)


def _evaluates(dataset: type) -> bool:
    """Whether its `score_answer`, or what that calls in reasoning-gym, evaluates a text."""
    seen: set[Any] = set()
    todo: list[Any] = [dataset.score_answer]
    while todo:
        function = todo.pop()
        if function in seen or not inspect.isfunction(function) or not function.__module__.startswith("reasoning_gym"):
            continue
        seen.add(function)
        for kind, called in _called(function):
            if kind == "own":
                todo.append(getattr(dataset, called, None))
            elif called in (eval, exec) or getattr(called, "__name__", "") in ("parse_expr", "sympify"):
                if called in (eval, exec) or called.__module__.startswith("sympy"):
                    return True
            elif callable(called):
                todo.append(called)
    return False


def test_datasets_whose_checker_evaluates_are_those_of_the_table() -> None:
    from reasoning_gym.factory import DATASETS

    assert len(DATASETS) > 100
    assert {name for name, (dataset, _) in DATASETS.items() if _evaluates(dataset)} == EVALUATING


@pytest.mark.parametrize("name", ["gsm_symbolic", "chain_sum", "countdown", "spiral_matrix"])
def test_a_right_answer_scores_and_a_hostile_one_does_nothing(name: str, tmp_path: Path) -> None:
    task = find_task(f"reasoning_gym:{name}")()
    (example,) = task.examples("test", 1)
    file = tmp_path / "made"
    assert task.score(example.reference, example.label) == 1.0
    hostile = f"<answer>__import__('pathlib').Path({str(file)!r}).touch()</answer>"
    assert task.score(hostile, example.label) < 0.1 and not file.exists()
    assert task.score(example.reference, example.label) == 1.0


def test_an_endless_answer_of_a_task_scores_nothing() -> None:
    task = find_task("reasoning_gym:spiral_matrix")()
    (example,) = task.examples("test", 1)
    with pytest.raises(NoAnswer):
        judge.ask(CHECK, "spiral_matrix", b64encode(pickle.dumps({})).decode(), "9**9**9", example.label, limit_s=1.0)
    assert task.score(example.reference, example.label) == 1.0
