"""COMET of translations that `skd rollout` has sampled.

    skd rollout RECIPE openrlhf.actor.model_name_or_path=runs/X/model skd.rollout.method=on_policy \\
        skd.rollout.student_temperature=0 --prompts prompts.jsonl --out traces.jsonl
    python -m venv comet && comet/bin/pip install 'unbabel-comet>=2.2,<3'
    comet/bin/python scripts/score_comet.py runs/X/data/test.jsonl traces.jsonl

prompts.jsonl has a line {"prompt": "..."} for each test prompt, in the chat template if the models have one.
unbabel-comet needs transformers below 5, so that it has an environment of its own; this script imports nothing of the
plugin. The first file is the run's, with the references; prompts of the second are found in it by their text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

MODEL = "Unbabel/wmt22-comet-da"  # the paper's
BEFORE, AFTER = "This is the Assamese sentence: ", " Here is the English translation:"


def triples(test: Path, traces: Path) -> list[dict[str, str]]:
    """COMET's input: source, translation and reference of every trace.

    Raises:
        SystemExit: a trace has a prompt that is not in the test file.
    """
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    found = []
    for line in traces.read_text().splitlines():
        trace = json.loads(line)
        row = next((row for row in rows if row["input"] in trace["prompt"]), None)  # a chat template may be around it
        if row is None:
            raise SystemExit(f"{traces}: no prompt of {test} is in {trace['prompt'][:80]!r}")
        source = row["input"].partition(BEFORE)[2].partition(AFTER)[0]
        found.append({"src": source, "mt": trace["response"].strip(), "ref": json.loads(row["label"])["answer"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", type=Path, help="data/test.jsonl of a run with task flores")
    parser.add_argument("traces", type=Path, help="traces with the responses to its prompts")
    parser.add_argument("--gpus", type=int, default=0)
    args = parser.parse_args()
    data = triples(args.test, args.traces)
    from comet import download_model, load_from_checkpoint

    model = load_from_checkpoint(download_model(MODEL))
    score = model.predict(data, batch_size=8, gpus=args.gpus).system_score
    print(f"COMET ({MODEL}) of {len(data)} translations: {score:.4f}")


if __name__ == "__main__":
    main()
