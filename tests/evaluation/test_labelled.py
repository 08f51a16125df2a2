"""Scores of labels, entities and answers, by hand."""

import pytest

from plinth.evaluation.labelled import entities, macro_f1, score_answers, score_labels, score_tags, word_f1


def test_accuracy_stands_beside_the_commonest_label():
    scores = score_labels(["a", "a", "b", "a"], ["a", "b", "b", "a"])
    assert scores["accuracy"].value == 0.75 and scores["majority"].value == 0.5 and scores["accuracy"].n == 4
    assert macro_f1(["a", "a", "b", "a"], ["a", "b", "b", "a"]) == pytest.approx((4 / 5 + 2 / 3) / 2)


@pytest.mark.parametrize(
    "tags, found",
    [
        ("B-P I-P O B-L", {("P", 0, 2), ("L", 3, 4)}),
        ("B-P B-P I-P", {("P", 0, 1), ("P", 1, 3)}),
        ("I-P I-P O", {("P", 0, 2)}),  # begun without a B
        ("B-P I-L", {("P", 0, 1), ("L", 1, 2)}),
        ("O NOUN NOUN", {("NOUN", 1, 2), ("NOUN", 2, 3)}),  # tags without a prefix: a word each
        ("O O", set()),
    ],
)
def test_entities_of_tags(tags, found):
    assert entities(tags.split()) == found


def test_f1_counts_whole_entities():
    right = [["B-P", "I-P", "O"], ["B-L", "O", "O"]]
    found = [["B-P", "O", "O"], ["B-L", "O", "O"]]
    scores = score_tags(found, right)
    assert scores["entity_f1"].value == pytest.approx(0.5) and scores["word_accuracy"].value == pytest.approx(5 / 6)
    assert "entity_f1" not in score_tags([["O"]], [["O"]])


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert word_f1("the Cat sat", "cat!") == pytest.approx(2 / 3)
    scores = score_answers(["The cat.", "dog", "", "x"], [["cat", "a dog"], ["big dog"], [], []])
    assert scores["exact_match"].value == 0.5 and scores["exact_match_none"].value == 0.5
    assert scores["f1"].value == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
