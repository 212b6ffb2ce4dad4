"""OpenRLHF's policy actor, trained by distillation; its weights go to the draft model of the engines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import openrlhf.trainer.ray.ppo_actor as host
import ray
import torch
from openrlhf.utils.deepspeed import DeepspeedStrategy

from skd_plugin import trust
from skd_plugin.config.objective import Coefficients
from skd_plugin.config.schema import SKDConfig
from skd_plugin.config.teacher import teacher_words
from skd_plugin.core.clock import REST, clock_on
from skd_plugin.core.losses import make_token_loss, whole_vocabulary_loss
from skd_plugin.core.token_weights import make_weigher
from skd_plugin.host import on_cpu, shards
from skd_plugin.host.batch import DynamicBatches, OptimizerStepBatches
from skd_plugin.host.chunked_actor import ChunkedActor
from skd_plugin.host.distillation import (
    ChunkedTopKDistillation,
    Distillation,
    Foresight,
    FullVocabularyDistillation,
    TopKDistillation,
)
from skd_plugin.host.end_event import end_ids_of
from skd_plugin.host.garbage import keep_what_is_there
from skd_plugin.host.moving_teacher import MovingTeacher
from skd_plugin.host.objective import Objective, finite_gradients
from skd_plugin.host.shards import shard_of
from skd_plugin.host.trace_store import TRACE_KEY, fetch
from skd_plugin.host.weight_sync import StudentSender
from skd_plugin.models import common_vocab_size, load_output_head, mean_tolerance
from skd_plugin.seams import plain_class, rebind

SECONDS = "skd_seconds"  # key in the status of an update
EMA_FOLDER = "_ema"  # of checkpoints, of OpenRLHF's running mean of the weights (train.enable_ema)

HostPolicy = plain_class(host.PolicyModelActor)


class SKDActorTrainer(host.ActorPPOTrainer):
    def __init__(self, strategy: Any, actor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(strategy, actor, *args, **kwargs)
        skd = self.args.skd
        vocab = common_vocab_size(skd.any_teacher.model_name_or_path, self.args.actor.model_name_or_path)
        token_level_loss = self.args.actor.loss_agg_mode == "token-mean"
        self.clock = clock_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        rebind(DeepspeedStrategy, "backward", self.clock.part("backward")(DeepspeedStrategy.backward))
        rebind(DeepspeedStrategy, "optimizer_step", self.clock.part("optimizer")(DeepspeedStrategy.optimizer_step))
        follow = skd.teacher.follow if skd.teacher is not None else None
        self.moving_teacher = MovingTeacher(self.actor.model.module, follow) if follow else None
        self._trained = self.teacher_resumed = False  # since the weights were last sent
        self.step = 0  # the training step that is running or was the last, counted from 1
        reads_head = isinstance(self.actor, ChunkedActor) and self.actor.reads_head
        if self.strategy.ring_attn_group is not None and not reads_head:
            raise RuntimeError(
                "openrlhf.ds.ring_attn_size is above 1, but this student's output head cannot be read on each rank: "
                "it has a bias, an adapter, or changes its logits; set it to 1"
            )
        alone = not skd.objective.uses_rewards and not self.args.actor.entropy_coef
        foresight = Foresight(token_level_loss=token_level_loss, alone=alone)
        distillation = _distillation(self.actor, skd, vocab, foresight if reads_head else None)
        tolerance = _student_tolerance(self.actor.model.module, vocab, common=reads_head)
        self.objective = Objective(distillation, self.actor_loss_fn, token_level_loss, tolerance)
        # OpenRLHF's ppo_train looks the function up in its module; this process serves one actor.
        weighting = make_weigher(skd.loss.reweight.by, skd.loss.reweight.floor, vocab, skd.loss.prefix_tokens)
        batches = OptimizerStepBatches(weighting, skd.objective.replaced_tokens, packed=self.args.ds.packing_samples)
        rebind(host, "iter_grad_accum_global_norm", batches)
        if self.args.train.dynamic_batch_enable:  # OpenRLHF's ppo_train calls no such function for them
            self.replay_buffer = DynamicBatches(batches, self.replay_buffer)

    def training_step(self, experience: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # With dynamic batches DeepSpeed believes that each one ends a step, and ZeRO-1 and 2 forget what came before
        # the last: it must be told. Otherwise it is told what it knows.
        self.actor.model.set_gradient_accumulation_boundary(experience.batch.ends_step)
        self._trained = True
        embeddings = self.actor.model.get_input_embeddings()
        with (
            self.clock.part("forward"),
            finite_gradients(embeddings, self.step),
            self.objective.step(self.actor, experience) as self.actor_loss_fn,
        ):
            return super().training_step(experience, *args, **kwargs)

    def _init_vllm_sync_group(self, backend: str) -> None:
        """An engine that did not start would never join the group, and this process would wait for it in the
        rendezvous. Asked first, it answers with the error that ended it.
        """
        ray.get([engine.describe_skd.remote() for engine in self.vllm_engines])
        super()._init_vllm_sync_group(backend)

    def broadcast_to_vllm(self) -> None:
        moved = self.teacher_resumed
        if self.moving_teacher is not None and self._trained and self.moving_teacher.is_due(self.step):
            self.moving_teacher.move()
            moved = True
        self._trained = self.teacher_resumed = False
        StudentSender(self).send(self.step, self.moving_teacher if moved else None)


def _student_tolerance(model: Any, vocab: int, *, common: bool) -> float | None:
    """Nats a token by which rounding alone moves log q between vLLM and transformers; None where they differ by
    design: dropout while training, or OpenRLHF's log-probs over padding rows of the head.

    Args:
        common: the trainer's are of the tokens that both models have.
    """
    config = model.config.get_text_config()
    drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    if drops or getattr(config, "attention_dropout", 0) or (config.vocab_size != vocab and not common):
        return None
    return mean_tolerance(next(model.parameters()).dtype)


def _distillation(actor: Any, skd: SKDConfig, vocab: int, foresight: Foresight | None) -> Distillation:
    """`foresight`: of a student whose head is read chunk by chunk; None: it makes the logits of all tokens."""
    settings = skd.loss.settings
    if foresight is None:
        return TopKDistillation(make_token_loss(settings, vocab=vocab))
    if skd.loss.vocabulary == "top_k":
        return ChunkedTopKDistillation(make_token_loss(settings), foresight)
    dtype = next(actor.model.parameters()).dtype
    return FullVocabularyDistillation(
        {
            teacher_words(name): load_output_head(teacher.model_name_or_path, dtype, torch.cuda.current_device())
            for name, teacher in skd.all_teachers.items()
        },
        make_token_loss(settings, against=whole_vocabulary_loss),
        foresight,
        chunk=skd.loss.chunk,
        vocab=vocab,
        end_ids=actor.end_ids,
    )


class SKDPolicy(HostPolicy):
    def init_model_from_pretrained(self, strategy: Any, pretrain: str, *args: Any, **kwargs: Any) -> None:
        trust.close_transformers()
        on_cpu.adapt_trainer()
        skd = strategy.args.skd
        # A compiled model would not call the forward that takes the head's place; AutoTP cuts the head in parts.
        whole_head = not strategy.args.ds.deepcompile and strategy.args.ds.tensor_parallel_size == 1
        chunk = skd.loss.chunk if whole_head else None
        vocab = common_vocab_size(skd.any_teacher.model_name_or_path, pretrain)
        rebind(host, "Actor", partial(ChunkedActor, chunk=chunk, vocab=vocab, end_ids=end_ids_of(strategy.args)))
        rebind(host, "ActorPPOTrainer", SKDActorTrainer)  # OpenRLHF's init names it; this process serves one actor
        super().init_model_from_pretrained(strategy, pretrain, *args, **kwargs)
        if self.checkpoint_states:
            self._resume_beside(Path(strategy.args.ckpt.path))
        keep_what_is_there()

    def _resume_beside(self, checkpoints: Path) -> None:
        """What OpenRLHF's checkpoint does not hold. Its running mean of weights would begin anew without a word."""
        if self.trainer.moving_teacher is not None:
            self.trainer.moving_teacher.load(checkpoints)
            self.trainer.teacher_resumed = True
        if self.ema_model is not None:
            mine = [shard_of(parameter) for parameter in self.ema_model.model.parameters()]
            for shard, saved in zip(mine, shards.load(checkpoints / EMA_FOLDER, mine), strict=True):
                shard.data.copy_(saved)

    def save_checkpoint(self, tag: str, *args: Any, **kwargs: Any) -> None:
        checkpoints = Path(self.strategy.args.ckpt.path)
        if self.trainer.moving_teacher is not None:
            self.trainer.moving_teacher.save(checkpoints, tag)
        if self.ema_model is not None:
            shards.save(checkpoints / EMA_FOLDER, tag, [shard_of(p) for p in self.ema_model.model.parameters()])
        super().save_checkpoint(tag, *args, **kwargs)

    def append(self, experience: Any) -> None:
        """A batch of the step's experience; its traces come from where they were sampled."""
        with self.trainer.clock.part("traces"):
            experience.info[TRACE_KEY] = fetch(experience.info[TRACE_KEY])
            super().append(experience)

    def fit(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """OpenRLHF's status of an update, and the seconds that went to each part of the step here."""
        with self.trainer.clock.part("batches"):
            status = super().fit(*args, **kwargs)
        seconds = self.trainer.clock.lap()
        del seconds[REST]
        return {**status, SECONDS: seconds}

    def begin_step(self, step: int, coefficients: Coefficients, seed: int) -> None:
        """Before each `fit`; `step` counts from 1. The seed makes OpenRLHF's shuffling the same in a resumed run."""
        self.trainer.step = step
        self.trainer.clock.lap()
        self.trainer.objective.begin_step(coefficients, student_version=step - 1)
        torch.manual_seed(seed)

    def resume(self, step: int) -> None:
        """Goes on behind a step, 0 at the start of a run."""
        self.trainer.step = step

    def describe_skd(self) -> dict[str, Any]:
        """What is really in place, for the start-up check."""
        return {
            "trainer": type(self.trainer).__name__,
            "loss": type(self.trainer.objective).__name__,
            "batches": type(host.iter_grad_accum_global_norm).__name__,
            "end_ids": list(self.actor.end_ids),
        }
