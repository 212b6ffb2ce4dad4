"""The start-up check: what engines and policy actors say of themselves is what the recipe asks for."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skd_plugin.config.schema import SKDConfig
from skd_plugin.core.clock import Clock
from skd_plugin.run_folder import RunFolder

SKD = SKDConfig(teacher={"model_name_or_path": "teacher"}, loss={"temperature": 2.0, "teacher_top_k": 8})
ENGINE = {"sampler": "SKDSampler", "drafter": "SKDDrafter", "loss_temperature": 2.0}
ENGINE |= {"teacher_top_k": 8, "student_top_k": 0, "end_ids": [2, 7], "teacher_place": 0}
POLICY = {"trainer": "SKDActorTrainer", "loss": "Objective", "batches": "OptimizerStepBatches", "end_ids": [2, 7]}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch):
    """`check(engines, policies)` of a controller whose actors answer so."""
    from skd_plugin.host import on_cpu

    on_cpu.install()
    from skd_plugin.host import controller, training_side

    monkeypatch.setattr(training_side.ray, "get", lambda answers: answers)
    monkeypatch.setattr(training_side, "end_ids_of", lambda args: (2, 7))  # by the files of the models

    def run(engines: list[dict], policies: list[dict]) -> None:
        trainer = object.__new__(controller.SKDTrainer)
        trainer.skd, trainer.args = SKD, None
        trainer.vllm_engines = [
            SimpleNamespace(describe_skd=SimpleNamespace(remote=lambda said=said: said)) for said in engines
        ]
        trainer.actor_model_group = SimpleNamespace(async_run_method=lambda name: policies)
        trainer.check_parts()

    return run


def test_parts_in_place(check, capsys: pytest.CaptureFixture[str]) -> None:
    check([ENGINE, ENGINE], [POLICY])
    assert "SKD is active" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("sampler", "RejectionSampler"),
        ("drafter", None),
        ("loss_temperature", 1.0),
        ("teacher_top_k", 64),
        ("student_top_k", 4),
        ("end_ids", []),
        ("teacher_place", 1),
    ],
)
def test_an_engine_with_another_part_stops_the_run(check, part: str, found) -> None:
    said = re.escape(f"the {part} of one engine actor is {found}, expected {ENGINE[part]}")
    with pytest.raises(RuntimeError, match=said):
        check([ENGINE, {**ENGINE, part: found}], [POLICY])


@pytest.mark.parametrize("part", list(POLICY))
def test_a_policy_actor_with_another_part_stops_the_run(check, part: str) -> None:
    said = re.escape(f"the {part} of one policy actor is Host, expected {POLICY[part]}")
    with pytest.raises(RuntimeError, match=said):
        check([ENGINE], [POLICY, {**POLICY, part: "Host"}])


def test_a_run_that_ends_without_a_step_has_failed(check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where dynamic filtering leaves nothing."""
    from skd_plugin.host import controller

    trainer = object.__new__(controller.SKDTrainer)
    trainer.skd, trainer.folder, trainer.planned_steps = SKD, RunFolder(tmp_path), 3
    trainer.samples_generator = SimpleNamespace(step=0, resume=lambda step, state: None)
    nothing = dict.fromkeys(("measure_before_training", "measure_after_training"), lambda *args: {})
    trainer._held_out = SimpleNamespace(**nothing)
    closed: list[str] = []
    trainer._loggers, trainer._closings = [], [lambda: closed.append("logger")]
    trainer.check_parts, trainer.clock = lambda: None, Clock()
    trainer.init_checkpoint_states = lambda: {"global_step": 0}
    trainer.actor_model_group = SimpleNamespace(async_run_method=lambda *args: [])

    def fit(done: int) -> None:
        def run(self, global_step: int) -> None:
            self.samples_generator.step = done

        monkeypatch.setattr(controller.HostTrainer, "fit", run)
        trainer.fit()

    with pytest.raises(RuntimeError, match=r"without a training step: .*dynamic_filtering_range"):
        fit(0)
    fit(1)
    assert RunFolder(tmp_path).status.read()["stage"] == "saving" and closed == ["logger"]


def test_loggers_stay_open_until_the_last_evaluation_is_logged(check) -> None:
    from skd_plugin.host import training_side

    told: list[Any] = []
    logger = SimpleNamespace(
        close=lambda: told.append("closed"), log_eval=lambda step, metrics: told.append((step, metrics))
    )
    side = training_side.TrainingSide()
    side.wandb_logger, side.tensorboard_logger = None, logger
    side.hold_loggers()
    logger.close()  # at the end of OpenRLHF's fit
    side.end(3, {"eval/x/kl": 0.5})
    assert told == [(3, {"x/kl": 0.5}), "closed"]


def test_the_parts_of_a_step_add_up_to_it(check) -> None:
    """As OpenRLHF's trainer calls: the actors and the engines say what they have measured while it waited for them."""
    from skd_plugin.host import training_side

    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    class Host:
        def train_step(self, samples: list, step: int) -> tuple[dict, int]:
            spend(1)  # batches, and their way to the actors
            status = self.ppo_train(step)
            self.broadcast_to_vllm()
            return status, step + 1

        def ppo_train(self, step: int) -> dict:
            spend(10)
            measured = {"forward": 3.0, "backward": 4.0, "optimizer": 1.0, "batches": 0.5, "traces": 0.25}
            return {"skd_loss": 0.5, training_side.SECONDS: measured}

        def broadcast_to_vllm(self) -> None:
            spend(2)

        def save_logs_and_checkpoints(self, step: int, status: dict, states: dict) -> None:
            spend(32)

    class Trainer(training_side.TrainingSide, Host):
        pass

    trainer = Trainer()
    trainer.clock, trainer.skd, trainer._uncompared = Clock(lambda: now[0]), SKD, []
    trainer.sampled = SimpleNamespace(metrics={}, tokens=8, rule_state={})
    trainer._begin_step = lambda step: SKD.objective.coefficients(0.0)
    written: list[dict[str, Any]] = []
    trainer.folder = SimpleNamespace(metrics=SimpleNamespace(append=written.append))
    trainer.args = SimpleNamespace()
    for step in range(2):
        with trainer.clock.part("evaluation"):
            spend(100)
        with trainer.clock.part("requests"):
            spend(20)
        trainer.clock.split("requests", {"draft": 6.0, "verify": 9.0, "traces": 0.5})  # which is no training
        status, _ = trainer.train_step([], step)
        trainer.save_logs_and_checkpoints(step + 1, status)
    first, second = ({n.removeprefix("time/"): v for n, v in r.items() if n.startswith("time/")} for r in written)
    assert first == {
        **{"step": 33, "train": 13, "rollout": 0, "rest": 0},
        **{"requests": 4.5, "draft": 6, "verify": 9, "experience": 0.75, "traces": 0.75, "sync": 2},
        **{"forward": 3, "backward": 4, "optimizer": 1, "batches": 0.5, "ray": 1.5},
    }
    assert second == first | {"save": 32, "step": 65}
    assert written[1]["tokens_per_s"] == 8 / 65
