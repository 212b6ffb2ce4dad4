"""Scores of a text against references, by the libraries that everybody reports them with; all in [0, 1].

The libraries are imported where they are used: a run that scores nothing by them does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


@lru_cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@lru_cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"])


def chrf(response: str, references: Sequence[str]) -> float:
    """Sentence chrF2 (Popovic 2015), of the best reference."""
    return min(_chrf().sentence_score(response, list(references)).score / 100, 1.0)


def corpus_chrf(responses: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of a corpus: n-gram counts are summed before they are divided."""
    return min(_chrf().corpus_score(list(responses), [list(references)]).score / 100, 1.0)


def corpus_bleu(responses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus with sacreBLEU's tokenisation 13a."""
    from sacrebleu import corpus_bleu as score

    return min(score(list(responses), [list(references)], force=True).score / 100, 1.0)


def of_translations(responses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Figures of a corpus of translations, one reference each, beside the mean of their sentence chrF."""
    return {"corpus_chrf": corpus_chrf(responses, references), "bleu": corpus_bleu(responses, references)}


def rouge(response: str, references: Sequence[str]) -> dict[str, float]:
    """F measures of ROUGE-1, ROUGE-2 and ROUGE-L without stemming, each of the best reference."""
    best = _rouge().score_multi(list(references), response)
    return {
        name: best[key].fmeasure for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"))
    }
