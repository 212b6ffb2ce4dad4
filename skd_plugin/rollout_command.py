"""`skd rollout`: interleaved responses to a file of prompts, written as traces."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from skd_plugin.errors import RecipeError


class Prompt(NamedTuple):
    ids: list[int]
    reference: str | None
    line: int  # of the file


def run_rollout(recipe: str, overrides: Iterable[str], prompts: str, samples: int, out: str) -> int:
    from skd_plugin.engine.offline import SKDEngine, engine_arguments, set_vllm_up

    set_vllm_up()
    from skd_plugin.engine.sampling_rule import SamplingRule
    from skd_plugin.prepare.load_run import load_models

    if samples < 1:
        raise RecipeError(f"--samples is {samples}; at least one response a prompt is needed")
    models = load_models(recipe, overrides)
    skd, max_len, max_new_tokens = models.skd, models.max_len, models.max_new_tokens
    given = read_prompts(Path(prompts), models.tokenizer, max_len, max_new_tokens)
    repeated = [prompt for prompt in given for _ in range(samples)]
    limits = [min(max_new_tokens or max_len, max_len - len(prompt.ids)) for prompt in repeated]
    if skd.rollout.notice:
        print(skd.rollout.notice, file=sys.stderr)
    rule = SamplingRule.of(skd.rollout)
    if rule.reference_share:
        check_references(given, prompts)
    engine = SKDEngine(
        **engine_arguments(
            skd.teacher.model_name_or_path,
            models.student,
            skd.rollout.draft_len,
            max_len,
            skd.loss.top_k,
            skd.loss.temperature,
            **skd.vllm,
        )
    )
    finished = engine.generate(
        [prompt.ids for prompt in repeated],
        rule,
        limits,
        seed=skd.rollout.seed,
        texts=[prompt.reference for prompt in repeated],
        progress=True,
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for sample in finished:
            texts = {"prompt": models.tokenizer.decode(sample.prompt_ids), "response": sample.text}
            file.write(json.dumps({**sample.trace.to_json(sample.prompt_ids, sample.finish), **texts}) + "\n")
    print(f"{len(finished)} responses are in {path}", file=sys.stderr)
    return 0


def read_prompts(path: Path, tokenizer: Any, max_len: int, max_new_tokens: int | None) -> list[Prompt]:
    """The prompt of each line, and its reference if it has one.

    Raises:
        RecipeError: no such file, a line that is neither form, a prompt too short or too long; names the line.
    """
    if not path.is_file():
        raise RecipeError(f"--prompts: there is no file {path}")
    longest = max_len - (max_new_tokens or 1)
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        ids = _prompt_ids(line, f"{path}, line {number}", tokenizer)
        if not 2 <= len(ids) <= longest:
            raise RecipeError(f"{path}, line {number}: the prompt has {len(ids)} tokens; 2 to {longest} fit")
        prompts.append(Prompt(ids, _reference(json.loads(line), f"{path}, line {number}"), number))
    if not prompts:
        raise RecipeError(f"{path} holds no prompt")
    return prompts


def check_references(prompts: list[Prompt], path: str) -> None:
    """Raises RecipeError for the first prompt without a reference: which ones are needed is drawn."""
    for prompt in prompts:
        if prompt.reference is None:
            raise RecipeError(
                f'{path}, line {prompt.line}: skd.rollout.method needs a reference, so a line is {{"prompt": "...", '
                '"reference": "..."}'
            )


def _reference(record: dict[str, Any], where: str) -> str | None:
    reference = record.get("reference")
    if reference is not None and not (isinstance(reference, str) and reference):
        raise RecipeError(f'{where}: "reference" is {reference!r}, but must be a text')
    return reference


def _prompt_ids(line: str, where: str, tokenizer: Any) -> list[int]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where} is not JSON: {error}") from error
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return tokenizer(record["prompt"], add_special_tokens=False).input_ids
    ids = record.get("prompt_ids") if isinstance(record, dict) else None
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
        raise RecipeError(
            f'{where}: a line is {{"prompt": "..."}} or {{"prompt_ids": [1, 2, 3]}} with ids below {len(tokenizer)}'
        )
    return ids
