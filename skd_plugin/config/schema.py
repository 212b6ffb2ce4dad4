"""The `skd:` section of a recipe. Every default of the plugin is here."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from skd_plugin.config.movable import VALUE_FORMS, Movable, Scheduled, TargetAcceptanceConfig, extremes, value_at
from skd_plugin.config.section import Section, one_of, refuse_idle
from skd_plugin.core.gates import CONFIDENCES, CONFIDENT, GATE_OPTIONS, GATES, RELEASED, Gate, gate_of_option
from skd_plugin.core.losses import LOSSES, PARAMETERS, LossSettings, RegionSettings
from skd_plugin.core.methods import METHODS
from skd_plugin.core.prompt_weights import PROMPT_WEIGHTINGS
from skd_plugin.core.sampling import KEEP_ALL
from skd_plugin.core.targets import REGIONS
from skd_plugin.core.token_weights import WEIGHTINGS
from skd_plugin.errors import RecipeError, unknown_key


class TeacherPromptConfig(Section):
    """What the teacher reads in place of the student's prompt (host/teacher_prompts.py)."""

    system: str | None = Field(
        None,
        description="system message before the prompt, in place of one that is there; without a chat template text",
    )
    template: str | None = Field(
        None,
        description="the user's turn, with columns of the row in braces, of a task {input}, {reference} and {answer}; "
        "default: the student's",
    )
    column: str | None = Field(None, description="a column with the user's turn or a list of messages, in its place")
    examples: str | None = Field(
        None, description='a .json or .jsonl file of turns before the prompt, each {"input": ..., "output": ...}'
    )
    max_len: int | None = Field(
        None, ge=2, description="tokens of the longest one; default: as of the student's, what data.max_len leaves"
    )

    @field_validator("examples")
    @classmethod
    def _wherever_it_is_read(cls, path: str | None) -> str | None:
        return None if path is None else str(Path(path).resolve())

    @model_validator(mode="after")
    def _one_maker(self) -> TeacherPromptConfig:
        if self.template is not None and self.column is not None:
            raise ValueError("template and column both make the teacher's prompt; leave one of them out")
        return self


class StudentConfig(Section):
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="switches of the chat template, e.g. {enable_thinking: false}; the teacher has its own"
    )


class FollowConfig(Section):
    """A teacher that moves: every `every` steps, teacher <- ema x teacher + (1 - ema) x student."""

    ema: float = Field(0.0, ge=0, lt=1, description="how much of it stays; 0: it becomes the student of that step")
    every: int = Field(1, ge=1, description="steps between two moves")


class TeacherConfig(Section):
    model_name_or_path: str = Field(description="the teacher: a folder or a Hugging Face name")
    prompt: TeacherPromptConfig | None = Field(
        None, description="a prompt of the teacher's own, by its own chat template; default: it reads the student's"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="switches of the teacher's chat template, which then makes a prompt of its own"
    )
    own_thinking: bool = Field(
        False, description="prompts may end inside a thinking block of one of the two models only"
    )
    follow: FollowConfig | None = Field(
        None,
        description="the teacher moves with the student, whose model it is at the start: {ema: 0.99} a running mean "
        "of its weights, {every: 50} what it was up to 50 steps ago",
    )
    compare: bool = Field(
        True,
        description="the first responses are read by transformers' teacher too, on the controller's CPU, and a run "
        "whose engine has another one ends; seconds, for a teacher of 70 B minutes and its weights in memory",
    )


GATED = [name for name, method in METHODS.items() if method.has_gate]
DECAYING = [name for name in GATE_OPTIONS if GATES[name].decays]
WITHOUT_THRESHOLD = [name for name in GATE_OPTIONS if GATES[name].threshold is None]


def _explained(words: dict[str, str]) -> str:
    return "; ".join(f"{name}: {about}" for name, about in words.items())


def _methods_with(option: str) -> str:
    return ", ".join(name for name, method in METHODS.items() if method.option == option)


class HandOverConfig(Section):
    """Legs of the teacher (core/hand_over.py)."""

    tokens: int = Field(ge=1, description="that the teacher writes, the replacing one among them")
    most: int | None = Field(
        2, ge=1, description="legs of a response; after them the student's proposals stay. null: any number"
    )
    until_entropy: float | None = Field(
        None, ge=0, description="nats: a leg ends early where the teacher's entropy is this or less"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of core.sampling.SamplingSettings."""
        return {
            "hand_over_len": self.tokens,
            "hand_overs": KEEP_ALL if self.most is None else self.most,
            "hand_over_until": -1.0 if self.until_entropy is None else self.until_entropy,
        }


class RolloutConfig(Section):
    method: Annotated[str, one_of(METHODS)] = Field(
        "skd",
        description="where the text is from. " + _explained({name: m.about for name, m in METHODS.items()}),
    )
    mix: float = Field(
        0.5, ge=0, le=1, description=f"of {_methods_with('mix')}: share of the prompts that are sampled"
    )
    stage_share: float = Field(
        0.5, ge=0, le=1, description=f"of {_methods_with('stage_share')}: share of training spent on references"
    )
    top_k: Movable[Annotated[int, Field(ge=1)]] = Field(
        25, description="K: a student token among the teacher's K most probable ones is kept"
    )
    gate: Annotated[str, one_of(GATE_OPTIONS)] = Field(
        "top_k",
        description="which proposals are kept. "
        + _explained({n: GATES[n].words.format(top_k="K", threshold="threshold") for n in GATE_OPTIONS}),
    )
    threshold: Movable[Annotated[float, Field(ge=0)]] | None = Field(
        None, description=f"of the gate; every gate but {' and '.join(WITHOUT_THRESHOLD)} needs one"
    )
    confidence: Annotated[str, one_of(CONFIDENCES)] = Field(
        "probability", description="of gate confident: what the student's confidence is measured by"
    )
    replacement: Literal["sample", "argmax"] = Field(
        "sample", description="the teacher's token in place of a rejected one: sampled, or its most probable"
    )
    write_back: bool = Field(True, description="false: rejected tokens stay in the text and are only flagged")
    hand_over: HandOverConfig | None = Field(
        None, description="where the gate rejects, the teacher writes on before the student takes over again"
    )
    top_k_decay_len: int | None = Field(None, ge=1, description="response tokens over which K falls to 1")
    reference_compat: bool = Field(False, description="rank and temperatures as in SKD's released code")
    draft_len: int = Field(5, ge=1, le=32, description="tokens the student proposes before the teacher looks (gamma)")
    student_temperature: float = Field(1.0, ge=0, description="of the proposals; 0 is greedy")
    student_top_p: float = Field(1.0, gt=0, le=1, description="of the proposals: nucleus")
    teacher_temperature: float = Field(1.0, ge=0, description="of the replacement tokens")
    teacher_top_p: float = Field(1.0, gt=0, le=1, description="of the replacement tokens: nucleus")
    max_new_tokens: int | None = Field(None, ge=1, description="longest response; default: what max_len leaves")
    horizon: Movable[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="tokens at which responses are cut in training, below max_new_tokens; evaluations are not. With "
        "target_acceptance it grows where more is accepted",
    )
    seed: int = Field(0, description="same seed, same prompt: same tokens, whatever else is in the batch")

    @property
    def needs_references(self) -> bool:
        return METHODS[self.method].needs_references

    @property
    def gate_name(self) -> str:
        """The gate that proposals are put to, a name of core.gates.GATES."""
        return RELEASED if self.reference_compat else gate_of_option(self.gate, self.confidence)

    @property
    def has_top_k(self) -> bool:
        """Whether any token is put to the teacher's K most probable ones."""
        return METHODS[self.method].has_gate and GATES[self.gate_name].has_top_k

    @property
    def _named_gate(self) -> Gate:
        """The gate of the options `gate` and `confidence`, whatever reference_compat makes of it."""
        return GATES[gate_of_option(self.gate, self.confidence)]

    @property
    def notice(self) -> str | None:
        """What a person is told once, at the start."""
        if not self.reference_compat:
            return None
        return (
            "skd.rollout.reference_compat: as in SKD's released code, the rank is taken after the teacher's "
            "temperature and top-p, and the student drafts with them too; student_temperature and student_top_p are "
            "not used"
        )

    @model_validator(mode="after")
    def _threshold_belongs_to_the_gate(self) -> RolloutConfig:
        known = self._named_gate.threshold
        if (self.threshold is None) != (known is None):
            need = "needs a" if self.threshold is None else "has no"
            raise ValueError(f"gate '{self.gate}' {need} threshold (skd.rollout.threshold)")
        highest = max(extremes(self.threshold)) if self.threshold is not None else 0.0
        if known is not None and known.is_probability and highest > 1:
            raise ValueError(f"the threshold of gate '{self.gate}' is a probability; got {highest:g}")
        return self

    @model_validator(mode="after")
    def _values_that_move(self) -> RolloutConfig:
        if min(extremes(self.top_k)) < 1:
            raise ValueError(f"top_k is at least 1, and one end of its schedule is {min(extremes(self.top_k)):g}")
        if self.horizon is not None and min(extremes(self.horizon)) < 1:
            raise ValueError(f"horizon is at least 1, and one end of its schedule is {min(extremes(self.horizon)):g}")
        movable = ("top_k", "threshold", "horizon")
        moving = [n for n in movable if isinstance(getattr(self, n), TargetAcceptanceConfig)]
        if moving and not METHODS[self.method].has_gate:
            raise ValueError(
                f"{moving[0]} follows the rate of acceptance, but method '{self.method}' puts no token to a gate"
            )
        if len(moving) > 1:
            raise ValueError(f"{' and '.join(moving)} cannot both follow the rate of acceptance: fix one of them")
        if moving == ["top_k"] and not self.has_top_k:
            raise ValueError(f"top_k follows the rate of acceptance, but gate '{self.gate}' has no K")
        return self

    @model_validator(mode="after")
    def _options_of_other_methods(self) -> RolloutConfig:
        method = METHODS[self.method]
        effects = {option: method.option == option for option in ("mix", "stage_share")}
        effects["confidence"] = self.gate == CONFIDENT
        refuse_idle(self, effects, f"the method is {self.method}, the gate {self.gate}")
        return self

    @model_validator(mode="after")
    def _options_that_need_a_gate(self) -> RolloutConfig:
        needs = {
            "write_back: false": not self.write_back,
            "top_k_decay_len": self.top_k_decay_len is not None,
            "hand_over": self.hand_over is not None,
            "reference_compat": self.reference_compat,
        }
        for name, given in needs.items():
            if given and not METHODS[self.method].has_gate:
                raise ValueError(
                    f"{name} changes a gate, but method '{self.method}' has none; use method {' or '.join(GATED)}"
                )
        gate = self._named_gate
        if self.top_k_decay_len is not None and not gate.decays:
            raise ValueError(f"top_k_decay_len is for gate {' or '.join(DECAYING)}, but the gate is '{self.gate}'")
        if not self.write_back and not gate.can_flag:
            raise ValueError(
                f"gate '{self.gate}' writes the student's second answer back; leave write_back: false out"
            )
        if self.hand_over is not None and not self.write_back:
            raise ValueError("hand_over lets the teacher write on, and write_back: false lets it write nothing")
        if self.replacement == "argmax" and not gate.replaces_from_teacher:
            raise ValueError(
                f"gate '{self.gate}' draws replacements from {gate.replaced_from}, without which the next token's "
                "distribution would be another; use replacement: sample"
            )
        if self.reference_compat and (self.gate != "top_k" or self.replacement != "sample"):
            raise ValueError("reference_compat is the released gate: it needs gate: top_k and replacement: sample")
        return self


class ReweightConfig(Section):
    by: Annotated[str, one_of(WEIGHTINGS)] = Field(
        "none",
        description="which tokens count more. " + _explained({name: w.words for name, w in WEIGHTINGS.items()}),
    )
    floor: float = Field(0.1, ge=0, lt=1, description="least weight of a token relative to the most")

    @model_validator(mode="after")
    def _floor_has_an_effect(self) -> ReweightConfig:
        refuse_idle(self, {"floor": self.by != "none"}, "by is none")
        return self


class PromptWeightConfig(Section):
    by: Annotated[str, one_of(PROMPT_WEIGHTINGS)] = Field(
        "none",
        description="which prompts count more, by what their responses have shown. "
        + _explained({name: w.words for name, w in PROMPT_WEIGHTINGS.items()}),
    )
    floor: float = Field(0.1, ge=0, lt=1, description="least weight of a prompt relative to the most")
    memory: float = Field(0.5, ge=0, lt=1, description="share of its earlier score that a prompt keeps")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> PromptWeightConfig:
        refuse_idle(self, dict.fromkeys(("floor", "memory"), self.by != "none"), "by is none")
        return self


LossKind = Annotated[str, one_of(LOSSES)]


def _of_losses(parameter: str) -> str:
    """The description of an option that is a parameter of some losses."""
    names = ", ".join(name for name, loss in LOSSES.items() if parameter in loss.parameters)
    return f"of {names}: {PARAMETERS[parameter]}"


class RegionConfig(Section):
    """Another loss for some tokens (core/targets.py)."""

    where: Annotated[str, one_of(REGIONS)] = Field(description=_explained({n: r.words for n, r in REGIONS.items()}))
    kind: LossKind = Field(description="the loss there")
    threshold: float | None = Field(None, ge=0, allow_inf_nan=False, description="of the region, if it has one")

    @model_validator(mode="after")
    def _threshold_belongs_to_the_region(self) -> RegionConfig:
        if (self.threshold is None) == REGIONS[self.where].has_threshold:
            raise ValueError(f"region '{self.where}' {'needs a' if self.threshold is None else 'has no'} threshold")
        return self


class LossConfig(Section):
    kind: LossKind = Field(
        "forward_kl",
        description="what is learned of the teacher's distribution p by the student's q. "
        + _explained({name: loss.words for name, loss in LOSSES.items()}),
    )
    replaced_kind: LossKind | None = Field(None, description="the same, for replaced tokens; default: kind")
    regions: tuple[RegionConfig, ...] = Field(
        (),
        description="the same, for tokens of a kind: a list of {where, kind, threshold}; a token of several has the "
        "loss of the first. "
        + _explained({name: region.words.format(threshold="threshold") for name, region in REGIONS.items()}),
    )
    beta: float = Field(0.5, gt=0, lt=1, description=_of_losses("beta"))
    alpha: float = Field(0.1, ge=0, lt=1, description=_of_losses("alpha"))
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="tau of both models in a divergence; cross_entropy has none"
    )
    teacher_top_k: int = Field(64, ge=1, description="teacher entries kept a token; all others are one tail category")
    student_top_k: int = Field(
        0, ge=0, description="the student's most probable tokens that are categories of their own beside these"
    )
    vocabulary: Literal["top_k", "full"] = Field(
        "top_k", description="full: the divergence of all tokens, from the teacher's hidden states and output head"
    )
    chunk: int | None = Field(
        128,
        ge=1,
        description="response tokens whose student's logits a training step has in memory at once, or as many as have "
        "4 million logits; null: those of all tokens, as always where they are more than the head's product (a cap, "
        "scale, bias, adapter)",
    )
    accepted_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of tokens that the gate kept")
    replaced_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor of tokens that it replaced")
    handed_weight: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="factor of tokens of the teacher's legs (rollout.hand_over), after the replacing one; default: "
        "replaced_weight",
    )
    clamp: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="upper limit of a token's loss; no gradient above it"
    )
    prefix_tokens: int | None = Field(None, ge=1, description="only so many tokens of a response are learned")
    reweight: ReweightConfig = ReweightConfig()
    prompts: PromptWeightConfig = PromptWeightConfig()

    @model_validator(mode="after")
    def _every_option_has_an_effect(self) -> LossConfig:
        kinds = self.kinds
        losses = [LOSSES[kind] for kind in kinds]
        effects = {name: any(name in loss.parameters for loss in losses) for name in PARAMETERS}
        effects["temperature"] = any(loss.has_temperature for loss in losses)
        effects["student_top_k"] = effects["temperature"] and self.vocabulary == "top_k"
        whole = " over all tokens" if self.vocabulary == "full" else ""
        refuse_idle(self, effects, f"the loss is {' and '.join(sorted(kinds))}{whole}")
        if self.vocabulary == "full" and self.chunk is None:
            raise ValueError("chunk is null, but vocabulary: full never makes all logits; give it a number")
        if self.accepted_weight == self.replaced_weight == 0:
            raise ValueError("accepted_weight and replaced_weight are both 0: no token would be trained")
        if self.replaced_kind is not None and any(region.where == "replaced" for region in self.regions):
            raise ValueError("replaced_kind is the loss of region 'replaced', which regions names, too: leave one out")
        return self

    @property
    def kinds(self) -> set[str]:
        """Losses that some tokens have."""
        return {self.kind, self.replaced_kind or self.kind, *(region.kind for region in self.regions)}

    @property
    def settings(self) -> LossSettings:
        """What core.losses.make_token_loss makes a loss of."""
        given = {field.name: getattr(self, field.name) for field in fields(LossSettings)}
        return LossSettings(**given | {"regions": tuple(RegionSettings(**dict(own)) for own in self.regions)})


class Coefficients(NamedTuple):
    """What the two losses count in a training step."""

    kd: float  # the distillation loss
    rl: float  # the policy loss


class ObjectiveConfig(Section):
    kd_coef: Scheduled[Annotated[float, Field(ge=0)]] = Field(1.0, description="weight of the distillation loss")
    rl_coef: Scheduled[Annotated[float, Field(ge=0)]] = Field(
        0.0, description="weight of OpenRLHF's policy loss; where it is ever above 0, rewards are used"
    )
    replaced_tokens: Literal["exclude", "importance"] = Field(
        "exclude",
        description="the teacher's tokens in the policy loss: left out, or weighted by q/p within OpenRLHF's clip",
    )
    teacher_advantage: float = Field(
        0.0, ge=0, description="c: adds c (log p - log q) to the advantage of each of the student's tokens"
    )
    reward_timeout_s: float = Field(300.0, gt=0, description="a reward that takes longer ends the run; seconds")

    @property
    def uses_rewards(self) -> bool:
        return max(extremes(self.rl_coef)) > 0

    def coefficients(self, progress: float) -> Coefficients:
        """Those when this share of training is done."""
        return Coefficients(value_at(self.kd_coef, progress), value_at(self.rl_coef, progress))

    @model_validator(mode="after")
    def _something_is_learned(self) -> ObjectiveConfig:
        effects = dict.fromkeys(("replaced_tokens", "teacher_advantage"), self.uses_rewards)
        refuse_idle(self, effects, "rl_coef is 0, so there is no policy loss")
        for share in range(1001):
            if not any(self.coefficients(share / 1000)):
                raise ValueError(f"kd_coef and rl_coef are both 0 when {share / 10:g} % of training is done")
        return self


class TaskConfig(Section):
    name: str = Field(
        description="a task of skd_plugin.tasks, reasoning_gym:DATASET, or the path of a .py file with a task; it "
        "makes the prompts and checks the answers"
    )
    path: str | None = Field(
        None, description="of a task that reads a dataset: a folder with train and test as .json, .jsonl or .parquet"
    )
    evaluating_checker: bool = Field(
        False,
        description="take a dataset of reasoning-gym whose checker evaluates answers as code, in a process of its own "
        "that reaches no file and no network: docs/tasks.md",
    )
    template: str | None = Field(None, description="of such a task: form of its prompt, with columns in braces")
    train_prompts: Annotated[int, Field(ge=0)] | Literal["full"] = Field(
        8192, description="a number, or full: all that the dataset has; 0: for evaluation only"
    )
    eval_prompts: Annotated[int, Field(ge=0)] | Literal["full"] = Field(128, description="likewise, of held-out ones")
    weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="of one task among several; default: its number of train_prompts"
    )
    top_k: int | None = Field(None, ge=1, description="K of one task among several; default: skd.rollout.top_k")
    max_new_tokens: int | None = Field(
        None, ge=1, description="longest response of one task among several; default: skd.rollout.max_new_tokens"
    )
    seed: int = Field(0, description="of the choice of prompts")
    teacher_prompt: TeacherPromptConfig | None = Field(None, description="of this task; default: skd.teacher.prompt")

    @model_validator(mode="after")
    def _columns_of_a_task(self) -> TaskConfig:
        if self.teacher_prompt is not None:
            _refuse_column(self.teacher_prompt, f"task {self.name}")
        return self


def _refuse_column(prompt: TeacherPromptConfig, whose: str) -> None:
    if prompt.column is not None:
        raise ValueError(f"the teacher's prompt has a column, but {whose} makes its prompts; use template")


class EvalConfig(Section):
    teacher: bool = Field(True, description="measure the teacher once, before training")
    at_start: bool = Field(True, description="evaluate the student before the first step")


class SKDConfig(Section):
    teacher: TeacherConfig
    student: StudentConfig = StudentConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    task: TaskConfig | None = None
    tasks: tuple[TaskConfig, ...] = Field((), description="several tasks in one run, in place of skd.task")
    mix_temperature: float = Field(
        1.0, gt=0, description="of several tasks: shares proportional to weight^(1/temperature); more is more even"
    )
    eval: EvalConfig = EvalConfig()
    run_dir: str = Field("runs/skd", description="everything a run leaves behind is in this folder")
    resume: bool = Field(True, description="go on with an unfinished run of the same recipe in the run folder")
    trust_remote_code: bool = Field(
        False, description="run the Python files that a model's folder brings (auto_map); see docs/security.md"
    )
    pickle_weights: bool = Field(
        False, description="load weights that are pickles (.bin), which may run anything; see docs/security.md"
    )
    traces_per_step: int = Field(4, ge=0, description="responses of each step that go into traces.jsonl")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where this machine has it")
    vllm: dict[str, Any] = Field({}, description="further engine arguments of vLLM, as its EngineArgs names them")

    def teacher_prompt(self, task: TaskConfig | None = None) -> TeacherPromptConfig | None:
        """The teacher's own, of a task or of a dataset; None: it reads the student's."""
        if task is not None and task.teacher_prompt is not None:
            return task.teacher_prompt
        if self.teacher.prompt is None and self.teacher.chat_template_kwargs:
            return TeacherPromptConfig()
        return self.teacher.prompt

    @property
    def teacher_prompts(self) -> list[TeacherPromptConfig]:
        """All forms of them."""
        forms = [self.teacher_prompt(task) for task in self.all_tasks or (None,)]
        return [form for form in forms if form is not None]

    @property
    def longest_teacher_prompt(self) -> int | None:
        """Tokens of the longest prompt of the teacher's own, where the recipe says how long it may be."""
        return max((prompt.max_len for prompt in self.teacher_prompts if prompt.max_len), default=None)

    @property
    def all_tasks(self) -> tuple[TaskConfig, ...]:
        """Those of the run, whichever way they are given."""
        return self.tasks or ((self.task,) if self.task else ())

    @model_validator(mode="after")
    def _one_task_or_several(self) -> SKDConfig:
        if self.task and self.tasks:
            raise ValueError("skd.task and skd.tasks are both given; move the one into the list of the others")
        if self.all_tasks and self.teacher.prompt is not None:
            _refuse_column(self.teacher.prompt, "a task")
        effects = {"mix_temperature": len(self.tasks) > 1}
        refuse_idle(self, effects, "it is for several tasks (skd.tasks)")
        for config in self.all_tasks:
            alone = len(self.all_tasks) == 1
            if config.weight is not None and (alone or config.train_prompts == 0):
                reason = "it is the only task" if alone else "its train_prompts is 0"
                raise ValueError(f"the weight of task {config.name} has no effect: {reason}")
        return self

    @model_validator(mode="after")
    def _sampling_of_one_among_several(self) -> SKDConfig:
        for config in self.all_tasks:
            own = [name for name in ("top_k", "max_new_tokens") if getattr(config, name) is not None]
            if own and len(self.all_tasks) == 1:
                raise ValueError(f"task {config.name} is the only one: set skd.rollout.{own[0]} in place of its own")
            if config.top_k is not None and not self.rollout.has_top_k:
                raise ValueError(
                    f"the top_k of task {config.name} has no effect: no token is put to a K where the method is "
                    f"{self.rollout.method} and the gate {self.rollout.gate}"
                )
        return self

    @model_validator(mode="after")
    def _policy_gradient_of_the_policy(self) -> SKDConfig:
        if not self.objective.uses_rewards:
            return self
        rollout = self.rollout
        if not METHODS[rollout.method].has_student_text:
            raise ValueError(
                f"rewards (objective.rl_coef) teach the student's own tokens, but rollout.method '{rollout.method}' "
                "has none; use skd, on_policy or a mixed method"
            )
        if (rollout.student_temperature, rollout.student_top_p) != (1.0, 1.0) or rollout.reference_compat:
            raise ValueError(
                "the policy that rewards train is the student at temperature 1 and top-p 1; with objective.rl_coef "
                "its proposals must be drawn so (rollout.student_temperature, student_top_p, reference_compat)"
            )
        weighted = self.objective.replaced_tokens == "importance"
        if weighted and (
            (rollout.teacher_temperature, rollout.teacher_top_p) != (1.0, 1.0) or rollout.replacement == "argmax"
        ):
            raise ValueError(
                "objective.replaced_tokens: importance divides by the teacher's probability at temperature 1, so the "
                "teacher's tokens must be drawn so (rollout.teacher_temperature, teacher_top_p, replacement)"
            )
        gate = GATES[rollout.gate_name]
        if weighted and not gate.replaces_from_teacher:
            raise ValueError(
                f"gate '{rollout.gate}' replaces from {gate.replaced_from}, not from p; use replaced_tokens: exclude"
            )
        return self

    @model_validator(mode="after")
    def _scores_of_prompts(self) -> SKDConfig:
        by = self.loss.prompts.by
        if by == "acceptance" and not METHODS[self.rollout.method].has_gate:
            raise ValueError(f"loss.prompts.by: acceptance needs a gate, and method '{self.rollout.method}' has none")
        if by == "reward" and not self.objective.uses_rewards:
            raise ValueError(
                "loss.prompts.by: reward needs rewards, which are not asked for where objective.rl_coef is 0"
            )
        return self

    @model_validator(mode="after")
    def _weight_of_legs(self) -> SKDConfig:
        has_legs = self.rollout.hand_over is not None
        refuse_idle(self.loss, {"handed_weight": has_legs}, "the teacher has no legs (rollout.hand_over)")
        if not has_legs and any(region.where == "handed" for region in self.loss.regions):
            raise ValueError(
                "loss.regions: there is no token in 'handed' without legs of the teacher (rollout.hand_over)"
            )
        return self

    @model_validator(mode="after")
    def _labels_of_flagged_tokens(self) -> SKDConfig:
        for kind in sorted(self.loss.kinds):
            if not self.rollout.write_back and LOSSES[kind].of_labels is not None:
                raise ValueError(
                    f"rollout.write_back: false leaves rejected tokens in the text, and {kind} would teach them; "
                    "use a divergence as loss.kind, loss.replaced_kind and in loss.regions"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _loss_of_the_method(cls, given: Any) -> Any:
        """Some methods have one loss (`seq_kd`); a recipe need not name it, and may not name another."""
        if not isinstance(given, dict):
            return given
        rollout, loss = (given.get(name) or {} for name in ("rollout", "loss"))
        if not isinstance(rollout, dict) or not isinstance(loss, dict):
            return given
        name = rollout.get("method")
        method = METHODS.get(name) if isinstance(name, str) else None
        if method is None or method.loss is None:
            return given
        for option in ("kind", "replaced_kind"):  # all its tokens are the teacher's
            if (loss.get(option) or method.loss) != method.loss:
                raise ValueError(
                    f"method '{name}' learns the teacher's tokens, so skd.loss.{option} is {method.loss} and not "
                    f"'{loss[option]}'; for another loss on the teacher's text use method: teacher"
                )
        if loss.get("regions"):
            raise ValueError(f"method '{name}' learns every token by {method.loss}, so there are no skd.loss.regions")
        return {**given, "loss": {**loss, "kind": method.loss}}


def field_docs(section: type[BaseModel] = SKDConfig, prefix: str = "skd") -> dict[str, tuple[Any, str]]:
    """Dotted name -> (default or None, description) of every option, for `--help` and the flag parser."""
    docs: dict[str, tuple[Any, str]] = {}
    for name, info in section.model_fields.items():
        kinds = [k for k in getattr(info.annotation, "__args__", (info.annotation,)) if k is not type(None)]
        if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel):
            docs |= field_docs(kinds[0], f"{prefix}.{name}")
        else:
            default = None if info.is_required() else info.default
            docs[f"{prefix}.{name}"] = default, info.description or ""
    return docs


def parse_skd(section: dict[str, Any]) -> SKDConfig:
    """The `skd:` section of a recipe.

    Raises:
        RecipeError: an unknown option (the nearest one is named), or a value that is refused.
    """
    try:
        return SKDConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("skd", *(str(part) for part in first["loc"] if part not in VALUE_FORMS)))
        if first["type"] == "extra_forbidden":
            raise RecipeError(unknown_key(key, field_docs())) from error
        if first["type"] == "value_error":  # a check of ours between two options
            raise RecipeError(f"{key}: {first['ctx']['error']}") from error
        got = "" if first["type"] == "missing" else f"; got {first['input']!r}"
        raise RecipeError(f"{key}: {first['msg'].lower()}{got}") from error
