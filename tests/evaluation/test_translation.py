"""Scores of translations: sacrebleu's own numbers, with an interval that the same texts give again."""

import json

import pytest

from plinth.config import UserError
from plinth.evaluation.translation import translation_scores

sacrebleu = pytest.importorskip("sacrebleu")

TEXTS = ["Ein Hund läuft über die Wiese.", "Zwei Kinder spielen im Sand.", "Der alte Mann liest ein Buch."] * 5
WORSE = ["Ein Hund rennt über die Wiese.", "Zwei Kinder spielen im Sand.", "Der Mann liest ein altes Buch."] * 5


def test_they_are_those_of_sacrebleu():
    bleu, chrf = translation_scores(WORSE, TEXTS)
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(WORSE, [TEXTS]).score)
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(WORSE, [TEXTS]).score)
    assert "tok:13a" in bleu.signature and bleu.n == 15
    assert json.loads(json.dumps(bleu.ci95)) == list(bleu.ci95)
    assert bleu.ci95[0] < bleu.value < bleu.ci95[1] and translation_scores(WORSE, TEXTS) == [bleu, chrf]


def test_the_same_text_is_perfect():
    assert [score.value for score in translation_scores(TEXTS, TEXTS)] == [pytest.approx(100)] * 2
    assert translation_scores(TEXTS[:1], TEXTS[:1])[0].ci95 is None


def test_each_translation_needs_its_reference():
    with pytest.raises(UserError, match="15 translations and 14 references"):
        translation_scores(TEXTS, TEXTS[1:])
