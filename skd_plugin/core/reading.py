"""What a teacher says of a text that is finished, for a teacher that is asked afterwards, and the trace of that text.

Shapes: R response tokens, K teacher entries kept a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from skd_plugin.core.trace import OVERLAP, Trace

# The least mass that is said to be left beside the named tokens: what is left of 1 is known no better, because each
# log-probability is rounded to float32.
RESOLUTION = 1e-6


@dataclass(frozen=True)
class Reading:
    """Of each token of a response. Log-probabilities are natural, at temperature 1, over the teacher's vocabulary."""

    token_logp_R: torch.Tensor  # float64, of the token itself
    rank_R: torch.Tensor  # int32, of the token; 0 the most probable
    topk_ids_RK: torch.Tensor  # int32, by falling probability; NOTHING in place of a token that the student has not
    topk_logp_RK: torch.Tensor  # float64, of these tokens; -inf of NOTHING

    def on(self, trace: Trace) -> Trace:
        """The trace of the text.

        What would take the teacher's whole distribution is NaN: its entropy, and KL(p||q), for which nobody has kept
        the student's either. So is the overlap at the top where K is less than it compares.

        Args:
            trace: of a student that stood in both models' places, so that `teacher_topk_ids` are its own first ones.
        """
        own_RC = trace.teacher_topk_ids[:, :OVERLAP]
        theirs_RC = self.topk_ids_RK[:, : own_RC.shape[1]]
        overlap_R = torch.full((len(trace),), torch.nan)
        if theirs_RC.shape[1] == own_RC.shape[1]:
            overlap_R = (theirs_RC[:, :, None] == own_RC[:, None]).any(-1).float().mean(-1)
        unknown_R = torch.full((len(trace),), torch.nan)
        return replace(
            trace,
            teacher_logp=self.token_logp_R.float(),
            draft_rank=self.rank_R,
            kl=unknown_R,
            teacher_entropy=unknown_R.clone(),
            top_overlap=overlap_R,
            same_first=(theirs_RC[:, :1] == own_RC[:, :1]).all(1).float(),
            teacher_topk_ids=self.topk_ids_RK,
            teacher_topk_logp=self.topk_logp_RK.float(),
            teacher_rest_tempered=self._rest_logp_R(trace.response_ids).float(),
        )

    def _rest_logp_R(self, token_R: torch.Tensor) -> torch.Tensor:
        """log of the mass that neither the K tokens nor the text's own has: at least that of `RESOLUTION`."""
        outside_R = (self.topk_ids_RK != token_R[:, None]).all(1)
        named_R = self.topk_logp_RK.exp().sum(1) + torch.where(outside_R, self.token_logp_R.exp(), 0.0)
        return torch.log1p(-named_R.clamp_max(1 - RESOLUTION))
