import math

import pytest

from plinth.config import UserError
from plinth.inference.classify import classify

LABELS = ["main", "café", "text that"]


def chain(engine, prompt: str, label: str, end: bool = False) -> float:
    """The log-probability of a label behind a prompt, token by token."""
    tokens = engine.tokenizer.encode(prompt)
    total = 0.0
    for token in engine.tokenizer.encode(label) + [engine.engine.eos_ids[0]] * end:
        total += engine.engine.score([[*tokens, token]])[0][-1]
        tokens = [*tokens, token]
    return total


def test_probabilities_are_those_of_the_labels_as_continuations(text_engine):
    results = classify(text_engine, ["def ", "Größe,"], LABELS)
    for prompt, result in zip(["def ", "Größe,"], results):
        scores = [chain(text_engine, prompt, label) for label in LABELS]
        total = sum(math.exp(score) for score in scores)
        assert list(result.scores.values()) == pytest.approx(scores, abs=1e-4)
        assert list(result.probabilities.values()) == pytest.approx([math.exp(score) / total for score in scores], rel=1e-3)
        assert sum(result.probabilities.values()) == pytest.approx(1)
        assert result.label == LABELS[scores.index(max(scores))]


def test_per_token_and_neutral_prompts_correct_the_scores(text_engine):
    plain, corrected = (classify(text_engine, ["def "], LABELS, neutral=n)[0].scores for n in (None, "\n"))
    before = classify(text_engine, ["\n"], LABELS)[0].scores
    lengths = {label: len(text_engine.tokenizer.encode(label)) for label in LABELS}
    assert corrected == pytest.approx({label: plain[label] - before[label] for label in LABELS}, abs=1e-4)
    per_token = classify(text_engine, ["def "], LABELS, per_token=True)[0].scores
    assert per_token == pytest.approx({label: plain[label] / lengths[label] for label in LABELS}, abs=1e-4)


def test_a_label_that_begins_another_is_told_apart_by_its_end(text_engine):
    scores = classify(text_engine, ["def "], ["main", "main("])[0].scores
    assert scores["main"] == pytest.approx(chain(text_engine, "def ", "main", end=True), abs=1e-4)


def test_a_batch_gives_what_each_prompt_gives_alone(text_engine):
    prompts = ["def ", "return", ""]
    assert classify(text_engine, prompts, LABELS) == [classify(text_engine, [prompt], LABELS)[0] for prompt in prompts]


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], ["a", ""]])
def test_labels_are_different_texts(text_engine, labels):
    with pytest.raises(UserError, match="labels="):
        classify(text_engine, ["def "], labels)
