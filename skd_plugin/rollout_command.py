"""`skd rollout`: interleaved responses to a file of prompts, written as traces."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from skd_plugin.errors import RecipeError
from skd_plugin.prepare.rows import check_references, read_rows
from skd_plugin.run_folder import out_file


class Prompt(NamedTuple):
    ids: list[int]
    reference: str | None
    where: str  # file and line


def run_rollout(recipe: str, overrides: Iterable[str], prompts: str, samples: int, out: str) -> int:
    path = out_file(out)
    from skd_plugin.engine.set_up import set_up_offline

    set_up_offline()
    from skd_plugin.engine.arguments import engine_for
    from skd_plugin.engine.offline import SKDEngine
    from skd_plugin.engine.sampling_rule import SamplingRule
    from skd_plugin.prepare.load_run import load_models

    if samples < 1:
        raise RecipeError(f"--samples is {samples}; at least one response a prompt is needed")
    models = load_models(recipe, overrides)
    skd, max_len, max_new_tokens = models.skd, models.max_len, models.max_new_tokens
    given = read_prompts(Path(prompts), models.tokenizer, models.longest_prompt)
    repeated = [prompt for prompt in given for _ in range(samples)]
    limits = [min(max_new_tokens or max_len, max_len - len(prompt.ids)) for prompt in repeated]
    if skd.rollout.notice:
        print(skd.rollout.notice, file=sys.stderr)
    rule = SamplingRule.of(skd.rollout)
    if rule.reference_share:
        check_references(((prompt.where, prompt.reference) for prompt in given), '("reference": "...")')
    spec = engine_for(skd, models.options, student=models.student, cpu=models.cpu)
    engine = SKDEngine(replace(spec, teacher_hidden=False))
    finished = engine.generate(
        [prompt.ids for prompt in repeated],
        rule,
        limits,
        seed=skd.rollout.seed,
        texts=[prompt.reference for prompt in repeated],
        progress=True,
    )
    with path.open("w") as file:
        for sample in finished:
            texts = {"prompt": models.tokenizer.decode(sample.prompt_ids), "response": sample.text}
            file.write(json.dumps({**sample.trace.to_json(sample.prompt_ids, sample.finish), **texts}) + "\n")
    print(f"{len(finished)} responses are in {path}", file=sys.stderr)
    return 0


def read_prompts(path: Path, tokenizer: Any, longest: int) -> list[Prompt]:
    """The prompt of each line, of at most `longest` tokens, and its reference if it has one.

    Raises:
        RecipeError: no such file, a line that is neither form, a prompt too short or too long; names the line.
    """
    prompts = []
    for number, record in read_rows(path, option="--prompts"):
        where = f"{path}, line {number}"
        ids = _prompt_ids(record, where, tokenizer)
        if not 2 <= len(ids) <= longest:
            raise RecipeError(f"{where}: the prompt has {len(ids)} tokens; 2 to {longest} fit")
        reference = record.get("reference")
        if reference is not None and not (isinstance(reference, str) and reference):
            raise RecipeError(f'{where}: "reference" is {reference!r}, but must be a text')
        prompts.append(Prompt(ids, reference, where))
    if not prompts:
        raise RecipeError(f"{path} holds no prompt")
    return prompts


def _prompt_ids(record: dict[str, Any], where: str, tokenizer: Any) -> list[int]:
    if isinstance(record.get("prompt"), str):
        return tokenizer(record["prompt"], add_special_tokens=False).input_ids
    ids = record.get("prompt_ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
        raise RecipeError(
            f'{where}: a line is {{"prompt": "..."}} or {{"prompt_ids": [1, 2, 3]}} with ids below {len(tokenizer)}'
        )
    return ids
