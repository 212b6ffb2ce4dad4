"""From the recipe to the rule of a step: methods, schedules, controllers, and what a checkpoint has to hold."""

from __future__ import annotations

from typing import Any

import pytest

from skd_plugin.config.rollout import RolloutConfig
from skd_plugin.core.gates import CONFIDENCES, GATES
from skd_plugin.core.methods import METHODS
from skd_plugin.core.sampling import KEEP_ALL
from skd_plugin.engine.sampling_rule import RulePlan, SamplingRule

CONTROLLER = {"kind": "target_acceptance", "rate": 0.8, "start": 10}


def rule(progress: float = 0.0, **options: Any) -> SamplingRule:
    return SamplingRule.of(RolloutConfig(**options), progress)


def test_every_gate_is_chosen_by_options_of_a_recipe() -> None:
    for name, gate in GATES.items():
        options: dict[str, Any] = {"gate": name}
        if gate.confidence is not None:
            options = {"gate": "confident", "confidence": gate.confidence}
        if name == "top_k_of_nucleus":
            options = {"reference_compat": True}
        threshold = {} if gate.threshold is None else {"threshold": 0.5}
        made = rule(**options, **threshold)
        assert made.settings.gate == name
        assert made.settings.threshold == (0.5 if threshold else 0.0)
        assert made.settings.top_k == (25 if gate.has_top_k else 0)


@pytest.mark.parametrize(
    ("method", "top_k", "share"),
    [
        ("skd", 7, 0.0),
        ("on_policy", KEEP_ALL, 0.0),
        ("teacher", 0, 0.0),
        ("seq_kd", 0, 0.0),
        ("supervised", KEEP_ALL, 1.0),
        ("mixed", KEEP_ALL, 0.75),
        ("mixed_skd", 7, 0.75),
    ],
)
def test_methods(method: str, top_k: int, share: float) -> None:
    made = rule(method=method, top_k=7, **({"mix": 0.25} if "mixed" in method else {}))
    assert (made.settings.top_k, made.reference_share, made.settings.gate) == (top_k, share, "top_k")


def test_two_stages() -> None:
    shares = [rule(t, method="two_stage", stage_share=0.25).reference_share for t in (0, 0.24, 0.25, 1)]
    assert shares == [1.0, 1.0, 0.0, 0.0]
    assert rule(0.0, method="two_stage", stage_share=0.0).reference_share == 0.0


def test_a_method_without_a_gate_ignores_the_gate() -> None:
    made = rule(method="on_policy", gate="floor", threshold=0.5)
    assert (made.settings.gate, made.settings.top_k, made.settings.threshold) == ("top_k", KEEP_ALL, 0.0)


def test_only_gates_with_a_k_have_one() -> None:
    assert rule(gate="floor", threshold=0.3).settings.top_k == 0
    assert rule(gate="confident", threshold=0.3).settings.top_k == 25
    assert rule(gate="ask_again").settings.top_k == 25


@pytest.mark.parametrize(("confidence", "gate"), CONFIDENCES.items())
def test_confidence_chooses_the_gate(confidence: str, gate: str) -> None:
    assert rule(gate="confident", threshold=0.3, confidence=confidence).settings.gate == gate


def test_argmax_is_the_teacher_at_temperature_zero() -> None:
    assert rule(replacement="argmax", teacher_temperature=0.7).settings.teacher_temperature == 0.0
    assert rule(teacher_temperature=0.7).settings.teacher_temperature == 0.7


def test_compatibility_has_one_temperature() -> None:
    made = rule(
        reference_compat=True, student_temperature=0.5, student_top_p=0.9, teacher_temperature=0.2, teacher_top_p=0.5
    )
    assert (made.settings.student_temperature, made.settings.student_top_p) == (0.2, 0.5)
    assert made.settings.gate == "top_k_of_nucleus" and made.settings.top_k == 25


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_use_no_reference_and_no_gate(method: str) -> None:
    made = rule(method=method)
    student, teacher = made.student_only(0.0), made.teacher_only(0.0)
    assert (student.reference_share, teacher.reference_share) == (0.0, 0.0)
    for made, top_k in ((student, KEEP_ALL), (teacher, 0)):
        settings = made.settings
        assert (settings.top_k, settings.gate, settings.write_back, settings.top_k_decay_len) == (
            top_k, "top_k", True, 0,
        )  # fmt: skip


def test_schedules_of_k_and_threshold() -> None:
    moving = {"kind": "linear", "from": 50, "to": 2, "hold": 0.0}
    assert [rule(t, top_k=moving).settings.top_k for t in (0, 0.5, 0.51, 1)] == [50, 26, 26, 2]
    floor = {"kind": "cosine", "from": 0.5, "to": 0.25}
    assert rule(0.1, gate="floor", threshold=floor).settings.threshold == 0.5
    assert rule(1.0, gate="floor", threshold=floor).settings.threshold == 0.25


def test_plan_of_a_schedule_is_a_function_of_the_step() -> None:
    rollout = RolloutConfig(top_k={"kind": "linear", "from": 100, "to": 1})
    whole, resumed = (RulePlan(rollout, 40, 1000, longest=512) for _ in range(2))
    assert whole.state_dict() == {}
    assert [whole.at(step) for step in range(41)][17:] == [resumed.at(step) for step in range(17, 41)]
    assert whole.at(0).settings.top_k == 100 and whole.at(40).settings.top_k == whole.at(60).settings.top_k == 1


def test_plan_of_a_controller_goes_on_from_its_state() -> None:
    rollout = RolloutConfig(top_k=CONTROLLER)
    measured = [0.3, 0.6, 0.9, 0.2, 0.5]
    whole = RulePlan(rollout, 5, 1000, longest=512)
    for rate in measured:
        whole.observe(rate)
    first, second = RulePlan(rollout, 5, 1000, longest=512), RulePlan(rollout, 5, 1000, longest=512)
    for rate in measured[:2]:
        first.observe(rate)
    second.load_state_dict(first.state_dict())
    for rate in measured[2:]:
        second.observe(rate)
    assert second.state_dict() == whole.state_dict() and second.at(5) == whole.at(5)
    assert whole.at(0).settings.top_k > 10


@pytest.mark.parametrize(
    ("options", "rises"),
    [
        ({"top_k": CONTROLLER}, True),
        ({"gate": "top_p", "threshold": CONTROLLER | {"start": 0.5}}, True),
        ({"gate": "floor", "threshold": CONTROLLER | {"start": 0.5}}, False),
        ({"gate": "confident", "confidence": "entropy", "threshold": CONTROLLER | {"start": 0.5}}, True),
        ({"gate": "confident", "confidence": "margin", "threshold": CONTROLLER | {"start": 0.5}}, False),
        ({"gate": "chance", "threshold": CONTROLLER | {"start": 0.5}}, False),
        ({"horizon": CONTROLLER}, False),
    ],
)
def test_too_little_acceptance_loosens_the_gate(options: dict, rises: bool) -> None:
    plan = RulePlan(RolloutConfig(**options), 10, 100, longest=512)
    (before,) = plan.state_dict().values()
    plan.observe(0.1)
    (after,) = plan.state_dict().values()
    assert (after > before) == rises and after != before


def test_state_of_another_recipe_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"holds controlled values of \['threshold'\], but this recipe controls \['top_k'\]"
    ):
        RulePlan(RolloutConfig(top_k=CONTROLLER), 10, 100, longest=512).load_state_dict({"threshold": 0.5})


def test_horizon_grows_to_the_limit_where_the_text_is_the_students() -> None:
    plan = RulePlan(RolloutConfig(horizon=CONTROLLER | {"rate": 0.5, "start": 16}), 10, 100, longest=64)
    found = [plan.at(0).horizon]
    for accepted in (0.9, 0.9, 0.2, 1.0, 1.0, 1.0, 1.0):
        plan.observe(accepted)
        found.append(plan.at(1).horizon)
    assert found[0] == 16 < found[1] == 24 < found[2] == 36 > found[3] and found[-1] == 64
    assert plan.state_dict() == {"horizon": 64.0}


def test_horizon_is_of_training_alone() -> None:
    moving = {"kind": "linear", "from": 10, "to": 110, "hold": 0}
    assert [rule(t, method="on_policy", horizon=moving).horizon for t in (0, 0.5, 1)] == [10, 60, 110]
    cut = rule(horizon=moving)
    assert cut.limit(50) == 10 and cut.limit(5) == 5 and cut.with_top_k(3).limit(50) == 10
    assert rule().limit(50) == cut.student_only(0.0).limit(50) == cut.teacher_only(0.0).limit(50) == 50
    assert cut.metrics() == {"skd/top_k": 25.0, "skd/horizon": 10.0}


def test_metrics_are_those_that_may_move() -> None:
    assert rule(top_k=7).metrics() == {"skd/top_k": 7.0}
    assert rule(gate="floor", threshold=0.25).metrics() == {"skd/threshold": 0.25}
    assert rule(gate="confident", threshold=0.25).metrics() == {"skd/top_k": 25.0, "skd/threshold": 0.25}
    assert rule(method="on_policy").metrics() == {} == rule(method="teacher").metrics()
