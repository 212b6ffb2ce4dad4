"""Make a teacher and an under-trained student of one task with words of its own, or of several at once.

    python scripts/make_task_models.py arithmetic recipes/models/arithmetic
    python scripts/make_task_models.py translation summary OUT --student-steps 400
    python scripts/make_task_models.py recipes/chain_sum_task.py OUT --teacher-steps 800 --student-steps 200

TASK is a generated one of skd_plugin, or the file of a task that has `vocabulary()` too.

Plain next-token training on generated examples, from the seeds below; about half an hour on two cores for the teacher
of one task. Writes `teacher/` and `student/` (bfloat16 safetensors, the tokenizer beside them). The student is stopped
far too early on purpose: it is there to be distilled into. The same command goes on with an unfinished training, from
where it was last measured. With `arithmetic` alone this is how the pair in recipes/models was made.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from skd_plugin.tasks import GENERATED, Example, Task, TaskError, find_task

CONTEXT = 256
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
SHAPES = {
    "teacher": dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6),
    "student": dict(hidden_size=160, intermediate_size=384, num_hidden_layers=2, num_attention_heads=5),
}
SEEDS = {"teacher": 1, "student": 2}
STEPS = {"teacher": 3000, "student": 800}
LEARNING_RATE = 2e-3
MEASURE_EVERY = 500  # steps; an unfinished training goes on from there
SCHEDULE = {"teacher": "cosine", "student": "constant_with_warmup"}
BATCH_SIZE = 48


def make_tokenizer(tasks: Sequence[Task]) -> PreTrainedTokenizerFast:
    """Words of all the tasks, in their order; a word that two of them have is one token."""
    tokens = list(dict.fromkeys(token for task in tasks for token in task.vocabulary()))
    vocab = {token: index for index, token in enumerate((*SPECIAL, *tokens))}
    signs = [token[1:] for token in tokens if len(token) == 2 and token[0] == " " and not token[1:].isalnum()]
    signs = sorted(signs, key="-".__eq__)  # a hyphen that is last in its class is a hyphen
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    letters = "a-z" if all(token.islower() for token in tokens if token.strip().isalpha()) else "A-Za-z"
    pattern = rf" ?[{letters}]+| ?[0-9]| ?[{''.join(signs)}]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        num_key_value_heads=shape["num_attention_heads"],
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def take_over(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, *, as_unknown: bool = False
) -> None:
    """The weights of a model of the same shape; of embedding and head, the rows of the tokens that both know.

    Args:
        as_unknown: every other token is what `<unk>` was to that model, of which it says next to never that it comes.
    """
    known = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own, before = tokenizer.get_vocab(), PreTrainedTokenizerFast.from_pretrained(folder)
    rows = [(own[t], i) for t, i in before.get_vocab().items() if t in own]
    to, source = (torch.tensor(column) for column in zip(*rows, strict=True))
    theirs = known.state_dict()
    for name, weight in model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            if as_unknown:
                weight[:] = theirs[name][before.unk_token_id]
            weight[to] = theirs[name][source]
        else:
            weight.copy_(theirs[name])


def even_shares(tasks: int, size: int) -> list[int]:
    return [size // tasks + (place < size % tasks) for place in range(tasks)]


def batches(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerFast, rng: random.Random, shares: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """A batch, one part a task with its share of the examples, int64 [share, L]: their lengths differ too much to be
    padded to one L. Labels are -100 over prompts and padding.
    """
    return [
        padded(task.examples("train", count, seed=rng.getrandbits(32)), tokenizer)
        for task, count in zip(tasks, shares, strict=True)
    ]


def padded(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    prompts = [tokenizer(e.prompt).input_ids for e in examples]
    answers = [[*tokenizer(e.reference).input_ids, tokenizer.eos_token_id] for e in examples]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), length), tokenizer.pad_token_id)
    labels = torch.full((len(examples), length), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        total = len(prompt) + len(answer)
        ids[row, :total] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : total] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


def backward(model: LlamaForCausalLM, parts: Sequence[dict[str, torch.Tensor]]) -> float:
    """Gradients of the mean over the tokens of all parts; returns it, nats."""
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    total = 0.0
    for part, count in zip(parts, counts, strict=True):
        loss = model(**part).loss * (count / sum(counts))
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, count: int = 200
) -> dict[str, float]:
    """Metrics of greedy responses to held-out prompts, the task's own score first."""
    examples = task.examples("test", count)
    inputs = tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    output = model.eval().generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    model.train()
    labels = [e.label for e in examples]
    mean = sum(task.score(text, label) for text, label in zip(texts, labels, strict=True)) / count
    return {task.metric: mean, **task.metrics(texts, labels)}


def report(name: str, step: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: Sequence) -> None:
    for task in tasks:
        metrics = ", ".join(f"{key} {value:.3f}" for key, value in measure(model, tokenizer, task).items())
        print(f"{name} {step} {task.name}: {metrics}", flush=True)


def keep(path: Path, step: int, *parts: Any, rng: random.Random | None = None) -> None:
    """An unfinished training: all of its parts that have a `state_dict`, and its random numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    states = [part.state_dict() for part in parts]
    torch.save({"step": step, "parts": states, "rng": None if rng is None else rng.getstate()}, written)
    written.replace(path)


def go_on(path: Path, *parts: Any, rng: random.Random | None = None) -> int:
    """Takes up what `keep` wrote; returns the steps that are done."""
    states = torch.load(path, weights_only=True)
    for part, state in zip(parts, states["parts"], strict=True):
        part.load_state_dict(state)
    if rng is not None:
        rng.setstate(states["rng"])
    print(f"going on after step {states['step']} of {path}", flush=True)
    return states["step"]


def train(
    name: str, tasks: Sequence[Task], out: Path, steps: int, shares: Sequence[int], first: Path | None = None
) -> None:
    tokenizer = make_tokenizer(tasks)
    rng, model = random.Random(SEEDS[name]), make_model(SHAPES[name], tokenizer, SEEDS[name])
    if first is not None:
        take_over(model, tokenizer, first, as_unknown=steps == 0)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_scheduler(SCHEDULE[name], optimizer, 50, steps)
    unfinished = out / f"{name}.unfinished.pt"
    done = go_on(unfinished, model, optimizer, schedule, rng=rng) if unfinished.exists() else 0
    started = time.monotonic()
    for step in range(done + 1, steps + 1):
        loss = backward(model, batches(tasks, tokenizer, rng, shares))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{name} step {step} loss {loss:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if step % MEASURE_EVERY == 0 and step < steps:
            keep(unfinished, step, model, optimizer, schedule, rng=rng)
            report(name, f"step {step}", model, tokenizer, tasks)
    unfinished.unlink(missing_ok=True)
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    report(name, "after rounding to bfloat16", model.float(), tokenizer, tasks)


def task_of_words(name: str) -> Task:
    """Raises argparse.ArgumentTypeError: there is no such task, or it does not list its words."""
    try:
        task = find_task(name)()
    except (KeyError, TaskError) as error:
        raise argparse.ArgumentTypeError(f"{name} is no task: {error}") from error
    if not hasattr(task, "vocabulary"):
        raise argparse.ArgumentTypeError(f"{name} has no vocabulary() that lists its words")
    return task


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(task.name for task in GENERATED)
    parser.add_argument("tasks", nargs="+", type=task_of_words, metavar="TASK", help=f"{names}, or a file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=tuple(SHAPES))
    for name in SHAPES:
        parser.add_argument(f"--{name}-steps", type=int, default=STEPS[name], help="default: %(default)s")
    parser.add_argument(
        "--shares", type=int, nargs="+", help=f"examples of each task in a batch; default: {BATCH_SIZE}"
    )
    parser.add_argument(
        "--teacher-from",
        type=Path,
        metavar="MODEL",
        help="begin with the weights of this teacher; with "
        "--teacher-steps 0 it is this teacher, to which words that it does not know are <unk>",
    )
    args = parser.parse_args(argv)
    shares = args.shares or even_shares(len(args.tasks), BATCH_SIZE)
    if len(shares) != len(args.tasks):
        parser.error(f"--shares has {len(shares)} numbers for {len(args.tasks)} tasks")
    for name in SHAPES if args.only is None else (args.only,):
        first = args.teacher_from if name == "teacher" else None
        train(name, args.tasks, args.out, getattr(args, f"{name}_steps"), shares, first)


if __name__ == "__main__":
    main()
