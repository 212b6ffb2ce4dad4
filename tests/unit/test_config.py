"""From a recipe to a checked run: what is merged, what is completed, and what is refused with which words."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from skd_plugin import cli
from skd_plugin.config import host_rules, versions
from skd_plugin.config.host_options import check_by_host, host_arguments, host_defaults, host_parser
from skd_plugin.config.recipe import flatten, load_recipe, set_dotted
from skd_plugin.config.run import Run
from skd_plugin.config.schema import (
    LossConfig,
    RolloutConfig,
    SKDConfig,
    field_docs,
    parse_skd,
)
from skd_plugin.core.gates import CONFIDENCES, GATE_OPTIONS
from skd_plugin.core.losses import LOSSES, PARAMETERS, LossSettings, make_token_loss
from skd_plugin.core.methods import METHODS
from skd_plugin.core.token_weights import WEIGHTINGS, make_weigher
from skd_plugin.errors import RecipeError
from skd_plugin.models import common_vocab_size
from skd_plugin.prepare.load_run import Models, host_options_of, load_models, load_run
from skd_plugin.prepare.model_checks import check_output_head, check_pair, check_prompts, check_vocabularies
from skd_plugin.tasks.label import Label

RECIPES = Path(__file__).parents[2] / "recipes"
QUICKSTART = RECIPES / "quickstart.yaml"
OPTIONS_PAGE = RECIPES.parent / "docs" / "options.md"
PAIR = RECIPES / "models" / "arithmetic"
TEACHER = {"teacher": {"model_name_or_path": "t"}}
TARGET = {"kind": "target_acceptance", "rate": 0.8, "start": 1.0}
SMALL = [
    "skd.task.train_prompts=8",
    "skd.task.eval_prompts=4",
    "openrlhf.rollout.batch_size=2",
    "openrlhf.rollout.micro_batch_size=1",
    "openrlhf.train.batch_size=2",
    "openrlhf.train.micro_batch_size=1",
]


@pytest.fixture(autouse=True)
def on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def write(tmp_path: Path):
    """`write(name, text)`: a recipe file; returns its path."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


@pytest.fixture
def quickstart(tmp_path: Path):
    """`quickstart(*overrides)`: load_run of the quickstart with a small task, in a run folder of its own."""

    def load(*overrides: str) -> Run:
        return load_run(QUICKSTART, [*SMALL, f"skd.run_dir={tmp_path / 'run'}", *overrides])

    return load


# --- recipe files ---


def test_recipe_wins_over_its_base_and_command_line_over_both(write) -> None:
    write("base.yaml", "skd: {rollout: {top_k: 1, draft_len: 2, seed: 3}}\nopenrlhf: {train: {seed: 4}}")
    recipe = write("own.yaml", "base: base.yaml\nskd: {rollout: {draft_len: 20, seed: 30}}")
    merged = load_recipe(recipe, ["skd.rollout.seed=300", "openrlhf.actor.adam.lr=0.5"])
    assert merged["skd"] == {"rollout": {"top_k": 1, "draft_len": 20, "seed": 300}}
    assert merged["openrlhf"] == {"train": {"seed": 4}, "actor": {"adam": {"lr": 0.5}}}
    assert "base" not in merged


def test_a_base_may_have_a_base(write) -> None:
    write("a.yaml", "skd: {run_dir: a, device: cpu, traces_per_step: 1}")
    write("deep/b.yaml", "base: ../a.yaml\nskd: {run_dir: b, device: cuda}")
    recipe = write("c.yaml", "base: deep/b.yaml\nskd: {run_dir: c}")
    assert load_recipe(recipe)["skd"] == {"run_dir": "c", "device": "cuda", "traces_per_step": 1}


def test_dotted_paths_are_relative_to_the_file_that_holds_them(write, tmp_path: Path) -> None:
    write("deep/base.yaml", "skd: {teacher: {model_name_or_path: ./teacher}, vllm: {download_dir: ../up}}")
    recipe = write(
        "own.yaml", "base: deep/base.yaml\nskd: {run_dir: ./run}\nopenrlhf: {data: {prompt_dataset: org/x}}"
    )
    merged = load_recipe(recipe)
    assert merged["skd"]["teacher"]["model_name_or_path"] == str(tmp_path / "deep" / "teacher")
    assert merged["skd"]["vllm"]["download_dir"] == str(tmp_path / "up")
    assert merged["skd"]["run_dir"] == str(tmp_path / "run")
    assert merged["openrlhf"]["data"]["prompt_dataset"] == "org/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skd: {rollout: {top_k: 1", "is not valid YAML"),
        ("- a\n- b", "a recipe is a mapping with the sections openrlhf, skd"),
        ("skdd: {}", "unknown key 'skdd'; did you mean 'skd'"),
        ("base: own.yaml", "the recipe is its own base"),
        ("base: nowhere.yaml", "there is no recipe at .*nowhere.yaml"),
    ],
)
def test_file_that_is_no_recipe(write, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write("own.yaml", text))


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe at .*nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_override_needs_an_equals_sign(write) -> None:
    with pytest.raises(RecipeError, match=r"'skd\.rollout\.top_k' is no override; write key=value"):
        load_recipe(write("own.yaml", ""), ["skd.rollout.top_k"])


def test_override_below_a_value() -> None:
    with pytest.raises(RecipeError, match=r"'skd\.run_dir\.x': 'run_dir' is a value"):
        set_dotted({"skd": {"run_dir": "r"}}, "skd.run_dir.x", 1)


def test_flatten_is_the_inverse_of_set_dotted() -> None:
    flat = {"a.b.c": 1, "a.b.d": [2], "a.e": None, "f": "g"}
    tree: dict = {}
    for key, value in flat.items():
        set_dotted(tree, key, value)
    assert flatten(tree) == flat


# --- the skd section ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("skd.rollout.topk=3", r"unknown key 'skd\.rollout\.topk'; did you mean 'skd\.rollout\.top_k'"),
        ("skd.teacher.model=x", r"unknown key 'skd\.teacher\.model'; did you mean 'skd\.teacher\.model_name_or_path'"),
        ("skd.rollout.top_k=0", r"skd\.rollout\.top_k: .*greater than or equal to 1; got 0"),
        ("skd.rollout.draft_len=0", r"skd\.rollout\.draft_len: .*; got 0"),
        ("skd.rollout.student_top_p=0", r"skd\.rollout\.student_top_p: .*; got 0"),
        ("skd.rollout.method=both", r"skd\.rollout\.method: .*'skd', 'on_policy', .* or 'two_stage'; got 'both'"),
        ("skd.rollout.gate=floor", r"skd\.rollout: gate 'floor' needs a threshold \(skd\.rollout\.threshold\)$"),
        ("skd.rollout.threshold=0.5", r"skd\.rollout: gate 'top_k' has no threshold \(skd\.rollout\.threshold\)$"),
        ("skd.rollout.top_k={kind: linear, from: 5, to: 0}", r"skd\.rollout: top_k is at least 1, .* schedule is 0"),
        (
            "skd.rollout.top_k={kind: step, from: 5, to: 1}",
            r"skd\.rollout\.top_k: .*linear or cosine, or target",
        ),
        ("skd.rollout.top_k={kind: linear, to: 1}", r"skd\.rollout\.top_k\.from: field required"),
        (
            "skd.rollout.top_k={kind: linear, from: 5, to: 1, hold: 0.5, over: 0.4}",
            r"top_k: `hold` = 0.5 must be below",
        ),
        ("skd.rollout.top_k={kind: cosine, from: 5, to: 1, until: 1}", r"unknown key 'skd\.rollout\.top_k\.until'"),
        ("skd.rollout.top_k={kind: target_acceptance, rate: 1.5, start: 5}", r"top_k\.rate: .*less than 1; got 1.5"),
        ("skd.loss.kind=no_such_kind", r"skd\.loss\.kind: .*; got 'no_such_kind'"),
        ("skd.loss.replaced_kind=ce", r"skd\.loss\.replaced_kind: .* 'adaptive_kl' or 'cross_entropy'; got 'ce'"),
        ("skd.loss.temperature=0", r"skd\.loss\.temperature: .*greater than 0; got 0"),
        ("skd.loss.temperature=.inf", r"skd\.loss\.temperature: .*finite number; got inf"),
        ("skd.loss.clamp=0", r"skd\.loss\.clamp: .*greater than 0; got 0"),
        ("skd.loss.accepted_weight=-1", r"skd\.loss\.accepted_weight: .*greater than or equal to 0; got -1"),
        ("skd.loss.reweight.by=loss", r"skd\.loss\.reweight\.by: .* or '[a-z]+'; got 'loss'"),
        ("skd.loss.reweight.floor=1", r"skd\.loss\.reweight\.floor: .*less than 1; got 1"),
        ("skd.loss.reweight.flor=0", r"unknown key 'skd\.loss\.reweight\.flor'; did you mean '.*\.floor'"),
        ("skd.loss.reweight.floor=0.5", r"skd\.loss\.reweight: floor = 0\.5 has no effect: by is none$"),
        ("skd.loss.beta=0.3", r"skd\.loss: beta = 0\.3 has no effect: the loss is forward_kl$"),
        ("skd.loss.alpha=0.3", r"skd\.loss: alpha = 0\.3 has no effect: the loss is forward_kl$"),
        ("skd.teacher.model_name_or_path=null", r"skd\.teacher\.model_name_or_path: .*string"),
    ],
)
def test_refused_value_of_ours(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_skd(load_recipe(QUICKSTART, [override])["skd"])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "cross_entropy", "temperature": 2.0}, "temperature = 2.0 has no effect: the loss is cross_entropy"),
        ({"kind": "jsd", "replaced_kind": "cross_entropy", "alpha": 0.2}, "alpha = 0.2 .*is cross_entropy and jsd"),
        ({"accepted_weight": 0, "replaced_weight": 0}, "are both 0: no token would be trained"),
    ],
)
def test_loss_options_that_do_not_fit_together(loss: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"skd\.loss: .*{message}"):
        parse_skd({"teacher": {"model_name_or_path": "t"}, "loss": loss})


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "jsd", "beta": 0.1},
        {"kind": "cross_entropy", "replaced_kind": "skew_reverse_kl", "alpha": 0.3, "temperature": 2.0},
        {"kind": "forward_kl", "replaced_kind": "cross_entropy", "accepted_weight": 0, "clamp": 5},
        {"reweight": {"by": "rank", "floor": 0}},
    ],
)
def test_loss_options_become_a_loss(loss: dict) -> None:
    """Also after the way through a run's config.yaml, where every default is written out."""
    config = parse_skd({"teacher": {"model_name_or_path": "t"}, "loss": loss})
    again = SKDConfig(**yaml.safe_load(yaml.safe_dump(config.model_dump())))
    assert again == config
    assert callable(make_token_loss(again.loss.settings))
    assert callable(make_weigher(again.loss.reweight.by, again.loss.reweight.floor, 100))


CHOICES = {
    "rollout.method": METHODS,
    "rollout.gate": GATE_OPTIONS,
    "rollout.confidence": CONFIDENCES,
    "loss.kind": LOSSES,
    "loss.replaced_kind": LOSSES,
    "loss.reweight.by": WEIGHTINGS,
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_its_table(name: str) -> None:
    """The message of a wrong one lists all of them and names the nearest."""
    table = list(CHOICES[name])
    (choices,) = re.findall(rf"^\| `skd\.{name}` \| [^|]* \| ([^|]*) \|", OPTIONS_PAGE.read_text(), re.MULTILINE)
    assert choices == ", ".join(f"`{choice}`" for choice in table)
    listed = f"{', '.join(map(repr, table[:-1]))} or {table[-1]!r}"
    for wrong, near in ((f"{table[1]}x", f"; did you mean '{table[1]}'?"), (5, ""), ("qqqqqqq", "")):
        with pytest.raises(RecipeError) as error:
            parse_skd({**TEACHER, **_nested(name, wrong)})
        assert str(error.value) == f"skd.{name}: input should be {listed}; got {wrong!r}{near}"


def _nested(name: str, value: object) -> dict:
    recipe: dict = {}
    set_dotted(recipe, name, value)
    return recipe


def test_what_the_losses_have_and_what_the_recipe_offers_for_them() -> None:
    """Every parameter of a loss is an option, and every setting of a token's loss comes from one."""
    used = {name for loss in LOSSES.values() for name in loss.parameters}
    assert used == set(PARAMETERS) <= set(LossConfig.model_fields)
    assert {field.name for field in fields(LossSettings)} <= set(LossConfig.model_fields)
    settings = LossConfig(kind="jsd", beta=0.25, replaced_kind="cross_entropy", clamp=3, accepted_weight=0.5).settings
    assert settings == LossSettings("jsd", 0.25, 0.1, "cross_entropy", 1.0, 0.5, 1.0, 3.0)


def test_loss_page_has_every_option_and_its_recipe_lines_are_valid() -> None:
    page = (RECIPES.parent / "docs" / "losses.md").read_text()
    for name in (n for n in field_docs() if n.startswith("skd.loss.")):
        assert f"`{name.split('.')[-1]}`" in page or f"`{name}" in page, name
    for kind in LOSSES:
        assert f"kind: {kind}" in page, kind
    for by in WEIGHTINGS.keys() - {"none"}:
        assert f"`skd.loss.reweight.by: {by}`" in page, by
    for name in PARAMETERS:
        assert f"`skd.loss.{name}`" in page, name
    lines = re.findall(r"`(loss: [^`]+)`", page)
    assert len(lines) > 15
    for line in lines:
        parse_skd({"teacher": {"model_name_or_path": "t"}, **yaml.safe_load(line)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "ask_again", "threshold": 0.5}, "gate 'ask_again' has no threshold"),
        ({"gate": "interpolated", "threshold": 0.5, "replacement": "argmax"}, "draws replacements from"),
        ({"gate": "chance", "threshold": {"kind": "linear", "from": 0.5, "to": 1.5}}, "is a probability; got 1.5"),
        ({"method": "on_policy", "write_back": False}, "write_back: false changes a gate, but method 'on_policy'"),
        ({"method": "supervised", "top_k_decay_len": 5}, "top_k_decay_len changes a gate"),
        ({"method": "teacher", "reference_compat": True}, "reference_compat changes a gate"),
        ({"gate": "floor", "threshold": 0.1, "top_k_decay_len": 5}, "is for gate top_k .*, but the gate is 'floor'"),
        ({"gate": "ask_again", "write_back": False}, "leave write_back: false out"),
        (
            {"gate": "floor", "threshold": 0.1, "reference_compat": True},
            "it needs gate: top_k and replacement: sample",
        ),
        ({"reference_compat": True, "replacement": "argmax"}, "it needs gate: top_k and replacement: sample"),
        ({"mix": 0.3}, "mix = 0.3 has no effect: the method is skd"),
        ({"method": "mixed", "stage_share": 0.3}, "stage_share = 0.3 has no effect: the method is mixed"),
        ({"confidence": "margin"}, "confidence = margin has no effect: .*, the gate top_k"),
        ({"method": "on_policy", "top_k": TARGET}, "method 'on_policy' puts no token to a gate"),
        ({"gate": "floor", "threshold": 0.1, "top_k": TARGET}, "gate 'floor' has no K"),
        ({"gate": "confident", "threshold": TARGET, "top_k": TARGET}, "cannot both follow the rate of acceptance"),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_skd({**TEACHER, "rollout": options})


def test_page_of_the_rollout_has_every_option() -> None:
    page = (RECIPES.parent / "docs" / "rollout.md").read_text()
    plain = {"draft_len", "student_temperature", "student_top_p", "teacher_temperature", "teacher_top_p"}
    fields = RolloutConfig.model_fields
    for name in fields.keys() - plain:
        assert f"`{name}" in page, name
    for table in (METHODS, GATE_OPTIONS, CONFIDENCES):
        for name in table:
            assert re.search(rf"^\| `{name}` \|", page, re.MULTILINE), f"{name} has no row"
    for name in ("replacement", "top_k_decay_len", "write_back", "reference_compat"):
        (line,) = set(re.findall(rf"`({name}: \w+)`", page))
        parse_skd({**TEACHER, "rollout": yaml.safe_load(line)})
    moving = re.findall(r"`(\{kind: [^`]+\})`", page)
    assert len(moving) == 3
    for line in moving:
        text = line.replace("from: a, to: b", "from: 9, to: 2")
        parse_skd({**TEACHER, "rollout": {"top_k": yaml.safe_load(text)}})


def test_moving_values_survive_the_run_folder(quickstart) -> None:
    run = quickstart("skd.rollout.top_k={kind: cosine, from: 40, to: 5}")
    run.save()
    assert Run.load(run.folder) == run


def test_sequence_level_distillation_has_one_loss() -> None:
    """It need not be named, and may not be another."""
    for loss in ({}, {"kind": "cross_entropy"}, {"replaced_kind": None, "clamp": 5.0}):
        config = parse_skd({**TEACHER, "rollout": {"method": "seq_kd"}, "loss": loss})
        assert config.loss.kind == "cross_entropy"
        assert SKDConfig(**config.model_dump()) == config
    for name in ("kind", "replaced_kind"):
        with pytest.raises(
            RecipeError, match=f"'seq_kd' learns the teacher's tokens, .*{name} .* use method: teacher"
        ):
            parse_skd({**TEACHER, "rollout": {"method": "seq_kd"}, "loss": {name: "forward_kl"}})


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
    lines = [{"q": "tom has 3 coins .", "a": text} for text in ("3", "4", "", None, 5)]

    def load(count: int, *more: str) -> Run:
        path = write("own.jsonl", "".join(json.dumps(line) + "\n" for line in [*lines[:2], *lines[count : count + 1]]))
        dataset = [f"openrlhf.data.prompt_dataset={path}", "openrlhf.data.input_key=q", "skd.task=null"]
        return quickstart("skd.rollout.method=two_stage", *dataset, *more)

    load(5, "openrlhf.data.label_key=a")
    with pytest.raises(RecipeError, match=r"two_stage needs references: name .* openrlhf\.data\.label_key"):
        load(5)
    for count in (2, 3):
        with pytest.raises(RecipeError, match=r"line 3 has no reference in 'a' \(openrlhf\.data\.label_key\)"):
            load(count, "openrlhf.data.label_key=a")
    with pytest.raises(RecipeError, match=r"line 3: 'a' is 5, but a reference is a text"):
        load(4, "openrlhf.data.label_key=a")
    with pytest.raises(RecipeError, match=r"line 1 has no reference in 'b'"):
        load(5, "openrlhf.data.label_key=b")


def test_teacher_is_required() -> None:
    with pytest.raises(RecipeError, match=r"skd\.teacher: field required$"):
        parse_skd({})


def test_base_recipe_repeats_no_other_default() -> None:
    """What both recipes/base.yaml and the code state must be the same."""
    base = yaml.safe_load((RECIPES / "base.yaml").read_text())
    defaults = {name: default for name, (default, _) in field_docs().items()}
    ours = flatten(base["skd"], "skd.")
    assert ours and {key: defaults[key] for key in ours} == ours
    parser = host_parser()
    assert {key: parser.get_default(key) for key in flatten(base["openrlhf"])} == flatten(base["openrlhf"])


def test_every_option_of_ours_has_a_flag_and_its_default() -> None:
    config = SKDConfig(teacher={"model_name_or_path": "t"}, task={"name": "arithmetic"})
    real = flatten(config.model_dump() | {"vllm": None}, "skd.") | {"skd.vllm": {}}
    docs = field_docs()
    assert set(docs) == set(real)
    required = {"skd.teacher.model_name_or_path", "skd.task.name"}
    assert {k: v for k, (v, _) in docs.items() if k not in required} == {
        k: v for k, v in real.items() if k not in required
    }


# --- the host's options ---


def test_host_section_becomes_its_command_line() -> None:
    section = {
        "train": {"batch_size": 8, "colocate_all": True, "async_enable": False},
        "actor": {"adam": {"betas": [0.8, 0.9]}, "muon": {"nesterov": False}, "dual_clip": None},
    }
    arguments = host_arguments(section, host_parser())
    assert arguments == [
        "--train.batch_size", "8", "--train.colocate_all", "--actor.adam.betas", "0.8", "0.9",
        "--actor.muon.no_nesterov",
    ]  # fmt: skip
    parsed = vars(host_parser().parse_args(arguments))
    assert parsed["train.colocate_all"] is True and parsed["actor.muon.nesterov"] is False


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"batchsize": 8}}, r"openrlhf: unknown key 'train\.batchsize'; did you mean 'train\.batch_size'"),
        ({"train": {"batch_size": "many"}}, r"openrlhf: argument --train\.batch_size: invalid int value: 'many'"),
        ({"actor": {"optim": "sgd"}}, r"openrlhf: argument --actor\.optim: invalid choice: 'sgd'"),
        ({"train": {"colocate_all": "yes"}}, r"openrlhf: 'train\.colocate_all' is a switch; got 'yes'"),
    ],
)
def test_refused_host_value(section: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        host_arguments(section, host_parser())


def test_defaults_of_a_distillation_run_yield_to_the_recipe() -> None:
    host = host_rules.complete({"eval": {"temperature": 0.7}, "ds": {"zero_stage": 3}}, cpu=True)
    assert (host["eval.temperature"], host["ds.zero_stage"], host["vllm.sync_backend"]) == (0.7, 3, "gloo")
    assert "vllm.sync_backend" not in host_rules.complete({}, cpu=False)


def _complete(**changes: object) -> dict:
    return host_defaults() | host_rules.complete({}, cpu=True) | {"data.prompt_dataset": "prompts.jsonl"} | changes


REWARD_FREE = SKDConfig(teacher={"model_name_or_path": "t"})
WRONG = {
    "algo.kl.init_coef": 0.01, "algo.advantage.estimator": "group_norm", "rollout.temperature": 0.7,
    "rollout.top_p": 0.9,
    "ds.ring_attn_size": 2, "ds.tensor_parallel_size": 2, "data.max_images_per_prompt": 1,
}  # fmt: skip


def test_complete_options_pass() -> None:
    host_rules.check(_complete(), REWARD_FREE)


@pytest.mark.parametrize("key", list(host_rules.FIXED))
def test_host_option_that_a_distillation_run_cannot_honour(key: str) -> None:
    value = WRONG.get(key, True)
    allowed, reason = host_rules.FIXED[key]
    with pytest.raises(RecipeError) as caught:
        host_rules.check(_complete(**{key: value}), REWARD_FREE)
    assert str(caught.value) == f"openrlhf.{key} is {value!r}, but must be {allowed!r}: {reason}"


def test_refused_host_option_in_a_recipe(quickstart) -> None:
    with pytest.raises(
        RecipeError, match=r"openrlhf\.rollout\.temperature is 0\.7, .*skd\.rollout\.student_temperature"
    ):
        quickstart("openrlhf.rollout.temperature=0.7")


def test_rollouts_that_do_not_divide_into_training_batches() -> None:
    sizes = {"rollout.batch_size": 6, "rollout.n_samples_per_prompt": 2}
    host_rules.check(_complete(**sizes, **{"train.batch_size": 4}), REWARD_FREE)
    with pytest.raises(RecipeError, match=r"is 12, not a multiple of openrlhf\.train\.batch_size = 8"):
        host_rules.check(_complete(**sizes, **{"train.batch_size": 8}), REWARD_FREE)


def test_steps_are_rollouts_and_not_updates() -> None:
    assert host_rules.planned_steps(prompts=70, batch_size=16, episodes=3) == 12  # 6 prompts are left out each time


def test_prompts_are_required() -> None:
    with pytest.raises(
        RecipeError, match=r"openrlhf\.data\.prompt_dataset is missing: name a dataset, or .* skd\.task"
    ):
        host_rules.check(_complete(**{"data.prompt_dataset": None}), REWARD_FREE)


def test_student_is_required(write) -> None:
    recipe = write("own.yaml", f"skd: {{teacher: {{model_name_or_path: {PAIR / 'teacher'}}}}}")
    with pytest.raises(RecipeError, match=r"openrlhf\.actor\.model_name_or_path is missing: the student"):
        load_models(recipe)


# --- the two models ---


@pytest.fixture
def pair(tmp_path: Path):
    """`pair(teacher={...}, student={...})`: the committed pair with changes in its config.json."""

    def make(**changes: dict) -> dict[str, str]:
        folders = {}
        for role in ("teacher", "student"):
            folder = tmp_path / role
            shutil.copytree(PAIR / role, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | changes.get(role, {})))
            folders[role] = str(folder)
        return folders

    return make


SIZES = dict(top_k=3, loss_top_k=8, max_len=176, draft_len=2)


def test_fitting_pair_gives_the_students_tokenizer(pair) -> None:
    tokenizer = check_pair(**pair(), **SIZES)
    assert tokenizer.decode(tokenizer("tom has 3 coins").input_ids) == "tom has 3 coins"


# --- skd.loss.vocabulary=full ---


def test_full_vocabulary_of_plain_output_heads(quickstart) -> None:
    assert quickstart("skd.loss.vocabulary=full").skd.loss.vocabulary == "full"


@pytest.mark.parametrize(
    ("option", "value"), [("final_logit_softcapping", 30.0), ("logits_scaling", 8.0), ("logit_scale", 0.0625)]
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_logits_that_are_more_than_a_product_are_refused(pair, role: str, option: str, value: float) -> None:
    model = pair(**{role: {option: value}})[role]
    with pytest.raises(RecipeError, match=rf"the {role} .*{option} = {value}.* use skd\.loss\.vocabulary=top_k"):
        check_output_head(model, role)


@pytest.mark.parametrize(("option", "value"), [("final_logit_softcapping", None), ("logits_scaling", 1.0)])
def test_options_that_leave_the_logits_alone_are_accepted(pair, option: str, value: float | None) -> None:
    check_output_head(pair(teacher={option: value})["teacher"], "teacher")


def test_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    from transformers import PhiConfig

    PhiConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
              num_attention_heads=2).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(RecipeError, match=r"the teacher .* has an output head with a bias"):
        check_output_head(str(tmp_path), "teacher")


def test_full_vocabulary_of_a_compiled_model_is_refused(quickstart) -> None:
    quickstart("openrlhf.ds.deepcompile=true")
    with pytest.raises(RecipeError, match=r"deepcompile is on, but .* replaces the forward of the output head"):
        quickstart("openrlhf.ds.deepcompile=true", "skd.loss.vocabulary=full")


# --- two models ---


def test_different_vocabularies_name_tokens() -> None:
    with pytest.raises(
        RecipeError, match=r"2 tokens differ, e\.g\. 'b' \(teacher 1, student 2\), 'c' \(teacher 2, stud"
    ):
        check_vocabularies({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "c": 1})
    with pytest.raises(RecipeError, match=r"1 tokens differ, e\.g\. 'b' \(teacher 1, student -\)"):
        check_vocabularies({"a": 0, "b": 1}, {"a": 0})
    check_vocabularies({"a": 0}, {"a": 0})


def test_pair_with_different_vocabularies(pair) -> None:
    folders = pair()
    path = Path(folders["student"], "tokenizer.json")
    path.write_text(path.read_text().replace('" coins"', '" moins"'))
    with pytest.raises(RecipeError, match=r"different vocabularies: 2 tokens differ, e\.g\. ' coins'"):
        check_pair(**folders, **SIZES)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_padding_rows_may_differ(pair, role: str) -> None:
    """The tokenizers agree, so what one model has more is padding; K is limited by what both have."""
    rows = json.loads((PAIR / "teacher" / "config.json").read_text())["vocab_size"]
    folders = pair(**{role: {"vocab_size": rows + 64}})
    check_pair(**folders, **SIZES | {"top_k": rows, "loss_top_k": rows})
    with pytest.raises(RecipeError, match=f"top_k is {rows + 1}, but the vocabulary has {rows} tokens"):
        check_pair(**folders, **SIZES | {"top_k": rows + 1})
    assert common_vocab_size(**folders) == rows


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_token_without_an_output_row(pair, role: str) -> None:
    with pytest.raises(
        RecipeError, match=f"the tokenizer has the token id .*, but the {role} has 100 output rows only"
    ):
        check_pair(**pair(**{role: {"vocab_size": 100}}), **SIZES | {"top_k": 1, "loss_top_k": 1})


@pytest.mark.parametrize("key", ["top_k", "loss_top_k"])
def test_k_beyond_the_vocabulary(pair, key: str) -> None:
    rows = json.loads((PAIR / "teacher" / "config.json").read_text())["vocab_size"]
    folders = pair()
    check_pair(**folders, **SIZES | {key: rows})
    option = {"top_k": r"skd\.rollout\.top_k", "loss_top_k": r"skd\.loss\.top_k"}[key]
    with pytest.raises(RecipeError, match=f"{option} is {rows + 1}, but the vocabulary has {rows} tokens"):
        check_pair(**folders, **SIZES | {key: rows + 1})


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_context_that_is_too_short(pair, role: str) -> None:
    """176 tokens and two drafts need 181 positions."""
    check_pair(**pair(**{role: {"max_position_embeddings": 181}}), **SIZES)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_context_that_is_one_too_short(pair, role: str) -> None:
    message = rf"data\.max_len = 176 needs a context of 181 .* but the {role} has 180; lower data\.max_len to 175"
    with pytest.raises(RecipeError, match=message):
        check_pair(**pair(**{role: {"max_position_embeddings": 180}}), **SIZES)


def test_model_that_is_not_there(tmp_path: Path) -> None:
    for role, pair in (("teacher", ("/no/such", PAIR / "student")), ("student", (PAIR / "teacher", "/no/such"))):
        with pytest.raises(RecipeError, match=f"the {role} '/no/such' is not there"):
            check_pair(*map(str, pair), **SIZES)
    with pytest.raises(RecipeError, match=r"the teacher .* cannot be loaded"):
        check_pair(str(tmp_path), str(PAIR / "student"), **SIZES)


def test_prompts_that_do_not_fit() -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool):
            assert not add_special_tokens
            return type("Encoding", (), {"input_ids": text.split()})

    check_prompts(["a b", "a b c"], Words(), 3)
    with pytest.raises(RecipeError, match="prompt 2 has 4 tokens, but 2 to 3 fit"):
        check_prompts(["a b", "a b c d"], Words(), 3)
    with pytest.raises(RecipeError, match="prompt 1 has 1 tokens"):
        check_prompts(["a"], Words(), 3)


# --- a whole run ---


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
    with pytest.raises(RecipeError, match=r"p\.jsonl: there are 1 prompts"):
        quickstart("skd.task=null", f"openrlhf.data.prompt_dataset={own}", "openrlhf.data.input_key=q")


def test_run_without_a_task_reads_the_users_prompts(write, quickstart) -> None:
    prompts = write("p.jsonl", '{"q": "tom has 3 coins ."}\n{"q": "ann has 4 apples ."}\n')
    given = ["skd.task=null", f"openrlhf.data.prompt_dataset={prompts}", "openrlhf.data.input_key=q"]
    run = quickstart(*given)
    assert run.host["reward.remote_url"] == host_rules.NO_REWARD
    assert "eval.dataset" not in run.host
    with pytest.raises(RecipeError, match=r"has no column 'x' \(openrlhf\.data\.input_key\); it has q"):
        quickstart(*given, "openrlhf.data.input_key=x")
    with pytest.raises(RecipeError, match="prompt 1 has 5 tokens, but 2 to 4 fit"):
        quickstart(*given, "openrlhf.data.max_len=100")
    with pytest.raises(RecipeError, match=r"openrlhf\.data\.prompt_dataset: there is no file"):
        quickstart(*given, f"openrlhf.data.prompt_dataset={prompts}.jsonl")


def test_prompts_of_a_task_that_do_not_fit(quickstart) -> None:
    with pytest.raises(RecipeError, match=r"prompt 1 has \d+ tokens, but 2 to 4 fit"):
        quickstart("openrlhf.data.max_len=100", "skd.rollout.max_new_tokens=96")


def test_unknown_task(quickstart) -> None:
    with pytest.raises(RecipeError, match=r"skd\.task\.name: unknown key 'arithmetics'; did you mean 'arithmetic'"):
        quickstart("skd.task.name=arithmetics")


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


# --- versions ---


def test_installed_versions_are_supported() -> None:
    versions.check_versions()
    names = {library.name.removesuffix("-cpu") for library in versions.installed_versions()}
    assert names == {"openrlhf", "vllm", "ray", "deepspeed", "transformers", "torch"}


def test_unsupported_version(monkeypatch: pytest.MonkeyPatch, quickstart) -> None:
    monkeypatch.setitem(versions.SUPPORTED, ("openrlhf",), "0.99.")
    with pytest.raises(RecipeError, match=r"openrlhf 0\.11\.2 is installed; .* tested with openrlhf==0\.99\.\* only"):
        quickstart()


def test_missing_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "SUPPORTED", {("no-such-host", "nor-this-one"): "1."})
    with pytest.raises(RecipeError, match=r"no-such-host is not installed; .* pip install 'no-such-host==1\.\*'"):
        versions.check_versions()


# --- command line ---


def test_flags_and_keys_become_overrides() -> None:
    recipe, overrides = cli._recipe_and_overrides(
        ["r.yaml", "skd.loss.kind=reverse_kl", "--skd.rollout.top_k", "7", "--train.batch_size=16",
         "--train.colocate_all", "--actor.adam.betas", "0.5", "0.6", "openrlhf.train.seed=3"]
    )  # fmt: skip
    assert recipe == "r.yaml"
    tree: dict = {}
    for override in overrides:
        key, _, value = override.partition("=")
        set_dotted(tree, key, yaml.safe_load(value))
    assert tree == {
        "skd": {"loss": {"kind": "reverse_kl"}, "rollout": {"top_k": 7}},
        "openrlhf": {
            "train": {"batch_size": 16, "colocate_all": True, "seed": 3},
            "actor": {"adam": {"betas": [0.5, 0.6]}},
        },
    }


def test_no_flag_is_no_override() -> None:
    assert cli._recipe_and_overrides(["r.yaml"]) == ("r.yaml", [])


@pytest.mark.parametrize("argv", [[], ["--train.batch_size", "4"], ["skd.loss.kind=reverse_kl"]])
def test_recipe_comes_first(argv: list[str]) -> None:
    with pytest.raises(RecipeError, match="name the recipe first"):
        cli._recipe_and_overrides(argv)


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--skd.rollout.topk", "--skd.rollout.top_k"), ("--train.batchsize", "--train.batch_size")],
)
def test_unknown_flag_names_the_nearest(flag: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown key '{flag}'; did you mean '{near}'"):
        cli._recipe_and_overrides(["r.yaml", flag, "3"])


TRICKY = [
    pytest.param("--data.input_template", "Q: {}", "data.input_template", id="mapping"),
    pytest.param("--data.input_template", "a=b {}", "data.input_template", id="equals"),
    pytest.param("--data.input_template", "a\nb", "data.input_template", id="newline"),
    pytest.param("--data.input_key", "on", "data.input_key", id="boolean"),
    pytest.param("--data.prompt_dataset", "x" * 60 + " " + "y" * 60, "data.prompt_dataset", id="long"),
]


@pytest.mark.parametrize(("flag", "value", "key"), TRICKY)
def test_text_of_a_host_flag_arrives_unchanged(flag: str, value: str, key: str, write) -> None:
    _, overrides = cli._recipe_and_overrides(["r.yaml", flag, value])
    host = load_recipe(write("own.yaml", ""), overrides)["openrlhf"]
    assert flatten(host) == {key: value}


def test_long_list_of_a_host_flag_arrives_whole() -> None:
    names = [f"a_rather_long_module_name_{i}" for i in range(9)]
    _, overrides = cli._recipe_and_overrides(["r.yaml", "--ds.lora.target_modules", *names])
    assert yaml.safe_load(overrides[0].partition("=")[2]) == names


def test_help_lists_both_kinds_of_options(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--skd.rollout.top_k", "--skd.loss.kind", "--train.batch_size", "--actor.adam.lr"):
        assert option in shown
    assert "(default 25)" in shown


@pytest.mark.parametrize(("argv", "status"), [([], 0), (["--help"], 0), (["trane"], 2), (["trane", "--help"], 2)])
def test_usage(argv: list[str], status: int, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(argv) == status
    assert "skd train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "name the recipe first"),
        (["train", "nothing.yaml"], "there is no recipe at"),
        (["train", str(QUICKSTART), "skd.rollout.topk=3"], "did you mean 'skd.rollout.top_k'"),
        (["train", str(QUICKSTART), "openrlhf.train.batchsize=3"], "did you mean 'train.batch_size'"),
        (["train", str(QUICKSTART), "--train.batch_size", "many"], "invalid int value: 'many'"),
        (["train", str(QUICKSTART), "--trane.batch_size", "4"], "did you mean '--train.batch_size'"),
        (["train", str(QUICKSTART), "skd.rollout.top_k=100000"], "skd.rollout.top_k is 100000, but"),
        (["rollout", str(QUICKSTART), "--prompts", "p", "--out", "o", "--samples", "0"], "--samples is 0"),
        (["rollout", str(QUICKSTART), "--prompts", "nothing.jsonl", "--out", "o"], "there is no file nothing.jsonl"),
    ],
)
def test_wrong_command_line_is_one_line_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err
    assert printed.err.startswith(f"skd {argv[0]}: ") and printed.err.count("\n") == 1, printed.err
    assert not os.listdir(tmp_path), "a refused recipe leaves nothing behind"


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
