"""Losses of three steps, by the host's Actor and by ours.

python -m tests.contract.zero_steps FOLDER STAGE [STAGE ...], with RANK, WORLD_SIZE and MASTER_PORT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from skd_plugin.host import on_cpu

on_cpu.install()

import deepspeed  # noqa: E402
import torch  # noqa: E402
from openrlhf.models import Actor  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from skd_plugin.config.teacher import FollowConfig  # noqa: E402
from skd_plugin.core.chunked import HeadLoss, against_teacher  # noqa: E402
from skd_plugin.core.losses import forward_kl  # noqa: E402
from skd_plugin.host import chunked_actor  # noqa: E402
from skd_plugin.host.chunked_actor import ChunkedActor  # noqa: E402
from skd_plugin.host.moving_teacher import MovingTeacher  # noqa: E402
from skd_plugin.host.objective import finite_gradients  # noqa: E402

VOCAB, WIDTH, STEPS = 64, 12, 3
chunked_actor.FEW_LOGITS = 0  # so that a chunk is of as few tokens as asked for


class Task:
    """A batch, the teacher's side of it, and a loss with or without a term of the log-probabilities."""

    def __init__(self, foreseen: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, VOCAB, (2, 9), generator=generator)
        self.mask = torch.zeros(2, 8, dtype=torch.long)
        self.mask[:, 3:] = 1
        self.count = int(self.mask.sum())
        self.hidden = torch.randn(self.count, WIDTH, generator=generator)
        self.head = torch.randn(VOCAB, WIDTH, generator=generator)
        self.foreseen = foreseen

    def head_loss(self) -> HeadLoss:
        expected = torch.ones(self.count) if self.foreseen else None
        divergence = against_teacher(self.hidden, self.head, lambda _, log_p, log_q: forward_kl(log_p, log_q))
        return HeadLoss(divergence, expected)

    def loss(self, actor: Actor, full: bool) -> torch.Tensor:
        call = dict(action_mask=self.mask, attention_mask=torch.ones_like(self.ids), return_output=True)
        if full:
            call["head_loss"] = self.head_loss()
        log_probs, output = actor(self.ids, **call)
        if full:
            divergence = output["token_losses"].sum()
        else:
            log_q = output["logits"][:, :-1][self.mask.bool()].log_softmax(-1)
            divergence = forward_kl((self.hidden @ self.head.T).log_softmax(-1), log_q).sum()
        return divergence / self.count + (0 if self.foreseen else 0.1 * log_probs.sum())


def make_actor(stage: int, tied: bool, full: bool, persistence: int = 0) -> Actor:
    """`persistence`: numbers of a parameter that ZeRO-3 keeps whole all the time."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config)
    actor = ChunkedActor(model, chunk=4, vocab=VOCAB) if full else Actor(model)
    actor.packing_samples = False
    zero = {"stage": stage, "stage3_param_persistence_threshold": persistence}
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    actor.model = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    if stage == 3 and not persistence:
        assert model.lm_head.weight.numel() == 0, "ZeRO-3 has not partitioned the head"
    return actor


def losses(stage: int, tied: bool, full: bool, foreseen: bool) -> list[float]:
    actor = make_actor(stage, tied, full)
    task, found = Task(foreseen), []
    for _ in range(STEPS):
        loss = task.loss(actor, full)
        actor.model.backward(loss)
        actor.model.step()
        found.append(loss.item())
    return found


def moved(stage: int) -> dict[str, float]:
    """How far a teacher that follows three steps of a student, half and half, is from where it should be; and how far
    the student is from itself afterwards.
    """
    actor, task = make_actor(stage, tied=True, full=False, persistence=300), Task(foreseen=True)
    model = actor.model.module

    def whole() -> torch.Tensor:
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            return torch.cat([parameter.data.flatten().clone() for parameter in model.parameters()])

    teacher, first = MovingTeacher(model, FollowConfig(ema=0.5)), whole()
    for _ in range(STEPS):
        actor.model.backward(task.loss(actor, full=False))
        actor.model.step()
    teacher.move()
    student = whole()
    with teacher.in_place():
        found = whole()
    loss = task.loss(actor, full=False)  # the next step finds its parameters
    return {
        "teacher": float((found - (first + student) / 2).abs().max()),
        "student": float((whole() - student).abs().max()),
        "distance": float((student - first).abs().max()),
        "loss": float(loss),
    }


def stopped(stage: int, tied: bool, full: bool, foreseen: bool) -> str:
    """The error of a step whose gradient alone is not finite, after one that is."""
    actor, task = make_actor(stage, tied, full), Task(foreseen)
    try:
        for poison in (1.0, float("nan")):
            with finite_gradients(actor.model.get_input_embeddings(), 5):
                loss = task.loss(actor, full)
                loss.register_hook(lambda gradient, poison=poison: gradient * poison)
                actor.model.backward(loss)
                actor.model.step()
    except FloatingPointError as error:
        return f"{poison}: {error}"
    return ""


def main() -> None:
    folder, stages = Path(sys.argv[1]), sys.argv[2:]
    on_cpu.adapt_trainer()  # nothing of DeepSpeed's is compiled, so that no lock of a killed build stands in the way
    address = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    deepspeed.init_distributed("gloo", init_method=address, rank=0, world_size=1, auto_mpi_discovery=False)
    cases = [
        {"stage": stage, "tied": tied, "foreseen": foreseen,
         **{name: losses(stage, tied, name == "ours", foreseen) for name in ("host", "ours")},
         "stopped": [stopped(stage, tied, full, foreseen) for full in (False, True)]}
        for stage in map(int, stages) for tied in (False, True) for foreseen in (True, False)
    ]  # fmt: skip
    found = {"cases": cases, "moved": {stage: moved(int(stage)) for stage in stages}}
    (folder / "zero_steps.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
