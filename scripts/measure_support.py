"""How far the loss on few entries is from the loss over all tokens, along the student's own text, for the models of
the repository:  python scripts/measure_support.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skd_plugin.core.losses import make_divergence, top_k_loss, whole_vocabulary_loss
from skd_plugin.core.targets import Targets
from skd_plugin.core.trace import NOTHING
from skd_plugin.models import response_logits
from skd_plugin.tasks.translation import Translation

FOLDER = Path(__file__).parents[1] / "recipes" / "models" / "translation"
PROMPTS = 128
SUPPORTS = [(4, 0), (8, 0), (4, 4), (16, 0), (8, 8), (64, 0), (32, 32)]


def entries(log_p: torch.Tensor, log_q: torch.Tensor, token: torch.Tensor, top_k: int, own: int) -> Targets:
    """What an engine with these two widths would have recorded."""
    logp, ids = log_p.topk(top_k, dim=-1)
    students = log_q.topk(own, dim=-1).indices if own else ids[:, :0]
    again = (students[:, :, None] == ids[:, None]).any(-1)
    named = torch.cat([ids, students, token[:, None]], 1)
    return Targets(
        teacher_ids_NK=torch.cat([ids, students.masked_fill(again, NOTHING)], 1),
        teacher_logp_NK=torch.cat([logp, log_p.gather(1, students)], 1),
        teacher_rest_N=log_p.scatter(1, named, -torch.inf).logsumexp(-1),
        token_N=token,
        token_teacher_logp_N=log_p.gather(1, token[:, None]).squeeze(1),
        token_student_logp_N=log_q.gather(1, token[:, None]).squeeze(1),
        teacher_entropy_N=torch.special.entr(log_p.exp()).sum(-1),
        source_N=torch.zeros(len(token), dtype=torch.uint8),
    )


@torch.no_grad()
def log_probs(teacher: Any, student: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p, log q and the token at every place of a response of the student to each prompt."""
    found: list[tuple[torch.Tensor, ...]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = student.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=64)
        response = text[0, len(prompt) :]
        rows = [response_logits(model, prompt, response.tolist()).log_softmax(-1) for model in (teacher, student)]
        found.append((*rows, response))
    log_p, log_q, token = (torch.cat(column) for column in zip(*found, strict=True))
    return log_p, log_q, token


def main() -> None:
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(FOLDER / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "teacher")
    prompts = [
        tokenizer(x.prompt, add_special_tokens=False).input_ids for x in Translation().examples("test", PROMPTS)
    ]
    for name in ("cold", "student"):
        student = AutoModelForCausalLM.from_pretrained(FOLDER / name).eval()
        log_p, log_q, token = log_probs(teacher, student, prompts)
        for kind in ("forward_kl", "reverse_kl"):
            divergence = make_divergence(kind)
            full = replace(entries(log_p, log_q, token, 1, 0), teacher_logp_NK=log_p)
            whole = whole_vocabulary_loss(divergence)(log_q, full).mean()
            found = [top_k_loss(divergence)(log_q, entries(log_p, log_q, token, *own)).mean() for own in SUPPORTS]
            missing = ", ".join(f"{k}+{j}: {1 - x / whole:.1%}" for (k, j), x in zip(SUPPORTS, found, strict=True))
            print(
                f"{name}, {kind}: {whole:.3f} nats a token over {log_p.shape[1]} tokens, {len(token)} places; missing "
                f"with K+J entries: {missing}"
            )


if __name__ == "__main__":
    main()
