"""What a model knows by its samples, and the examples and pairs that follow, worked by hand."""

from collections import Counter

import pytest

from plinth.config import UserError
from plinth.tasks.knowledge import Asked, KnowledgeConfig, factuality_pairs, judge_knowledge, refusal_aware_lines
from plinth.tasks.verify import REFUSAL


def asked(fact: str, target: str, *texts: str, phrasing: int = 0) -> Asked:
    return Asked([{"role": "user", "content": f"{fact} {phrasing}?"}], target, fact, texts)


RIGHT = asked("sky", "Blue.", "blue", "Blue.", "Red.", REFUSAL)  # 2 of 4
HALF = asked("grass", "Green.", "Green.", "Red.", "red", "Pink.")  # 1 of 4
NEVER = asked("void", "Black.", "Red.", REFUSAL, "Pink.", "red")  # 0 of 4


def test_the_split_is_by_the_share_of_right_answers():
    judged = judge_knowledge([RIGHT, HALF, NEVER], KnowledgeConfig())
    assert [(each.share, each.split) for each in judged] == [(0.5, "known"), (0.25, "between"), (0.0, "unknown")]
    assert judged[0].right == ["blue"] and judged[0].wrong == ["Red."]
    assert judged[1].wrong == ["Red.", "Pink."]  # the most frequent first, each once
    strict = judge_knowledge([RIGHT, HALF, NEVER], KnowledgeConfig(known_share=0.6, unknown_share=0.25))
    assert [each.split for each in strict] == ["between", "unknown", "unknown"]


def test_phrasings_of_a_fact_are_judged_together():
    other = asked("sky", "Blue.", "Red.", "Red.", "Red.", "Red.", phrasing=1)
    judged = judge_knowledge([RIGHT, other], KnowledgeConfig())
    assert [(each.share, each.split) for each in judged] == [(0.25, "between")] * 2


def test_without_the_truth_the_most_frequent_answer_counts():
    sure = asked("void", "Black.", "Red.", "red", "Red", "Pink.")
    torn = asked("moon", "White.", "Red.", "Pink.", "Blue.", "Green.")
    silent = asked("sun", "Yellow.", *[REFUSAL] * 4)
    judged = judge_knowledge([sure, torn, silent], KnowledgeConfig(reference_free=True, unknown_share=0.25))
    assert [(each.answer, each.share, each.split) for each in judged] == [
        ("Red.", 0.75, "known"),
        ("Red.", 0.25, "unknown"),
        ("Yellow.", 0.0, "unknown"),
    ]
    pairs, _ = factuality_pairs(judged, KnowledgeConfig(reference_free=True, max_refusal_pair_share=0.0))
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("Red.", "Pink."), ("Red.", REFUSAL)}


def test_known_facts_keep_their_answer_and_unknown_ones_are_refused_within_the_bound():
    many = [asked(f"void {i}", "Black.", "Red.", "Red.") for i in range(9)]
    config = KnowledgeConfig(max_refusal_share=0.5)
    judged = judge_knowledge([RIGHT, HALF, *many], config)
    lines, left_out = refusal_aware_lines(judged, [asked("x", "I don't know that.")], config)
    targets = Counter(line["messages"][-1]["content"] for line in lines)
    assert (targets["Blue."], targets["Green."]) == (1, 1)
    assert sum(count for text, count in targets.items() if text.startswith("I don't")) == 2 and left_out == 8
    assert lines == refusal_aware_lines(judged, [asked("x", "I don't know that.")], config)[0]
    unbounded, left_out = refusal_aware_lines(judged, [], KnowledgeConfig(max_refusal_share=0.9))
    assert len(unbounded) == 11 and left_out == 0
    assert all(line["messages"][-1]["content"] == REFUSAL for line in unbounded if line["kind"] == "unknown")


def test_pairs_prefer_truth_to_error_answers_to_silence_and_silence_to_invention():
    judged = judge_knowledge([RIGHT, HALF, NEVER], KnowledgeConfig())
    pairs, left_out = factuality_pairs(judged, KnowledgeConfig(pairs_per_question=2))
    assert {(pair["fact_id"], pair["kind"], pair["chosen"], pair["rejected"]) for pair in pairs} == {
        ("sky", "factual", "blue", "Red."),
        ("sky", "over_refusal", "blue", REFUSAL),
        ("grass", "factual", "Green.", "Red."),
        ("grass", "factual", "Green.", "Pink."),
        ("void", "unknown", REFUSAL, "Red."),
        ("void", "unknown", REFUSAL, "Pink."),
    }
    assert left_out == 0 and pairs[0]["prompt"][0]["role"] == "user"
    fewer, left_out = factuality_pairs(judged, KnowledgeConfig(max_refusal_pair_share=0.2))
    assert sum(pair["kind"] == "unknown" for pair in fewer) == 1 and left_out == 1


def test_pairs_against_a_refusal_are_no_more_than_pairs_for_one():
    known = [asked(f"sky {i}", "Blue.", "Blue.", "Blue.") for i in range(20)]
    pairs, _ = factuality_pairs(judge_knowledge([*known, NEVER], KnowledgeConfig()), KnowledgeConfig())
    assert Counter(pair["kind"] for pair in pairs) == {"over_refusal": 2, "unknown": 2}


def test_what_is_right_can_be_anothers_to_say_and_the_models_words_are_learnt_then():
    def ends_alike(verifier, text, answer):
        assert verifier == "numeric"
        return float(text.split()[-1] == answer)

    question = Asked([{"role": "user", "content": "2 + 2?"}], "4", "sum", ("It is 4", "4", "It is 4", "5"), "numeric", True)
    (judged,) = judge_knowledge([question], KnowledgeConfig(), ends_alike)
    assert (judged.share, judged.right, judged.wrong) == (0.75, ["It is 4", "4"], ["5"])
    lines, _ = refusal_aware_lines([judged], [], KnowledgeConfig())
    assert lines[0]["messages"][-1]["content"] == "It is 4"


def test_a_model_that_knows_nothing_is_told_so():
    with pytest.raises(UserError, match="answers none of 1 questions right often enough"):
        refusal_aware_lines(judge_knowledge([NEVER], KnowledgeConfig()), [], KnowledgeConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"known_share": 0.1}, "unknown_share=0.1 and known_share=0.1"),
        ({"max_refusal_share": 1.0}, "max_refusal_share=1.0 must be 0 or more and below 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(UserError, match=message):
        KnowledgeConfig(**options)
