"""Make a small model that reads what stands in its prompt: student and teacher of recipes/self-distillation.yaml.

    python scripts/make_reader.py recipes/models/reader

It is trained on metro lines that are drawn anew for every example (recipes/line_task.py): with the line in the prompt,
with the solution, with its ends, and with neither. So it does not know the recipe's line, and can only guess without
help. One thread is enough, and two minutes; the same command goes on with an unfinished training.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from make_task_models import backward, go_on, keep, make_model, make_tokenizer, measure, padded
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from line_task import ANSWER, LINE, NAMES, RULE, SOLUTION, Line, around, walks

from skd_plugin.tasks import Example

SHAPE = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3)
SEED = 1
STEPS, LEARNING_RATE, WARM_UP = 600, 2e-3, 50
STOPS, STARTS = (4, 16), (2, 5)  # of a line and of a prompt, inclusive
BATCH = {RULE: 28, SOLUTION: 10, ANSWER: 5, "{input}": 5}  # examples with each kind of help
KEEP_EVERY, MEASURE_EVERY = 50, 200  # steps


def helped(example: Example, template: str, line: str) -> Example:
    told = template.format(input=example.prompt, reference=example.reference, answer=example.label, line=line)
    return example._replace(prompt=told)


def draw(rng: random.Random, template: str) -> Example:
    """An example of a line of its own."""
    line = rng.sample(NAMES, rng.randint(*STOPS))
    starts = rng.sample(range(len(line)), min(len(line), rng.randint(*STARTS)))
    return helped(walks(line, starts), template, around(line, rng.randrange(len(line))))


class Helped(Line):
    """The recipe's task, with help in its prompts."""

    def __init__(self, template: str) -> None:
        self.template = template

    def examples(self, split: str, count: int | None, seed: int = 0) -> list[Example]:
        return [helped(example, self.template, around(LINE)) for example in super().examples(split, count, seed)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer, rng = make_tokenizer([Line()]), random.Random(SEED)
    model = make_model(SHAPE, tokenizer, SEED)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, WARM_UP, args.steps)
    unfinished = args.out.with_suffix(".unfinished.pt")
    done = go_on(unfinished, model, optimizer, schedule, rng=rng) if unfinished.exists() else 0
    started = time.process_time()
    for step in range(done + 1, args.steps + 1):
        parts = [[draw(rng, template) for _ in range(count)] for template, count in BATCH.items()]
        loss = backward(model, [padded(part, tokenizer) for part in parts])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % KEEP_EVERY == 0:
            print(f"step {step} loss {loss:.4f} {time.process_time() - started:.0f} s of processor time", flush=True)
            keep(unfinished, step, model, optimizer, schedule, rng=rng)
        if step % MEASURE_EVERY == 0 and step < args.steps:
            report(f"step {step}", model, tokenizer)
    unfinished.unlink(missing_ok=True)
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report("after rounding to bfloat16", model.float(), tokenizer)


def report(step: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """On held-out prompts of the recipe's line."""
    for template in BATCH:
        figures = measure(model, tokenizer, Helped(template), count=100)
        print(f"{step}, '{template}': {', '.join(f'{key} {value:.3f}' for key, value in figures.items())}", flush=True)


if __name__ == "__main__":
    main()
