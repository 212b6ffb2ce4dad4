"""From a recipe to a checked run: what is completed, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from skd_plugin.config import host_rules, versions
from skd_plugin.config.host_options import check_by_host, host_arguments, host_defaults, host_parser
from skd_plugin.config.recipe import RenamedOption, load_recipe
from skd_plugin.config.run import Run
from skd_plugin.config.schema import parse_skd
from skd_plugin.errors import RecipeError
from skd_plugin.prepare import prompts
from skd_plugin.prepare.load_run import Models, host_options_of, load_models, load_run
from skd_plugin.tasks.label import Label
from tests.recipes import PAIR, QUICKSTART, RECIPES


def test_moving_values_survive_the_run_folder(quickstart) -> None:
    run = quickstart("skd.rollout.top_k={kind: cosine, from: 40, to: 5}")
    run.save()
    assert Run.load(run.folder) == run


def test_references_come_with_a_task(quickstart) -> None:
    """And are in the labels that the host carries."""
    run = quickstart("skd.rollout.method=supervised")
    lines = run.data["train"]
    assert all("the answer is" in Label.parse(line["label"]).reference for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("openrlhf.rollout.n_samples_per_prompt=2", r"n_samples_per_prompt is 2, .* train on copies"),
        ("openrlhf.train.agent_func_path=agent.py", r"names an agent, whose turns have no reference"),
    ],
)
def test_references_where_they_make_no_sense(quickstart, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quickstart("skd.rollout.method=mixed_skd", override)


def test_references_of_a_dataset(quickstart, write) -> None:
    """Every prompt needs one, in the column that the host takes for the label."""
    lines = [{"q": "tom has 3 coins .", "a": text} for text in ("three", "four", "", None, 5)]

    def load(count: int, *more: str) -> Run:
        path = write("own.jsonl", "".join(json.dumps(line) + "\n" for line in [*lines[:2], *lines[count : count + 1]]))
        dataset = [f"openrlhf.data.prompt_dataset={path}", "openrlhf.data.input_key=q", "skd.task=null"]
        return quickstart("skd.rollout.method=two_stage", *dataset, *more)

    load(5, "openrlhf.data.label_key=a")
    with pytest.raises(RecipeError, match=r"two_stage needs references: name .* openrlhf\.data\.label_key"):
        load(5)
    for count in (2, 3):
        with pytest.raises(
            RecipeError, match=r"own\.jsonl, line 3 has no reference in 'a' \(openrlhf\.data\.label_key\)"
        ):
            load(count, "openrlhf.data.label_key=a")
    with pytest.raises(RecipeError, match=r"own\.jsonl, line 3: 'a' is 5, but a reference is a text"):
        load(4, "openrlhf.data.label_key=a")
    with pytest.raises(RecipeError, match=r"own\.jsonl has no column 'b' \(openrlhf\.data\.label_key\); it has q, a"):
        load(5, "openrlhf.data.label_key=b")


def test_refused_host_option_in_a_recipe(quickstart) -> None:
    with pytest.raises(
        RecipeError, match=r"openrlhf\.rollout\.temperature is 0\.7, .*skd\.rollout\.student_temperature"
    ):
        quickstart("openrlhf.rollout.temperature=0.7")


def test_student_is_required(write) -> None:
    recipe = write("own.yaml", f"skd: {{teacher: {{model_name_or_path: {PAIR / 'teacher'}}}}}")
    with pytest.raises(RecipeError, match=r"openrlhf\.actor\.model_name_or_path is missing: the student"):
        load_models(recipe)


def test_full_vocabulary_of_plain_output_heads(quickstart) -> None:
    assert quickstart("skd.loss.vocabulary=full").skd.loss.vocabulary == "full"


def test_full_vocabulary_of_a_compiled_model_is_refused(quickstart) -> None:
    quickstart("openrlhf.ds.deepcompile=true")
    with pytest.raises(RecipeError, match=r"deepcompile is on, but .* replaces the forward of the output head"):
        quickstart("openrlhf.ds.deepcompile=true", "skd.loss.vocabulary=full")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "is another model than the student's"),
        (("skd.loss.vocabulary=full",), "vocabulary is full"),
        (("openrlhf.ds.zpg=2",), "zpg is above 1"),
        (("skd.vllm={quantization: fp8}",), "rounded"),
    ],
)
def test_a_teacher_that_cannot_follow(quickstart, overrides: tuple[str, ...], message: str) -> None:
    follow = ["skd.teacher.follow={ema: 0.9}"]
    model = "student" if overrides else "teacher"
    with pytest.raises(RecipeError, match=f"skd.teacher.follow cannot be: .*{message}"):
        quickstart(
            *follow,
            f"skd.teacher.model_name_or_path={QUICKSTART.parent / 'models' / 'arithmetic' / model}",
            *overrides,
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("openrlhf.train.partial_rollout_enable=true",), "needs openrlhf.train.async_enable"),
        (("openrlhf.train.async_enable=true", "openrlhf.vllm.enable_sleep=true"), "each on GPUs of its own"),
        (("openrlhf.train.enable_ema=true", "openrlhf.ds.zero_stage=3"), "the one of the start"),
        (("openrlhf.train.async_enable=true", "openrlhf.ckpt.best_metric_key=x"), "leave it at none"),
    ],
)
def test_what_does_not_go_together_in_openrlhf(quickstart, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quickstart(*overrides)


def test_quickstart_is_a_complete_run(quickstart, tmp_path: Path) -> None:
    run = quickstart()
    assert run.cpu is not torch.cuda.is_available()
    assert run.folder.path == tmp_path / "run" and run.folder.path.is_absolute()
    arguments = run.host_argv()
    parsed = vars(host_parser().parse_args(arguments))
    assert parsed["actor.model_name_or_path"] == str(PAIR / "student")
    assert parsed["rollout.max_new_tokens"] == run.skd.rollout.max_new_tokens
    assert parsed["ckpt.output_dir"] == str(tmp_path / "run" / "model")
    assert parsed["reward.remote_url"].endswith("skd_plugin/tasks/reward.py")
    for key, count in (("data.prompt_dataset", 8), ("eval.dataset", 4)):
        split = Path(parsed[key]).stem
        rows = run.data[split]
        assert run.folder.prompts(split).path == Path(parsed[key])
        assert len(rows) == count and set(rows[0]) == {"input", "label", "datasource"}
        assert parsed["data.input_key"] == "input" and parsed["data.label_key"] == "label"


def test_names_and_places_of_the_user_are_kept(quickstart, tmp_path: Path) -> None:
    parsed = vars(host_parser().parse_args(quickstart().host_argv()))
    assert parsed["logger.wandb.run_name"] == "run" and parsed["logger.tensorboard_dir"] == str(
        tmp_path / "run/tensorboard"
    )
    own = {
        "ckpt.path": "saved",
        "ckpt.output_dir": "out",
        "logger.tensorboard_dir": "tb",
        "logger.wandb.run_name": "mine",
    }
    run = quickstart(*(f"openrlhf.{key}={value}" for key, value in own.items()))
    parsed = vars(host_parser().parse_args(run.host_argv()))
    assert parsed["logger.wandb.run_name"] == "mine"
    for key in ("ckpt.path", "ckpt.output_dir", "logger.tensorboard_dir"):
        assert parsed[key] == str(Path(own[key]).resolve())


def test_run_survives_its_file(quickstart) -> None:
    run = quickstart("skd.vllm={gpu_memory_utilization: 0.3}")
    assert run.skd.vllm == {"gpu_memory_utilization": 0.3}
    run.save()
    assert Run.load(run.folder) == run
    assert Run.load(run.folder).host_argv() == run.host_argv()


def test_fewer_prompts_than_a_step_needs(write, quickstart) -> None:
    with pytest.raises(RecipeError, match=r"there are 1 prompts, but a step needs .*batch_size = 2"):
        quickstart("skd.task.train_prompts=1")
    own = write("p.jsonl", '{"q": "tom has 3 coins ."}\n')
    with pytest.raises(RecipeError, match=r"there are 1 prompts"):
        quickstart("skd.task=null", f"openrlhf.data.prompt_dataset={own}", "openrlhf.data.input_key=q")


def test_a_run_without_a_step_is_refused(write, quickstart) -> None:
    """Which OpenRLHF would end with success."""
    own = write("p.jsonl", '{"q": "tom has 3 coins ."}\n' * 4)
    for data in ([], ["skd.task=null", f"openrlhf.data.prompt_dataset={own}", "openrlhf.data.input_key=q"]):
        with pytest.raises(RecipeError, match=r"there are 1 prompts, but a step needs .*max_samples leaves 1 of \d"):
            quickstart(*data, "openrlhf.data.max_samples=1")
        with pytest.raises(RecipeError, match=r"num_episodes"):
            quickstart(*data, "openrlhf.train.num_episodes=0")
        assert quickstart(*data, "openrlhf.data.max_samples=2")


def test_a_batch_above_what_is_looked_at_of_a_dataset(write, quickstart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PROMPTS_CHECKED", 2)
    own = write("p.jsonl", '{"q": "tom has 3 coins ."}\n' * 4)
    sizes = [f"openrlhf.{name}=4" for name in ("rollout.batch_size", "train.batch_size")]
    given = ["skd.task=null", f"openrlhf.data.prompt_dataset={own}", "openrlhf.data.input_key=q"]
    assert quickstart(*given, *sizes)


def test_run_without_a_task_reads_the_users_prompts(write, quickstart) -> None:
    path = write("p.jsonl", '{"q": "tom has 3 coins ."}\n{"q": "ann has 4 apples ."}\n')
    given = ["skd.task=null", f"openrlhf.data.prompt_dataset={path}", "openrlhf.data.input_key=q"]
    run = quickstart(*given)
    assert run.host["reward.remote_url"] == host_rules.NO_REWARD
    assert "eval.dataset" not in run.host
    with pytest.raises(RecipeError, match=r"has no column 'x' \(openrlhf\.data\.input_key\); it has q"):
        quickstart(*given, "openrlhf.data.input_key=x")
    with pytest.raises(RecipeError, match=r"p\.jsonl, line 1 has 5 tokens, but 2 to 4 fit"):
        quickstart(*given, "openrlhf.data.max_len=100")
    with pytest.raises(RecipeError, match=r"openrlhf\.data\.prompt_dataset: there is no file"):
        quickstart(*given, f"openrlhf.data.prompt_dataset={path}.jsonl")


def test_prompts_of_a_task_that_do_not_fit(quickstart) -> None:
    with pytest.raises(RecipeError, match=r"prompt 1 has \d+ tokens, but 2 to 4 fit"):
        quickstart("openrlhf.data.max_len=100", "skd.rollout.max_new_tokens=96")


def test_unknown_task(quickstart) -> None:
    with pytest.raises(RecipeError, match=r"skd\.task\.name: unknown key 'arithmetics'; did you mean 'arithmetic'"):
        quickstart("skd.task.name=arithmetics")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_kernels_of_a_gpu_are_asked_for_without_one(quickstart) -> None:
    with pytest.raises(RecipeError, match=r"skd\.rollout\.kernels is triton, whose kernels need a GPU; leave it out"):
        quickstart("skd.rollout.kernels=triton")
    quickstart("skd.rollout.kernels=torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_asked_for_without_a_gpu(quickstart, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"wants CUDA \(skd\.device: cuda\), but this machine has no GPU"):
        quickstart("skd.device=cuda")
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    assert not quickstart("skd.device=cuda", "openrlhf.actor.num_gpus_per_node=1").cpu


def test_device_cpu_is_a_cpu_run_everywhere(quickstart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    one = "openrlhf.actor.num_gpus_per_node=1"
    assert quickstart("skd.device=cpu").cpu and not quickstart("skd.device=auto", one).cpu


def test_installed_versions_are_supported() -> None:
    versions.check_versions()
    names = {library.name.removesuffix("-cpu") for library in versions.installed_versions()}
    assert names == {"openrlhf", "vllm", "ray", "deepspeed", "transformers", "torch"}


def test_unsupported_version(monkeypatch: pytest.MonkeyPatch, quickstart) -> None:
    monkeypatch.setitem(versions.SUPPORTED, ("openrlhf",), "0.99.")
    with pytest.raises(RecipeError, match=r"openrlhf 0\.11\.2 is installed; .* tested with openrlhf==0\.99\.\* only"):
        quickstart()
    monkeypatch.setenv(versions.UNTESTED, "1")
    assert quickstart().cpu


def test_missing_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "SUPPORTED", {("no-such-host", "nor-this-one"): "1."})
    monkeypatch.setenv(versions.UNTESTED, "1")
    with pytest.raises(RecipeError, match=r"no-such-host is not installed; .* pip install 'no-such-host==1\.\*'"):
        versions.check_versions()


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        pytest.param("skd: 3", [], id="skd"),
        pytest.param("openrlhf: [a]", ["skd.teacher.model_name_or_path=t"], id="openrlhf"),
        pytest.param("base: [a]", [], id="base"),
        pytest.param("{}", ["skd.rollout.top_k=[1"], id="override"),
    ],
)
def test_malformed_section_is_no_traceback(recipe: str, overrides: list[str], write) -> None:
    with pytest.raises(RecipeError):
        load_models(write("own.yaml", recipe), overrides)


@pytest.mark.parametrize(
    "recipe", sorted(path for path in RECIPES.glob("*.yaml") if "base" not in path.stem), ids=lambda path: path.stem
)
def test_every_recipe_resolves_against_the_installed_host(recipe: Path) -> None:
    """Every option is known to OpenRLHF's parser or to our schema, and none is one that a run refuses. Without models
    and prompts: test_gpu_recipes.py and the tests of the quickstart go on from here."""
    content = load_recipe(recipe)
    skd = parse_skd(content["skd"])
    cpu = skd.device != "cuda"
    host = host_options_of(Models(skd, host_rules.complete(content["openrlhf"], cpu=cpu), host_defaults(), cpu))
    check_by_host(host_arguments(host, host_parser()))
    host_rules.check({**host_defaults(), **host}, skd)


@pytest.mark.parametrize("recipe", sorted(QUICKSTART.parent.glob("quickstart*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_quickstarts_student_is_complete(recipe: Path, tmp_path: Path) -> None:
    run = load_run(recipe, [f"skd.run_dir={tmp_path}", "skd.task.train_prompts=64", "skd.task.eval_prompts=2"])
    assert run.cpu and len(run.data["train"]) == 64


def test_run_from_before_an_option_was_renamed_is_the_same_run(quickstart, recwarn: pytest.WarningsRecorder) -> None:
    """So an unfinished one goes on; nobody is told, because nobody wrote its config.yaml by hand."""
    run = quickstart("skd.loss.teacher_top_k=8")
    run.save()
    text = run.folder.config.read_text()
    assert text.count("teacher_top_k: 8") == 1
    run.folder.config.write_text(text.replace("teacher_top_k: 8", "top_k: 8"))
    assert Run.load(run.folder) == run
    assert not [warning for warning in recwarn.list if issubclass(warning.category, RenamedOption)]


# --- what would end a run after it has begun ---


def test_a_student_that_could_not_be_saved(quickstart, tmp_path: Path) -> None:
    """transformers reads a generation_config.json that contradicts itself, and refuses to write it."""
    student = tmp_path / "student"
    shutil.copytree(PAIR / "student", student)
    (student / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7}')
    with pytest.raises(
        RecipeError, match=r"the student .* could not be saved .*`?temperature`?.*generation_config\.json"
    ):
        quickstart(f"openrlhf.actor.model_name_or_path={student}")
    (student / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    quickstart(f"openrlhf.actor.model_name_or_path={student}")
    (student / "generation_config.json").unlink()
    quickstart(f"openrlhf.actor.model_name_or_path={student}")
    settings = json.loads((student / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": "a"}, {"name": "tool/use", "template": "b"}]
    (student / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": templates}))
    with pytest.raises(RecipeError, match=r"could not be saved .*mend its tokenizer_config\.json: .*'tool/use'"):
        quickstart(f"openrlhf.actor.model_name_or_path={student}")


@pytest.mark.parametrize(
    ("option", "name"), [("reward.remote_url", "reward_func"), ("train.agent_func_path", "AgentExecutor")]
)
def test_a_file_of_the_users_is_read_before_the_start(quickstart, write, option: str, name: str) -> None:
    def load(text: str) -> Run:
        return quickstart(f"openrlhf.{option}={write('own.py', text)}", "skd.objective.rl_coef=1")

    for text, message in (
        ("def f(:", "line 1 is no Python: invalid syntax"),
        ("x = 1", f"defines no {name}"),
        (f"class A:\n    x = '{name}'", f"defines no {name}"),
    ):
        with pytest.raises(RecipeError, match=rf"openrlhf\.{option}: .*own\.py.* {message}"):
            load(text)
    for text in (f"from os import path as {name}", f"{name} = print", f"class {name}: pass", "from os.path import *"):
        load(text)
    with pytest.raises(RecipeError, match=rf"openrlhf\.{option}: none\.py cannot be read: No such file"):
        quickstart(f"openrlhf.{option}=none.py", "skd.objective.rl_coef=1")


def test_columns_of_the_held_out_dataset(quickstart, write) -> None:
    train = write("p.jsonl", '{"q": "tom has 3 coins .", "a": "3"}\n' * 2)
    given = ["skd.task=null", f"openrlhf.data.prompt_dataset={train}", "openrlhf.data.input_key=q"]

    def load(text: str, *more: str) -> Run:
        return quickstart(*given, f"openrlhf.eval.dataset={write('held.jsonl', text)}", *more)

    load('{"q": "tom has 3 coins ."}')
    with pytest.raises(
        RecipeError, match=r"held\.jsonl has no column 'q' \(openrlhf\.data\.input_key\); it has other"
    ):
        load('{"other": "tom has 3 coins ."}')
    with pytest.raises(RecipeError, match=r"held\.jsonl has no column 'a' \(openrlhf\.data\.label_key\); it has q"):
        load('{"q": "tom has 3 coins ."}', "openrlhf.data.label_key=a")
    with pytest.raises(RecipeError, match=r"p\.jsonl has no column 'b' \(openrlhf\.data\.label_key\); it has q, a"):
        load('{"q": "tom has 3 coins ."}', "openrlhf.data.label_key=b")
    with pytest.raises(RecipeError, match=r"held\.jsonl, line 2: 'q' is 5, but must be a text"):
        load('{"q": "tom has 3 coins ."}\n{"q": 5}')
    with pytest.raises(RecipeError, match=r"eval\.dataset: there is no file"):
        quickstart(*given, f"openrlhf.eval.dataset={train}.jsonl")


@pytest.mark.parametrize("template", ["{x}", "{", "{1}"])
def test_a_template_that_makes_no_prompt(quickstart, template: str) -> None:
    with pytest.raises(RecipeError, match=r"openrlhf\.data\.input_template is .*, in which only \{\} is a place"):
        quickstart(f"openrlhf.data.input_template='{template}'")


def test_what_is_joined_is_said_before_the_start(quickstart, tmp_path) -> None:
    """Of a teacher that ends its turns with another token than its student."""
    from transformers import AutoTokenizer, GenerationConfig

    teacher = shutil.copytree(PAIR / "teacher", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(teacher)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(teacher)
    other = f"skd.teacher.model_name_or_path={teacher}"
    said = "</s> (2) and <unk> (3) end a turn in one of the models; they are one event, written as </s> (2)"
    assert quickstart(other).notices == [said]
    assert quickstart(other, "skd.end_tokens=apart").notices == quickstart().notices == []
