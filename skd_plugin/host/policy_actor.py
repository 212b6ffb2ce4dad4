"""OpenRLHF's policy actor, trained by distillation; its weights go to the draft model of the engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deepspeed
import openrlhf.trainer.ray.ppo_actor as host
import ray
import torch
from openrlhf.utils.distributed_util import torch_dist_barrier_and_cuda_sync
from openrlhf.utils.loss_utils import iter_grad_accum_global_norm

from skd_plugin.config.schema import SKDConfig
from skd_plugin.core.losses import make_token_loss, whole_vocabulary_loss
from skd_plugin.core.token_weights import make_weigher
from skd_plugin.host import on_cpu
from skd_plugin.host.distillation import DistillationLoss
from skd_plugin.host.full_vocabulary import FullVocabularyActor, FullVocabularyLoss, FullVocabularyTeacher
from skd_plugin.host.lesson import LessonPlan
from skd_plugin.host.objective import DistillationTerm, Objective, PolicyTerm
from skd_plugin.host.weight_sync import Bucket
from skd_plugin.models import common_vocab_size, load_output_head
from skd_plugin.seams import plain_class

BUCKET_BYTES = 512 << 20  # one message of the weight sync; a larger parameter travels alone

HostPolicy = plain_class(host.PolicyModelActor)

Prepare = Callable[[Any], None]  # done with each experience before its training step


class SKDActorTrainer(host.ActorPPOTrainer):
    def __init__(self, strategy: Any, actor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(strategy, actor, *args, **kwargs)
        skd = self.args.skd
        vocab = common_vocab_size(skd.teacher.model_name_or_path, self.args.actor.model_name_or_path)
        by_token = self.args.actor.loss_agg_mode == "token-mean"
        make_loss = {"top_k": _top_k, "full": _full_vocabulary}[skd.loss.vocabulary]
        distillation, self._prepare = make_loss(self.actor, skd, vocab, by_token)
        self.actor.register_forward_hook(distillation.capture)
        self.actor_loss_fn = Objective(
            {"kd": DistillationTerm(distillation, by_token), "rl": PolicyTerm(self.actor_loss_fn)}
        )
        # The host's ppo_train looks the function up in its module; this process serves one actor.
        weigher = make_weigher(skd.loss.reweight.by, skd.loss.reweight.floor, vocab)
        host.iter_grad_accum_global_norm = LessonPlan(
            iter_grad_accum_global_norm, weigher, skd.objective.replaced_tokens
        )

    def training_step(self, experience: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._prepare(experience)
        self.actor_loss_fn.expect(experience)
        return super().training_step(experience, *args, **kwargs)

    def broadcast_to_vllm(self) -> None:
        """The student's weights to every engine's draft model: few large messages, not one call a parameter."""
        torch.cuda.empty_cache()
        for bucket, parameters in self._buckets():
            with deepspeed.zero.GatheredParameters(parameters, enabled=self.strategy.args.ds.zero_stage == 3):
                if self.use_cuda_ipc:
                    self._send_by_ipc(bucket, _flatten(parameters))
                elif torch.distributed.get_rank() == 0:
                    self._send_by_broadcast(bucket, _flatten(parameters))
        if torch.distributed.get_rank() == 0:
            ray.get([engine.reset_prefix_cache.remote() for engine in self.vllm_engines])
        torch.cuda.empty_cache()
        torch_dist_barrier_and_cuda_sync()

    def _buckets(self) -> Iterator[tuple[Bucket, list[torch.nn.Parameter]]]:
        names: list[str] = []
        parameters: list[torch.nn.Parameter] = []
        size = 0
        for name, parameter in self.actor.model.module.named_parameters():
            num_bytes = _shape(parameter).numel() * parameter.element_size()
            if parameters and (size + num_bytes > BUCKET_BYTES or parameter.dtype != parameters[0].dtype):
                yield _bucket(names, parameters), parameters
                names, parameters, size = [], [], 0
            names.append(name)
            parameters.append(parameter)
            size += num_bytes
        yield _bucket(names, parameters), parameters

    def _send_by_broadcast(self, bucket: Bucket, flat: torch.Tensor) -> None:
        refs = [engine.receive_student.remote(bucket) for engine in self.vllm_engines]
        # In a thread of its own: a broadcast to an engine that has died never returns, but its Ray call does.
        stream = torch.cuda.current_stream() if flat.is_cuda else None
        sender = threading.Thread(target=self._broadcast, args=(flat, stream), daemon=True)
        sender.start()
        while refs:
            arrived, refs = ray.wait(refs, num_returns=1)
            ray.get(arrived)
        sender.join()

    def _broadcast(self, flat: torch.Tensor, stream: Any) -> None:
        if flat.is_cuda:
            torch.cuda.set_device(flat.device)  # a thread starts on device 0
        if getattr(self.strategy.args.vllm, "sync_with_ray", False):
            import ray.util.collective as collective

            collective.broadcast(flat, 0, group_name=self._model_update_group)
        else:
            self._model_update_group.broadcast(flat, src=0, stream=stream)

    def _send_by_ipc(self, bucket: Bucket, flat: torch.Tensor) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        handles: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(handles, {host.get_physical_gpu_id(): reduce_tensor(flat)})
        if torch.distributed.get_rank() == 0:
            merged = {gpu: handle for handle_of_rank in handles for gpu, handle in handle_of_rank.items()}
            ray.get([engine.receive_student.remote(bucket, merged) for engine in self.vllm_engines])
        torch_dist_barrier_and_cuda_sync()


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the whole shape beside the shard


def _bucket(names: list[str], parameters: list[torch.nn.Parameter]) -> Bucket:
    return Bucket(names, [tuple(_shape(p)) for p in parameters], parameters[0].dtype)


def _flatten(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.data.reshape(-1) for p in parameters])


def _top_k(actor: Any, skd: SKDConfig, vocab: int, by_token: bool) -> tuple[DistillationLoss, Prepare]:
    """The loss against the teacher's entries in the traces; a batch needs no preparation."""
    token_loss = make_token_loss(**skd.loss.token_loss_arguments(), vocab=vocab)
    return DistillationLoss(token_loss), lambda experience: None


def _full_vocabulary(
    actor: FullVocabularyActor, skd: SKDConfig, vocab: int, by_token: bool
) -> tuple[FullVocabularyLoss, Prepare]:
    """The loss against the teacher's hidden states in the traces; the actor is told of them before its forward."""
    dtype = next(actor.model.parameters()).dtype
    teacher = FullVocabularyTeacher(
        load_output_head(skd.teacher.model_name_or_path, dtype, torch.cuda.current_device()),
        make_token_loss(**skd.loss.token_loss_arguments(), against=whole_vocabulary_loss),
        chunk=skd.loss.chunk,
        vocab=vocab,
        token_level_loss=by_token,
        alone=not skd.objective.uses_rewards,
    )
    return FullVocabularyLoss(), lambda e: actor.learn(teacher.lesson(e.lesson, e.action_mask))


class SKDPolicy(HostPolicy):
    def init_model_from_pretrained(self, strategy: Any, pretrain: str, *args: Any, **kwargs: Any) -> None:
        on_cpu.adapt_trainer()
        skd = strategy.args.skd
        if skd.loss.vocabulary == "full":
            vocab = common_vocab_size(skd.teacher.model_name_or_path, pretrain)
            host.Actor = partial(FullVocabularyActor, chunk=skd.loss.chunk, vocab=vocab)
        host.ActorPPOTrainer = SKDActorTrainer  # the host's init names the class; this process serves one actor
        super().init_model_from_pretrained(strategy, pretrain, *args, **kwargs)

    def begin_step(self, coefficients: dict[str, float], seed: int) -> None:
        """Before each `fit`. The seed makes the host's shuffling the same in a run that was interrupted."""
        self.trainer.actor_loss_fn.weigh(**coefficients)
        torch.manual_seed(seed)

    def describe_skd(self) -> dict[str, str]:
        """What is really in place, for the start-up check."""
        return {
            "trainer": type(self.trainer).__name__,
            "loss": type(self.trainer.actor_loss_fn).__name__,
            "plan": type(host.iter_grad_accum_global_norm).__name__,
        }
