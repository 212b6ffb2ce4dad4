"""Every command in the header of a GPU recipe, as far as a machine without GPU and Hub can run it.

`load_run` runs whole: schema, OpenRLHF's parser and its own checks between options, the rules of a distillation run,
both models' configurations (as published, written to disk), prompts made and measured. NOT covered: real tokenizers
(that the two of a pair agree, how long real prompts are; stand-ins of single bytes are used), the datasets' contents
(rows with the columns of the Hub are used), weights, and whatever happens from the start of Ray on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import estimate
import pytest
from time_model import GPUS

from skd_plugin.check.environment import gpus_needed
from skd_plugin.check.memory_model import GIB, in_gib
from skd_plugin.config.host_options import host_parser
from skd_plugin.config.run import Run
from skd_plugin.prepare.load_run import load_run
from tests.stand_ins import write_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpus.md"
PARAMETERS = {  # as published, to the last one; tied ones counted once
    "google/gemma-2b-it": 2_506_172_416,
    "google/gemma-7b-it": 8_537_680_896,
    "Qwen/Qwen2-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
}
ROWS: dict[str, dict[str, Any]] = {  # with the columns of the Hub; the number makes each prompt another one
    "gsm8k": {"question": "How many are {}?", "answer": "So many.\n#### {}"},
    "flores": {"sentence_asm_Beng": "মই যাওঁ {}", "sentence_eng_Latn": "I go home {}."},
    "dialogsum": {"dialogue": "#Person1#: Hi {}.\n#Person2#: Hello.", "summary": "They greet {}."},
    "ultrainteract": {"task": "Math_CoT", "instruction": "Add {} and 1.", "response": "It is \\boxed{{{}}}"},
}


RECIPES = sorted(path for path in (ROOT / "recipes").glob("gpu-*.yaml") if not path.stem.startswith("gpu-base"))
PLANS = estimate.all_plans()
plans = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name.replace(" ", "-"))


def write_rows(folder: Path, task: str, count: int) -> Path:
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{k: v.format(f"{split} {n}") for k, v in ROWS[task].items()} for n in range(8 * count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`load(plan)`: load_run of a command with stand-ins for what is on the Hub; the prompts of one step."""
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")  # where its GPUs are

    def load_plan(plan: Any) -> Run:
        (task,) = plan.skd.all_tasks
        batch = plan.options["rollout.batch_size"]
        teacher = write_model(tmp_path / "teacher", estimate.PUBLISHED[plan.skd.teacher.model_name_or_path])
        student = write_model(tmp_path / "student", estimate.PUBLISHED[plan.options["actor.model_name_or_path"]])
        stand_ins = [
            f"skd.teacher.model_name_or_path={teacher}",
            f"openrlhf.actor.model_name_or_path={student}",
            f"skd.task.path={write_rows(tmp_path / 'rows', task.name, batch)}",
            f"skd.task.train_prompts={batch}",
            f"skd.run_dir={tmp_path / 'run'}",
        ]
        return load_run(ROOT / "recipes" / plan.recipe, [*plan.overrides, *stand_ins])

    return load_plan


@plans
def test_command_of_a_recipe_loads(plan: Any, load: Any) -> None:
    run = load(plan)
    assert not run.cpu and run.skd.device == "cuda"
    resolved = vars(host_parser().parse_args(run.host_argv()))
    assert resolved["rollout.max_new_tokens"] == plan.response_limit
    lines = run.data["train"]
    assert len(lines) == plan.options["rollout.batch_size"]


def test_examples_of_the_page(load: Any) -> None:
    """What both take where they sleep in turns, and what the ways of sharing GPUs cost."""
    page, recipe = PAGE.read_text(), ROOT / "recipes" / "gpu-qwen3-1.7b-from-8b.yaml"
    (line,) = re.findall(r"^openrlhf\.vllm\.enable_sleep=true .*$", page, re.MULTILINE)
    apart = ["colocate_all=false", "dynamic_batch_enable=false"]
    halves = ["openrlhf.actor.num_gpus_per_node=4", "openrlhf.vllm.num_engines=4"]
    ways = {
        "apart, 4 + 4, padded batches of 4": [*(f"openrlhf.train.{option}" for option in apart), *halves],
        "apart, 4 + 4, packed and dynamic": [f"openrlhf.train.{apart[0]}", *halves],
        "**colocated on 8, `vllm.gpu_memory_utilization` 0.45: the recipe**": [],
        "colocated on 8, both asleep in turns, 0.85": line.split(),
    }
    for name, options in ways.items():
        plan = estimate.read_plan(recipe, options)
        seconds = estimate.step_time(plan, GPUS[1], estimate.ACCEPTANCE, estimate.LENGTH).total
        assert f"| {name} | {seconds:.1f} |" in page, f"{name}: {seconds:.1f}"
    load(plan)
    asleep = estimate.step_time(plan, GPUS[1], estimate.ACCEPTANCE, estimate.LENGTH).sleep
    assert f"{asleep:.1f} s a step in the example" in page


@plans
def test_sizes_agree_with_actors_engines_and_gpus(plan: Any) -> None:
    options = plan.options
    actors, engine_gpus, others = gpus_needed(options)
    shared = options["train.colocate_all"]
    assert (actors if shared else actors + engine_gpus, others) == (plan.nodes * estimate.GPUS_OF_A_NODE, 0)
    assert not shared or actors == engine_gpus, "the host asks for it in its train()"
    assert plan.responses == options["train.batch_size"], "one update a rollout"
    assert plan.responses % (actors * options["train.micro_batch_size"]) == 0
    assert plan.responses % (actors * options["rollout.micro_batch_size"]) == 0
    assert plan.responses % options["vllm.num_engines"] == 0
    (task,) = plan.skd.all_tasks
    assert task.train_prompts % options["rollout.batch_size"] == 0, "the rest of an epoch would be left out"


@plans
def test_it_fits_by_the_cost_model(plan: Any) -> None:
    for gpu in GPUS:
        budget = plan.budget(gpu)
        assert budget.engine.sequences >= budget.requests
        assert budget.engine.peak < gpu.memory, in_gib(budget.engine.peak)
        assert budget.trainer.total < 0.8 * gpu.memory, in_gib(budget.trainer.total)
        together = budget.engine.peak + budget.trainer.total if plan.options["train.colocate_all"] else 0
        assert together < gpu.memory, in_gib(together)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_header_has_its_command(recipe: Path) -> None:
    commands = estimate.header_commands(recipe)
    assert commands
    for words in commands:
        (script,) = [word for word in words if word.startswith("scripts/")]
        assert (ROOT / script).is_file() and words.count(f"recipes/{recipe.name}") == 1
    several = any("launch_node" not in word for words in commands for word in words if word.startswith("scripts/"))
    assert several == any(plan.nodes > 1 for plan in PLANS if plan.recipe == recipe.name)


def test_no_two_commands_share_a_run_folder() -> None:
    folders = [plan.skd.run_dir for plan in PLANS]
    assert len(set(folders)) == len(folders)


def test_what_is_said_to_be_the_papers() -> None:
    """K, gamma, temperatures, learning rate, batch, epochs, lengths, seed: the configuration that was released."""
    paper = [plan for plan in PLANS if "gemma" in plan.recipe or "qwen2-" in plan.recipe]
    lengths = {"gsm8k": (768, 512, 3), "flores": (512, 256, 10), "dialogsum": (1152, 128, 3)}
    lengths["ultrainteract"] = (2048, 1024, 3)
    assert {task.name for plan in paper for task in plan.skd.all_tasks} == set(lengths)
    for plan in paper:
        rollout, options = plan.skd.rollout, plan.options
        assert (rollout.top_k, rollout.draft_len, rollout.seed) == (25, 5, 20)
        assert (rollout.student_temperature, rollout.student_top_p) == (0.5, 0.5)
        assert (rollout.teacher_temperature, rollout.teacher_top_p) == (0.2, 0.5)
        assert (options["actor.adam.lr"], options["train.batch_size"], options["train.seed"]) == (1e-5, 8, 20)
        assert (options["actor.lr_scheduler"], options["actor.lr_warmup_ratio"]) == ("linear", 0)
        name = plan.skd.all_tasks[0].name
        found = options["data.max_len"], plan.response_limit, options["train.num_episodes"]
        assert found == lengths[name], name


def test_published_sizes() -> None:
    sizes = {name: estimate.model_size(config).parameters for name, config in estimate.PUBLISHED.items()}
    assert sizes == PARAMETERS


def test_page_has_the_tables_that_the_script_prints() -> None:
    """After a change of a recipe or of the model: python scripts/estimate.py, and paste."""
    page = PAGE.read_text()
    for table in estimate.tables(PLANS):
        assert "\n".join(table) in page, "\n".join(table)


def test_pages_and_scripts_name_recipes_that_exist() -> None:
    places = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.*"), *ROOT.glob("scripts/*")]
    texts = [path.read_text() for path in places if path.suffix in (".md", ".yaml", ".sh", ".py")]
    named = {name for text in texts for name in re.findall(r"recipes/([\w.-]+\.yaml)|`(gpu-[\w.-]+\.yaml)`", text)}
    found = {first or second for first, second in named} - {"NAME.yaml"}
    assert {recipe.name for recipe in RECIPES} <= found, "a recipe that no page names"
    assert all((ROOT / "recipes" / name).is_file() for name in found), found


def test_gpus_by_their_data_sheets() -> None:
    """A100 SXM 80 GB: 312 TFLOPS, 2,039 GB/s; H100 SXM: 989, 3.35 TB/s; H200 SXM: 989, 4.8 TB/s."""
    assert [(gpu.flops, gpu.bandwidth) for gpu in GPUS] == [(312e12, 2039e9), (989e12, 3350e9), (989e12, 4800e9)]
    assert all(gpu.memory >= 79 * GIB for gpu in GPUS)
