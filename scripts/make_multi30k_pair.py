"""Make a teacher and two students of Multi30k, English to German: the pair of recipes/multi30k.yaml.

    python scripts/make_multi30k_pair.py --data FOLDER recipes/models/multi30k

FOLDER holds train.jsonl and test.jsonl with `en` and `de`; without it the data come from the Hub. A joint byte-level
BPE of 4,096 tokens is learnt from the training pairs. The teacher sees them six times; the students (`cold`,
`student`) are a quarter of its size and stopped early: they are there to be distilled into. One thread is enough.
The same command goes on with an unfinished training. Writes bfloat16 safetensors and prints chrF, BLEU and the time.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from make_task_models import go_on, keep, make_model, padded
from sacrebleu.metrics import BLEU
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from skd_plugin.tasks import Example
from skd_plugin.tasks.multi30k import Multi30k

TEMPLATE = "{en}\n"  # recipes/multi30k.yaml has the same: a small model needs no instruction
VOCABULARY = 4096
TEACHER = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6)
STUDENT = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3)
# shape, seed, passes over the data
KINDS = {"teacher": (TEACHER, 1, 6.0), "student": (STUDENT, 2, 2.0), "cold": (STUDENT, 2, 0.5)}
TOKENS = 4096  # in a batch, both languages together
BATCHES_OF_A_LENGTH = 50  # examples of that many batches are sorted by length before they are cut
LEARNING_RATE, DECAY, DROPOUT, WARM_UP = 3e-3, 0.05, 0.1, 50
FALL = 0.3  # the last share of the steps, in which the learning rate goes down to 0 linearly
KEEP_EVERY, MEASURE_EVERY = 25, 400  # steps; an unfinished training goes on from where it was kept


def make_tokenizer(examples: list[Example]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for example in examples for part in example[:2]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def add_dropout(model: LlamaForCausalLM) -> None:
    """Llama has none outside attention; 29,000 pairs are few. Off in `eval()`, and not part of what is saved."""

    def dropped(module: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], DROPOUT, module.training), *output[1:])
        return nn.functional.dropout(output, DROPOUT, module.training)

    model.model.embed_tokens.register_forward_hook(dropped)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(dropped)
        layer.mlp.register_forward_hook(dropped)


def make_optimizers(model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms: after 75 steps 0.2 nats below AdamW
    alone.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=DECAY)


def batches(lengths: list[int], seed: int, passes: float) -> list[list[int]]:
    """Which examples each step takes: about TOKENS tokens, of about one length; another order at every pass."""
    size = TOKENS * len(lengths) // sum(lengths)
    cut: list[list[int]] = []
    for number in range(math.ceil(passes)):
        rng = random.Random(f"{seed}/{number}")
        order = rng.sample(range(len(lengths)), len(lengths))
        of_pass = []
        for start in range(0, len(order), size * BATCHES_OF_A_LENGTH):
            alike = sorted(order[start : start + size * BATCHES_OF_A_LENGTH], key=lengths.__getitem__)
            of_pass += [alike[place : place + size] for place in range(0, len(alike), size)]
        cut += rng.sample(of_pass, len(of_pass))
    return cut[: round(passes * len(of_pass))]


def loss_of(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the tokens of the German side, nats. With the padding on the right, causal attention needs no mask."""
    labels = batch["labels"][:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch["input_ids"][:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[labels != -100])
    return nn.functional.cross_entropy(logits.float(), labels[labels != -100])


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Multi30k, count: int) -> str:
    """Greedy translations of the first `count` sentences of the test set."""
    examples = task.examples("test", count)
    texts = []
    for start in range(0, count, 250):
        inputs = tokenizer(
            [e.prompt for e in examples[start : start + 250]], return_tensors="pt", padding=True, padding_side="left"
        )
        inputs.pop("token_type_ids", None)
        output = model.eval().generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    model.train()
    references = [e.label for e in examples]
    bleu = BLEU()
    bleu.corpus_score([text.strip() for text in texts], [references])
    figures = ", ".join(f"{name} {100 * value:.1f}" for name, value in task.metrics(texts, references).items())
    return f"{figures} ({bleu.get_signature()})"


def train(name: str, task: Multi30k, out: Path, tokenizer: PreTrainedTokenizerFast, passes: float) -> None:
    shape, seed, _ = KINDS[name]
    model = make_model(shape, tokenizer, seed)
    add_dropout(model)
    examples = task.examples("train", None)
    steps = batches([len(tokenizer(e.prompt + e.reference).input_ids) + 1 for e in examples], seed, passes)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(steps)} steps", flush=True)
    optimizers, fall = make_optimizers(model), max(1, round(FALL * len(steps)))
    unfinished = out / f"{name}.unfinished.pt"
    done = go_on(unfinished, model, *optimizers) if unfinished.exists() else 0
    started, used = time.monotonic(), time.process_time()
    for step in range(done + 1, len(steps) + 1):
        torch.manual_seed(seed * 1_000_000 + step)  # of the dropout: the same whether or not the training was stopped
        share = min(step / WARM_UP, 1.0, (len(steps) + 1 - step) / fall)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * share
        loss = loss_of(model, padded([examples[index] for index in steps[step - 1]], tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % KEEP_EVERY == 0:
            keep(unfinished, step, model, *optimizers)
            spent = f"{time.monotonic() - started:.0f} s, {time.process_time() - used:.0f} s of a core"
            print(f"{name} step {step} loss {loss.item():.4f} {spent}", flush=True)
        if step % MEASURE_EVERY == 0:
            print(f"{name} step {step}: {measure(model, tokenizer, task, 100)}", flush=True)
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out / name, max_shard_size="4MB")  # small files for a repository
    tokenizer.save_pretrained(out / name)
    unfinished.unlink(missing_ok=True)
    print(f"{name} in bfloat16, whole test set: {measure(model.float(), tokenizer, task, 1000)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl; default: the Hub's")
    parser.add_argument("--only", choices=tuple(KINDS))
    args = parser.parse_args()
    task = Multi30k(args.data, TEMPLATE)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(task.examples("train", None))
    for name in KINDS if args.only is None else (args.only,):
        train(name, task, args.out, tokenizer, KINDS[name][2])


if __name__ == "__main__":
    main()
