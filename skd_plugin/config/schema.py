"""The `skd:` section of a recipe. Every default of the plugin is here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _refuse_idle(section: Section, effects: dict[str, bool], because: str) -> None:
    """Raises ValueError for an option that is set to another value than its default, and would do nothing."""
    for name, has_effect in effects.items():
        value = getattr(section, name)
        if not has_effect and value != type(section).model_fields[name].default:
            raise ValueError(f"{name} = {value} has no effect: {because}")


class TeacherConfig(Section):
    model_name_or_path: str = Field(description="the teacher: a folder or a Hugging Face name")


class RolloutConfig(Section):
    method: Literal["skd", "on_policy", "teacher"] = Field(
        "skd", description="skd: the top-K gate; on_policy: every student token is kept; teacher: none is"
    )
    top_k: int = Field(25, ge=1, description="K: a student token among the teacher's K most probable ones is kept")
    gate: Literal["top_k", "top_p", "floor", "typical", "confident", "chance", "interpolated"] = Field(
        "top_k", description="which proposals are kept; laws and sources in core/gates.py"
    )
    threshold: float | None = Field(None, ge=0, description="of the gate; every gate but top_k needs one")
    draft_len: int = Field(5, ge=1, le=32, description="tokens the student proposes before the teacher looks (gamma)")
    student_temperature: float = Field(1.0, ge=0)
    student_top_p: float = Field(1.0, gt=0, le=1)
    teacher_temperature: float = Field(1.0, ge=0, description="of the replacement tokens")
    teacher_top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int | None = Field(None, ge=1, description="longest response; default: what max_len leaves")
    seed: int = 0

    @model_validator(mode="after")
    def _threshold_belongs_to_the_gate(self) -> RolloutConfig:
        if (self.threshold is None) != (self.gate == "top_k"):
            need = "needs a" if self.threshold is None else "has no"
            raise ValueError(f"gate '{self.gate}' {need} threshold (skd.rollout.threshold)")
        if self.gate in ("chance", "interpolated") and self.threshold > 1:
            raise ValueError(f"the threshold of gate '{self.gate}' is a probability; got {self.threshold}")
        return self


class ReweightConfig(Section):
    by: Literal["none", "confidence", "divergence", "rank"] = Field(
        "none", description="which tokens count more; laws in core/weights.py"
    )
    floor: float = Field(0.1, ge=0, lt=1, description="least weight of a token relative to the most")

    @model_validator(mode="after")
    def _floor_has_an_effect(self) -> ReweightConfig:
        _refuse_idle(self, {"floor": self.by != "none"}, "by is none")
        return self


LossKind = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
    "cross_entropy",
]


class LossConfig(Section):
    kind: LossKind = Field(
        "forward_kl", description="divergence of the student from the teacher, or cross_entropy of the emitted token"
    )
    replaced_kind: LossKind | None = Field(None, description="the same, for replaced tokens; default: kind")
    beta: float = Field(0.5, gt=0, lt=1, description="of jsd: the teacher's share of the mixture")
    alpha: float = Field(0.1, ge=0, lt=1, description="of the skew divergences: share of the first distribution")
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="tau of both models in a divergence; cross_entropy has none"
    )
    top_k: int = Field(64, ge=1, description="teacher entries kept a token; all others are one tail category")
    accepted_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of tokens that the gate kept")
    replaced_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of tokens that it replaced")
    clamp: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="upper limit of a token's loss; no gradient above it"
    )
    reweight: ReweightConfig = ReweightConfig()

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> LossConfig:
        kinds = {self.kind, self.replaced_kind or self.kind}
        effects = {
            "beta": "jsd" in kinds,
            "alpha": bool(kinds & {"skew_forward_kl", "skew_reverse_kl"}),
            "temperature": kinds != {"cross_entropy"},
        }
        _refuse_idle(self, effects, f"the loss is {' and '.join(sorted(kinds))}")
        if self.accepted_weight == self.replaced_weight == 0:
            raise ValueError("accepted_weight and replaced_weight are both 0: no token would be trained")
        return self

    def token_loss_arguments(self) -> dict[str, Any]:
        """Of core.losses.make_token_loss."""
        return self.model_dump(exclude={"top_k", "reweight"})


class ObjectiveConfig(Section):
    kd_coef: float = Field(1.0, ge=0, description="weight of the distillation loss")
    rl_coef: float = Field(0.0, ge=0, description="weight of the host's policy loss; above 0 rewards are used")
    replaced_tokens: Literal["exclude", "importance"] = Field(
        "exclude",
        description="the teacher's tokens in the policy loss: left out, or weighted by q/p within the host's clip",
    )
    teacher_advantage: float = Field(
        0.0, ge=0, description="c: adds c (log p - log q) to the advantage of each of the student's tokens"
    )
    reward_timeout_s: float = Field(300.0, gt=0, description="a reward that takes longer ends the run; seconds")

    @property
    def uses_rewards(self) -> bool:
        return self.rl_coef > 0


class TaskConfig(Section):
    name: str = Field(description="a task of skd_plugin.tasks; it makes the prompts and checks the answers")
    train_prompts: int = Field(8192, ge=1)
    eval_prompts: int = Field(128, ge=1)
    seed: int = 0


class EvalConfig(Section):
    teacher: bool = Field(True, description="measure the teacher once, before training")
    at_start: bool = Field(True, description="evaluate the student before the first step")


class SKDConfig(Section):
    teacher: TeacherConfig
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    task: TaskConfig | None = None
    eval: EvalConfig = EvalConfig()
    run_dir: str = Field("runs/skd", description="everything a run leaves behind is in this folder")
    resume: bool = Field(True, description="go on with an unfinished run of the same recipe in the run folder")
    traces_per_step: int = Field(4, ge=0, description="responses of each step that go into traces.jsonl")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where this machine has it")
    vllm: dict[str, Any] = Field({}, description="further engine arguments of vLLM, as its EngineArgs names them")


def field_docs(section: type[BaseModel] = SKDConfig, prefix: str = "skd") -> dict[str, tuple[Any, str]]:
    """Dotted name -> (default or None, description) of every option, for `--help` and the flag parser."""
    docs: dict[str, tuple[Any, str]] = {}
    for name, info in section.model_fields.items():
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        nested = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if nested is not None:
            docs |= field_docs(nested, f"{prefix}.{name}")
        else:
            default = None if info.is_required() else info.default
            docs[f"{prefix}.{name}"] = default, info.description or ""
    return docs
