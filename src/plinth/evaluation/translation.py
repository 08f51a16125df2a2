"""BLEU and chrF of translations, by sacrebleu: the numbers that papers report, with the signatures that make them comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plinth.config import UserError

RESAMPLES = 1000


@dataclass(frozen=True)
class TranslationScore:
    """One measure of a set of translations."""

    name: str
    """bleu or chrf"""
    value: float
    """of the whole set, 0 to 100"""
    ci95: tuple[float, float] | None
    """interval that 95 % of resampled sets lie in (bootstrap); None for a single sentence"""
    n: int
    """sentences"""
    signature: str
    """sacrebleu's own description of how it was taken"""


def translation_scores(translations: Sequence[str], references: Sequence[str]) -> list[TranslationScore]:
    """Score translations against one reference each.

    Raises UserError when their numbers differ, or when sacrebleu is not installed. The bootstrap's draws are sacrebleu's, with its
    own fixed seed, so the same texts give the same interval.
    """
    if len(translations) != len(references) or not references:
        raise UserError(f"{len(translations)} translations and {len(references)} references: each translation needs one reference.")
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError("sacrebleu is not installed. Install it: pip install 'plinth-fm[translation]'") from None
    several = len(references) > 1
    scores = []
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found = metric.corpus_score(list(translations), [list(references)], n_bootstrap=RESAMPLES if several else 1)
        interval = (float(found._mean - found._ci), float(found._mean + found._ci)) if several else None
        scores.append(TranslationScore(name, float(found.score), interval, len(references), str(metric.get_signature())))
    return scores
