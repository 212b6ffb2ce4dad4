"""Make the quickstart's pair: a teacher trained to >= 90 % accuracy and a student stopped far too early.

    python scripts/make_arithmetic_models.py recipes/models/arithmetic

Plain next-token training on generated stories, from the seeds below; about half an hour on two cores.
Writes `teacher/` and `student/` (bfloat16 safetensors, the tokenizer beside them), 4.8 MB in all.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from skd_plugin.tasks.arithmetic import Arithmetic, vocabulary

CONTEXT = 256
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
SHAPES = {
    "teacher": dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6),
    "student": dict(hidden_size=160, intermediate_size=384, num_hidden_layers=2, num_attention_heads=5),
}
SEEDS = {"teacher": 1, "student": 2}
STEPS = {"teacher": 3000, "student": 800}
LEARNING_RATE = {"teacher": 2e-3, "student": 2e-3}
SCHEDULE = {"teacher": "cosine", "student": "constant_with_warmup"}
BATCH_SIZE = 48


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[a-z]+| ?[0-9]| ?[.?+=-]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEEDS[name])
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        num_key_value_heads=SHAPES[name]["num_attention_heads"],
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[name],
    )
    return LlamaForCausalLM(config)


def batch(task: Arithmetic, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, torch.Tensor]:
    examples = task.examples("train", BATCH_SIZE, seed=rng.getrandbits(32))
    prompts = [tokenizer(e.prompt).input_ids for e in examples]
    answers = [[*tokenizer(e.reference).input_ids, tokenizer.eos_token_id] for e in examples]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((BATCH_SIZE, length), tokenizer.pad_token_id)
    labels = torch.full((BATCH_SIZE, length), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        total = len(prompt) + len(answer)
        ids[row, :total] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : total] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Arithmetic, count: int = 200) -> float:
    """Greedy accuracy on held-out stories."""
    examples = task.examples("test", count)
    inputs = tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    output = model.eval().generate(**inputs, max_new_tokens=96, do_sample=False)[:, inputs.input_ids.shape[1] :]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    model.train()
    return sum(task.score(text, e.label) for text, e in zip(texts, examples, strict=True)) / count


def train(name: str, tokenizer: PreTrainedTokenizerFast, out: Path, steps: int) -> None:
    task, rng, model = Arithmetic(), random.Random(SEEDS[name]), make_model(name, tokenizer)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[name], betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_scheduler(SCHEDULE[name], optimizer, 50, steps)
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss = model(**batch(task, tokenizer, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{name} step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if step % 500 == 0:
            print(f"{name} step {step} accuracy {accuracy(model, tokenizer, task):.3f}", flush=True)
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    print(f"{name}: accuracy {accuracy(model.float(), tokenizer, task):.3f} after rounding to bfloat16", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=tuple(SHAPES))
    parser.add_argument("--steps", type=int, help="training steps, instead of those that made the committed pair")
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    for name in SHAPES if args.only is None else (args.only,):
        train(name, tokenizer, args.out, args.steps or STEPS[name])


if __name__ == "__main__":
    main()
