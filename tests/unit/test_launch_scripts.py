"""The launch scripts, run for real with stand-ins for skd, ray and Slurm that write down how they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.waiting import GUARD_S, wait_for

SCRIPTS = Path(__file__).parents[2] / "scripts"
RECIPE = "recipes/own.yaml"
# How a stand-in acts after the line that it logs. srun blocks as `ray start --block` does.
STAND_INS = {
    "skd": 'exit "$(cat skd_status 2>/dev/null || echo 0)"',
    "ray": '[ "$2" = stop ] || [ ! -e job_hangs ] || exec /bin/sleep 3600; '
    'exit "$(cat ray_status 2>/dev/null || echo 0)"',
    "srun": "exec /bin/sleep 3600",
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; fi',
    # How many nodes are up, at each look; two are when Ray has been started on both.
    "python": '[ "$(head -n 1 nodes_up)" != 2 ] || until [ "$(grep -c ^srun calls)" = 2 ]; do /bin/sleep 0.01; done; '
    "head -n 1 nodes_up; sed -i 1d nodes_up",
    "sleep": "exit 0",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository without .venv: the scripts, and the stand-ins in bin."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    for script in SCRIPTS.glob("launch_*.sh"):
        shutil.copy(script, tmp_path / "scripts")
    for name, act in STAND_INS.items():
        path = tmp_path / "bin" / name
        # In one piece: several of them write at the same time.
        call = f'call=$(printf "{name}"; printf " <%s>" "$@"); echo "$call" >>{tmp_path}/calls'
        path.write_text(f"#!/bin/bash\n{call}\n{act}\n")
        path.chmod(0o755)
    return tmp_path


def environment(root: Path, **variables: str) -> dict[str, str]:
    slurm = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    return {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", **slurm, "SLURM_JOB_NUM_NODES": "2", **variables}


def launch(root: Path, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"scripts/launch_{script}.sh", *words],
        cwd=root,
        env=environment(root, **variables),
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )


def calls(root: Path) -> list[str]:
    path = root / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.stem)
def test_every_script_is_valid(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("script", ["node", "job", "slurm"])
def test_without_a_recipe_it_says_how(root: Path, script: str) -> None:
    done = launch(root, script)
    assert done.returncode == 2 and f"scripts/launch_{script}.sh RECIPE.yaml" in done.stderr
    assert not calls(root)


# --- one node ---


def test_node_trains_and_hands_the_status_on(root: Path) -> None:
    (root / "skd_status").write_text("7")
    done = launch(root, "node", RECIPE, "skd.vllm={max_num_seqs: 8}", "openrlhf.data.input_template=a|$b")
    assert done.returncode == 7
    assert calls(root) == [
        f"skd <train> <{RECIPE}> <skd.vllm={{max_num_seqs: 8}}> <openrlhf.data.input_template=a|$b>"
    ]


def test_node_checks_first_if_asked(root: Path) -> None:
    assert launch(root, "node", RECIPE, CHECK="1").returncode == 0
    assert calls(root) == [f"skd <check> <{RECIPE}>", f"skd <train> <{RECIPE}>"]
    (root / "calls").unlink()
    (root / "skd_status").write_text("1")
    assert launch(root, "node", RECIPE, CHECK="1").returncode == 1
    assert calls(root) == [f"skd <check> <{RECIPE}>"]


# --- a Ray job ---


def test_job_submits_and_hands_the_status_on(root: Path) -> None:
    (root / "ray_status").write_text("1")
    assert launch(root, "job", RECIPE, "skd.rollout.seed=3", RUNTIME_ENV='{"pip": []}').returncode == 1
    (call,) = calls(root)
    command = f"<env> <--chdir={root}> <{root}/bin/skd> <train> <{RECIPE}> <skd.rollout.seed=3>"
    assert call == f'ray <job> <submit> <--runtime-env-json={{"pip": []}}> <--> {command}'


WORDS = [
    "skd.vllm={max_num_seqs: 8, b: [1]}",
    "a.b=[0.9,0.95]",
    "--train.batch_size",
    "4",
    "x=1e-5",
    "p=/a_b/c-d+e@f%g",
]


def test_words_of_a_job_arrive_as_they_were_given(root: Path) -> None:
    """`ray job submit` joins them by list2cmdline, and the job runs the line in a shell."""
    words = launch(root, "job", RECIPE, *WORDS) and calls(root)[0].split(" <--> ")[1][1:-1].split("> <")
    assert words[-len(WORDS) :] == WORDS
    (root / "calls").unlink()
    line = subprocess.list2cmdline(words)
    assert subprocess.run(line, shell=True, cwd="/", env=environment(root)).returncode == 0
    assert calls(root) == [f"skd <train> <{RECIPE}> " + " ".join(f"<{word}>" for word in WORDS)]


@pytest.mark.parametrize("word", ['a="b"', "a=$HOME", "a=b|c", "a=b;c", "a=`b`", "a=b\nc", "a=\\b", "a='b'", "a=<b>"])
def test_words_that_would_not_arrive_are_refused(root: Path, word: str) -> None:
    done = launch(root, "job", RECIPE, word)
    assert done.returncode == 2 and "put this option into a recipe" in done.stderr
    assert not calls(root)


# --- Slurm ---


def start_of_ray(root: Path) -> list[str]:
    return [call for call in calls(root) if call.startswith("srun")]


def test_slurm_starts_ray_waits_for_all_nodes_and_submits(root: Path) -> None:
    (root / "nodes_up").write_text("0\n1\n2\n9\n")
    (root / "ray_status").write_text("3")
    done = launch(root, "slurm", RECIPE, "skd.rollout.seed=3", SLURM_CPUS_ON_NODE="96")
    assert done.returncode == 3, done.stderr
    head, others = sorted(start_of_ray(root), key=lambda call: "--address" in call)
    assert "<--nodes=1> <--nodelist=node1> <ray> <start> <--head> <--block> <--port=6379>" in head
    assert "<--nodes=1> <--exclude=node1> <ray> <start> <--block> <--address=node1:6379>" in others
    assert "<--cpus-per-task=96>" in head and "<--cpus-per-task=96>" in others
    assert (root / "nodes_up").read_text() == "9\n", "it looked until there were two"
    assert calls(root)[-1].startswith("ray <job> <submit>") and calls(root)[-1].endswith("<skd.rollout.seed=3>")
    assert "<--submission-id=slurm-7-0>" in calls(root)[-1]
    assert not any("requeue" in call for call in calls(root))


def test_slurm_on_one_node_has_a_head_only(root: Path) -> None:
    (root / "nodes_up").write_text("1\n")
    assert launch(root, "slurm", RECIPE, SLURM_JOB_NUM_NODES="1").returncode == 0
    assert len(start_of_ray(root)) == 1


def test_slurm_gives_up_on_nodes_that_do_not_come(root: Path) -> None:
    (root / "nodes_up").write_text("1\n" * 9)
    done = launch(root, "slurm", RECIPE, NODES_S="0")
    assert done.returncode == 1 and "not all of 2 nodes came up" in done.stderr
    assert not any(call.startswith("ray") for call in calls(root))


def test_slurm_says_that_ray_has_ended(root: Path) -> None:
    (root / "nodes_up").write_text("1\n" * 99)
    (root / "bin" / "srun").write_text("#!/bin/bash\nexit 1\n")
    done = launch(root, "slurm", RECIPE)
    assert done.returncode == 1 and "Ray has ended on a node" in done.stderr


@pytest.mark.parametrize(
    ("number", "status", "requeued"),
    [(signal.SIGUSR1, 1, True), (signal.SIGTERM, 143, False)],
    ids=["time", "scancel"],
)
def test_slurm_goes_back_into_the_queue_when_its_time_is_over(
    root: Path, number: int, status: int, requeued: bool
) -> None:
    (root / "nodes_up").write_text("2\n")
    (root / "job_hangs").touch()
    run = subprocess.Popen(["bash", "scripts/launch_slurm.sh", RECIPE], cwd=root, env=environment(root))
    wait_for(lambda: any(call.startswith("ray") for call in calls(root)), "the job")
    run.send_signal(number)
    assert run.wait(GUARD_S) == status  # which also waits for the stand-ins of srun: they are ended
    assert (calls(root)[-1] == "scontrol <requeue> <7>") == requeued
    assert "ray <job> <stop> <slurm-7-0>" in calls(root)[-2:], "the training is stopped before Ray"


# --- dry runs ---


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("node", [f"skd train {RECIPE} a.b=1"]),
        ("job", ["ray job submit"]),
        ("slurm", ["--nodelist=HEAD ray start --head", "ray start --block --address=HEAD:6379", "ray job submit"]),
    ],
)
def test_dry_run_prints_and_starts_nothing(root: Path, script: str, shown: list[str]) -> None:
    done = launch(root, script, RECIPE, "a.b=1", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(shown) and all(part in line for part, line in zip(shown, lines, strict=True))
    assert not calls(root)


def test_slurm_outside_of_the_repository(root: Path) -> None:
    done = launch(root, "slurm", RECIPE, SLURM_SUBMIT_DIR=str(root / "bin"))
    assert done.returncode == 2 and "run sbatch in the repository's root" in done.stderr
