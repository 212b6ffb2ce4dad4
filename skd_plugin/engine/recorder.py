"""What a trace says of the tokens that a step has emitted.

Shapes: M emitted tokens, V vocabulary, K teacher entries kept a token, J width of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skd_plugin.core.trace import NOTHING, Source, Trace


@dataclass(frozen=True)
class Recorder:
    teacher_top_k: int  # K
    loss_temperature: float

    def drafted(
        self,
        token_M: torch.Tensor,
        source_M: torch.Tensor,
        *,
        draft_M: torch.Tensor,
        rank_M: torch.Tensor,
        student_logp_MV: torch.Tensor,
        teacher_logp_MV: torch.Tensor,
        teacher_hidden_MJ: torch.Tensor,
    ) -> Trace:
        """Of tokens in place of which the student proposed `draft`, of rank `rank` under the teacher."""
        passed_M = (source_M == Source.ACCEPTED) | (source_M == Source.REFERENCE)
        return Trace(
            response_ids=token_M.to(torch.int32).cpu(),
            source=source_M.to(torch.uint8).cpu(),
            rejected_ids=torch.where(passed_M, NOTHING, draft_M).to(torch.int32).cpu(),
            draft_rank=rank_M.to(torch.int32).cpu(),
            student_logp=student_logp_MV.gather(1, token_M[:, None]).squeeze(1).cpu(),
            kl=(teacher_logp_MV.exp() * (teacher_logp_MV - student_logp_MV)).sum(-1).cpu(),
            student_entropy=-(student_logp_MV.exp() * student_logp_MV).sum(-1).cpu(),
            **self._of_teacher(teacher_logp_MV, token_M),
            teacher_hidden=teacher_hidden_MJ.cpu(),
        )

    def _of_teacher(self, teacher_logp_MV: torch.Tensor, token_M: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fields on the teacher's distribution and the emitted token; masses are sums, not 1 - head."""
        top_logp, top_ids = teacher_logp_MV.topk(self.teacher_top_k, dim=-1)
        others_MV = teacher_logp_MV.scatter(1, top_ids, float("-inf"))
        others_MV.scatter_(1, token_M[:, None], float("-inf"))
        return {
            "teacher_logp": teacher_logp_MV.gather(1, token_M[:, None]).squeeze(1).cpu(),
            "teacher_entropy": torch.special.entr(teacher_logp_MV.exp()).sum(-1).cpu(),
            "teacher_topk_ids": top_ids.to(torch.int32).cpu(),
            "teacher_topk_logp": top_logp.cpu(),
            "teacher_rest_tempered": (others_MV / self.loss_temperature).logsumexp(-1).cpu(),
        }
