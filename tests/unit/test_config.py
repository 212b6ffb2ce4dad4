"""The skd section of a recipe: what is typed, and what is refused with which words; its pages in docs/."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import yaml

from skd_plugin.config.host_options import host_parser
from skd_plugin.config.loss import LossConfig
from skd_plugin.config.recipe import flatten, load_recipe, set_dotted
from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.config.schema import SKDConfig, field_docs, parse_skd
from skd_plugin.core.gates import CONFIDENCES, GATE_OPTIONS
from skd_plugin.core.losses import LOSSES, PARAMETERS, LossSettings, make_token_loss
from skd_plugin.core.methods import METHODS
from skd_plugin.core.prompt_weights import PROMPT_WEIGHTINGS
from skd_plugin.core.token_weights import WEIGHTINGS, make_weigher
from skd_plugin.errors import RecipeError
from tests.recipes import QUICKSTART, RECIPES

OPTIONS_PAGE = RECIPES.parent / "docs" / "options.md"

TEACHER = {"teacher": {"model_name_or_path": "t"}}

TARGET = {"kind": "target_acceptance", "rate": 0.8, "start": 1.0}


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
        ({"student_top_k": 8, "vocabulary": "full"}, "student_top_k = 8 has no effect: .* over all tokens"),
        ({"student_top_k": 8, "kind": "cross_entropy"}, "student_top_k = 8 has no effect"),
        ({"kind": "cross_entropy", "temperature": 2.0}, "temperature = 2.0 has no effect: the loss is cross_entropy"),
        ({"kind": "jsd", "replaced_kind": "cross_entropy", "alpha": 0.2}, "alpha = 0.2 .*is cross_entropy and jsd"),
        ({"accepted_weight": 0, "replaced_weight": 0}, "are both 0: no token would be trained"),
        ({"regions": [{"where": "flat", "kind": "jsd"}]}, "region 'flat' needs a threshold"),
        ({"regions": [{"where": "replaced", "kind": "jsd", "threshold": 1}]}, "region 'replaced' has no threshold"),
        ({"regions": [{"where": "replaced", "kind": "jsd"}], "replaced_kind": "jsd"}, "leave one out"),
        ({"regions": [{"where": "flat", "kind": "jsd", "threshold": 1}], "alpha": 0.3}, "alpha = 0.3 has no effect"),
    ],
)
def test_loss_options_that_do_not_fit_together(loss: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"skd\.loss(\.regions\.0)?: .*{message}"):
        parse_skd({"teacher": {"model_name_or_path": "t"}, "loss": loss})


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "jsd", "beta": 0.1},
        {"kind": "cross_entropy", "replaced_kind": "skew_reverse_kl", "alpha": 0.3, "temperature": 2.0},
        {"kind": "forward_kl", "replaced_kind": "cross_entropy", "accepted_weight": 0, "clamp": 5},
        {"reweight": {"by": "rank", "floor": 0}},
        {"kind": "reverse_kl", "regions": [{"where": "flat", "threshold": 1.0, "kind": "jsd"}], "beta": 0.2},
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
    "loss.prompts.by": PROMPT_WEIGHTINGS,
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
    assert settings == LossSettings("jsd", 0.25, 0.1, "cross_entropy", accepted_weight=0.5, clamp=3.0)


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


def test_teacher_is_required() -> None:
    with pytest.raises(RecipeError, match=r"^skd: the teacher is missing: give skd\.teacher, or several"):
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
    rollout = {"hand_over": {"tokens": 1}}
    teacher, task = (
        {"model_name_or_path": "t", "prompt": {}, "follow": {}},
        {"name": "arithmetic", "teacher_prompt": {}},
    )
    config = SKDConfig(teacher=teacher, task=task, rollout=rollout)
    mappings = ("skd.vllm", "skd.teachers", "skd.teacher.chat_template_kwargs", "skd.student.chat_template_kwargs")
    real = flatten(config.model_dump(), "skd.") | {name: {} for name in mappings}
    docs = field_docs()
    assert set(docs) == set(real)
    required = {"skd.teacher.model_name_or_path", "skd.task.name", "skd.rollout.hand_over.tokens"}
    assert {k: v for k, (v, _) in docs.items() if k not in required} == {
        k: v for k, v in real.items() if k not in required
    }
