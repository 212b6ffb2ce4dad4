"""Where the text of a run is from: one entry a method, with everything that is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# (mix, stage_share, progress) -> share of the prompts that are answered by their reference, 0 to 1. `mix` and
# `stage_share` are the options of a recipe, progress the share of training that is done.
ReferenceShare = Callable[[float, float, float], float]


def no_references(mix: float, stage_share: float, progress: float) -> float:
    return 0.0


def only_references(mix: float, stage_share: float, progress: float) -> float:
    return 1.0


def unless_mixed_in(mix: float, stage_share: float, progress: float) -> float:
    """A prompt's response is sampled with probability `mix`."""
    return 1.0 - mix


def in_the_first_stage(mix: float, stage_share: float, progress: float) -> float:
    return 1.0 if progress < stage_share else 0.0


@dataclass(frozen=True)
class Method:
    """How a response is made; `docs/rollout.md` has the distributions."""

    source: Literal["gate", "student", "teacher"]  # of what is sampled: the student under a gate, or one model alone
    about: str  # what the text is, for the list of options
    # A sentence for `skd check`; {proposes}, {gate}, {mix} and {stage_share} are filled in.
    words: str
    label: str = "{gate}"  # the gate, or why there is none, for `skd report`
    reference_share: ReferenceShare = no_references
    option: str | None = None  # of skd.rollout, that `reference_share` depends on
    loss: str | None = None  # the one loss that it is defined with, of core.losses.LOSSES

    @property
    def has_gate(self) -> bool:
        return self.source == "gate"

    @property
    def needs_references(self) -> bool:
        return self.reference_share is not no_references

    @property
    def has_student_text(self) -> bool:
        """Whether the student draws any token itself."""
        return self.source != "teacher" and self.reference_share is not only_references


METHODS: dict[str, Method] = {
    # SKD (arXiv 2410.11325).
    "skd": Method("gate", "the student under the gate", "{gate}"),
    # GKD (arXiv 2306.13649) with all data from the student.
    "on_policy": Method(
        "student",
        "the student",
        "{proposes}; every one stays (on-policy distillation)",
        "none: every student token stays (on-policy)",
    ),
    "teacher": Method(
        "teacher",
        "the teacher",
        "every token is the teacher's (supervised distillation)",
        "none: every token is the teacher's",
    ),
    # Sequence-level distillation (arXiv 1606.07947).
    "seq_kd": Method(
        "teacher",
        "the teacher, whose tokens are the labels",
        "every token is the teacher's, and is the label (sequence-level distillation)",
        "none: every token is the teacher's, and is the label",
        loss="cross_entropy",
    ),
    # With the loss cross_entropy it is plain fine-tuning.
    "supervised": Method(
        "student",
        "the dataset",
        "every response is the dataset's reference",
        "none: every response is a reference",
        reference_share=only_references,
    ),
    # ImitKD (arXiv 2009.07253).
    "mixed": Method(
        "student",
        "the student for a share of the prompts, else the dataset",
        "with probability {mix:g} a prompt's response is the student's own, else its reference",
        "none: student text and references",
        reference_share=unless_mixed_in,
        option="mix",
    ),
    # SKD's released code.
    "mixed_skd": Method(
        "gate",
        "skd for a share of the prompts, else the dataset",
        "a share of {mix:g} of the prompts is sampled, the others are answered by references: {gate}",
        reference_share=unless_mixed_in,
        option="mix",
    ),
    # SKD's released code (`mixed_train`).
    "two_stage": Method(
        "student",
        "the dataset, then the student",
        "references for the first {stage_share:g} of training, then the student's own text",
        "none: references, then student text",
        reference_share=in_the_first_stage,
        option="stage_share",
    ),
}
