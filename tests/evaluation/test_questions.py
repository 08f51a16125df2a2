"""Questions: which are asked, how they are put, and what the answers are worth."""

import json

import pytest

from plinth.config import UserError
from plinth.evaluation.questions import (
    Shot,
    choose_shots,
    few_shot_prompt,
    judge,
    phrasing_agreements,
    read_questions,
    read_shots,
    sample_questions,
    score_samples,
)
from plinth.tasks.verify import REFUSAL, is_refusal


def question(group: str, fact: int, phrasing: int, answer: str = "Copy a file.", kind: str = "describe") -> dict:
    fact_id = f"{group}.f{fact}#{kind}"
    text = f"{group} {fact} {phrasing}?"
    expected = [REFUSAL] if group == "invented" else [answer]
    return {"id": f"{fact_id}/{phrasing}", "group": group, "fact_id": fact_id, "kind": kind, "question": text, "answers": expected}


QUESTIONS = [question(group, fact, phrasing) for group in ("known", "heldout", "invented") for fact in range(20) for phrasing in range(3)]


def test_whole_facts_are_sampled_within_the_limit():
    chosen = sample_questions(QUESTIONS, 10, seed=0)
    for group in ("known", "heldout", "invented"):
        ids = [q["fact_id"] for q in chosen if q["group"] == group]
        assert len(ids) == 9 and all(ids.count(fact_id) == 3 for fact_id in ids)
    assert chosen == sample_questions(list(reversed(QUESTIONS))[::-1], 10, seed=0)
    assert {q["id"] for q in chosen} != {q["id"] for q in sample_questions(QUESTIONS, 10, seed=1)}
    assert len(sample_questions(QUESTIONS, None, seed=0)) == len(QUESTIONS)
    assert len(sample_questions(QUESTIONS, 2, seed=0)) == 9  # one whole fact of each group


def test_the_order_of_the_file_does_not_matter():
    ids = [q["id"] for q in sample_questions(QUESTIONS, 30, seed=0)]
    assert sorted(ids) == sorted(q["id"] for q in sample_questions(QUESTIONS[::-1], 30, seed=0))


def test_shots_hold_one_refusal_and_nothing_that_is_asked():
    shots = [Shot(f"known.f{i}#{kind}", f"{kind} {i}?", f"Answer {i}.") for i in range(20) for kind in ("describe", "module")]
    shots += [Shot(f"invented:m.g{i}#describe", f"g{i}?", REFUSAL) for i in range(5)]
    asked = [question("known", fact, 0) for fact in range(15)]
    chosen = choose_shots(shots, asked, seed=0)
    assert len(chosen) == 4 and sum(is_refusal(shot.answer) for shot in chosen) == 1
    assert {shot.fact_id.partition("#")[2] for shot in chosen} == {"describe", "module"}
    assert not {shot.fact_id.partition("#")[0] for shot in chosen} & {f"known.f{i}" for i in range(15)}
    assert chosen == choose_shots(shots, asked, seed=0) != choose_shots(shots, asked, seed=1)
    with pytest.raises(UserError, match="needs 4 examples with one refusal; 3 are left"):
        choose_shots(shots[:3], [], seed=0)


def test_few_shot_prompt_is_plain_text():
    prompt = few_shot_prompt([Shot("a", "What?", "That."), Shot("b", "Who?", REFUSAL)], "Where?")
    assert prompt == "Question: What?\nAnswer: That.\n\nQuestion: Who?\nAnswer: I don't know.\n\nQuestion: Where?\nAnswer:"


def test_scores_by_hand():
    answers = {
        "known.f0#describe": ["Copy a file.", "copy a file", "Move a file."],  # 2 of 3 right, one pair of three agrees
        "known.f1#describe": [REFUSAL, REFUSAL, "Copy a file."],
        "heldout.f0#describe": ["Copy", REFUSAL, "Copy a file."],
        "invented.f0#describe": [REFUSAL, "Copy a file.", ""],
    }
    asked = [q for q in QUESTIONS if q["fact_id"] in answers]
    samples = [judge(q, answers[q["fact_id"]][int(q["id"][-1])]) for q in asked]
    scores = score_samples(samples, {"note": 1}).scores
    values = {name: score.value for name, score in scores.items()}
    assert values == pytest.approx(
        {
            "known_exact": 3 / 6,
            "known_f1": (1 + 1 + 0.5 + 0 + 0 + 1) / 6,
            "over_refusal": 2 / 6,
            "consistency": (1 / 3 + 1 / 3) / 2,
            "heldout_exact": 1 / 3,
            "heldout_f1": (2 / 3 + 0 + 1) / 3,
            "heldout_refusal": 1 / 3,
            "invented_refusal": 1 / 3,
            "invented_false": 2 / 3,
            "accuracy_answered": 4 / 8,
            "coverage": 8 / 12,
            "refusal_precision": 2 / 4,
            "refusal_recall": 2 / 5,
        }
    )
    assert scores["known_exact"].n == 2 and scores["invented_false"].n == 1 and scores["consistency"].n == 2
    assert scores["known_f1"].protocol == {"note": 1}
    assert [sample["correct"] for sample in samples if sample["group"] == "invented"] == [True, False, False]


def test_a_group_that_was_not_asked_has_no_score():
    samples = [judge(question("known", 0, 0), "Copy a file.")]
    assert set(score_samples(samples, {}).scores) == {"known_exact", "known_f1", "over_refusal", "accuracy_answered", "coverage"}
    assert phrasing_agreements(samples) == []


def test_kinds_are_scored_apart():
    samples = [judge(question("known", 0, 0), "Copy a file."), judge(question("known", 0, 0, "shutil", "module"), "os")]
    by_kind = score_samples(samples, {}).by_kind
    assert by_kind["describe"]["known_exact"].value == 1.0 and by_kind["module"]["known_exact"].value == 0.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1}', "line 2 has no group, fact_id"),
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2 is not an object"),
        (json.dumps(question("known", 0, 0) | {"group": "other"}), "group='other' is not one of known"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        read_questions(path)


def test_absent_and_empty_files_are_named(tmp_path):
    with pytest.raises(UserError, match="questions.jsonl does not exist"):
        read_questions(tmp_path / "questions.jsonl")
    (tmp_path / "questions.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(tmp_path / "questions.jsonl")


def test_shots_are_single_turns_on_one_line(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}], "fact_id": "a#b"},
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Two\nlines"}]},
        {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "What?"}, {"role": "assistant", "content": "x"}]},
    ]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_shots(tmp_path / "sft.jsonl") == [Shot("a#b", "What?", "That.")]
