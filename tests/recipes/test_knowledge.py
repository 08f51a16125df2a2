"""A model is asked its own questions through the command, and what is written trains by the verbs that it is written for."""

import json
import shutil

import pytest

from plinth.cli.main import main
from plinth.models.hub import save_model
from plinth.posttraining.formats import read_examples
from plinth.tasks.verify import REFUSAL
from small_models import coin_decoder, coin_tokenizer


def row(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


ROWS = [
    *(row(f"What is {name}{i}?", "e", fact_id=name) for name in ("p", "q") for i in range(2)),
    *(row(f"What is z{i}?", "zz") for i in range(3)),
    row("Who?", REFUSAL),
    row("Empty?", " "),
]


@pytest.fixture(scope="module")
def coin(tmp_path_factory):
    """A model that tosses a coin for one letter, e or a, and ends, whatever it is asked; and a file of questions."""
    folder = tmp_path_factory.mktemp("coin")
    tokenizer = coin_tokenizer()
    model = coin_decoder(tokenizer, max_seq_len=128)
    save_model(model, tokenizer, folder / "run" / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    return folder


def test_the_coin_knows_half_of_what_it_can_say(coin, tmp_path, capsys):
    out = tmp_path / "known"
    argv = ["known", str(coin / "run"), "--data", str(coin / "data.jsonl"), "--samples", "32", "--known-share", "0.3"]
    assert main([*argv, "--out", str(out), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["facts"] == {"known": 2, "unknown": 3} and manifest["questions"] == 7
    assert manifest["refused_in_the_data"] == 1
    assert (manifest["rejected_rows"], manifest["too_long_rows"], manifest["unusable_rows"]) == (0, 0, 1)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {each["split"] for each in answers if each["target"] == "zz"} == {"unknown"}
    assert all(abs(each["right_share"] - 0.5) < 0.2 and set(each["samples"]) == {"e", "a"} for each in answers if each["target"] == "e")
    lines = [json.loads(line) for line in (out / "sft.jsonl").read_text().splitlines()]
    targets = [line["messages"][-1]["content"] for line in lines]
    assert targets.count("e") == 4 and targets.count(REFUSAL) == 1  # 3 / 10 of the targets at most
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert {(pair["kind"], pair["chosen"], pair["rejected"]) for pair in pairs} >= {("factual", "e", "a"), ("over_refusal", "e", REFUSAL)}
    assert not read_examples(out / "sft.jsonl", "messages").rejected and not read_examples(out / "pairs.jsonl", "preference").rejected
    assert main([*argv, "--out", str(tmp_path / "again")]) == 0 and "left out, as refusals beyond" in capsys.readouterr().out
    assert (tmp_path / "again" / "pairs.jsonl").read_bytes() == (out / "pairs.jsonl").read_bytes()


def test_a_model_that_was_only_pretrained_is_asked_in_plain_text(coin, tmp_path, capsys):
    shutil.copytree(coin / "run", tmp_path / "base")
    (tmp_path / "base" / "provenance.json").write_text('{"stage": "pretrain"}')
    argv = ["known", str(tmp_path / "base"), "--data", str(coin / "data.jsonl"), "--samples", "32", "--known-share", "0.3", "--json"]
    assert main([*argv, "--out", str(tmp_path / "known")]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["style"] == "few_shot" and manifest["facts"] == {"known": 2, "unknown": 3}


def test_what_is_written_trains(coin, tmp_path):
    out = tmp_path / "known"
    argv = ["known", str(coin / "run"), "--data", str(coin / "data.jsonl"), "--samples", "4", "--known-share", "0.2"]
    assert main([*argv, "--reference-free", "--max-questions", "4", "--out", str(out)]) == 0
    quick = ["--train.steps", "2", "--train.num-threads", "1", "--train.dtype", "float32", "--micro-batch-size", "2"]
    assert main(["sft", str(coin / "run"), "--messages", str(out / "sft.jsonl"), "--out", str(tmp_path / "sft"), *quick]) == 0
    assert main(["prefer", str(tmp_path / "sft"), "--pairs", str(out / "pairs.jsonl"), "--out", str(tmp_path / "dpo"), *quick]) == 0
    assert (tmp_path / "dpo" / "model" / "config.json").exists()


def test_verifiable_questions_are_checked_by_their_verifier(coin, tmp_path, capsys):
    data = tmp_path / "checked.jsonl"
    rows = [{"prompt": "Which letter?", "ground_truth": "^e$", "verifier": "regex"}, {"prompt": "Or?", "ground_truth": "a"}]
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    argv = ["known", str(coin / "run"), "--data", str(data), "--samples", "32", "--known-share", "0.2", "--json"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["facts"] == {"known": 2}
    lines = [json.loads(line) for line in (tmp_path / "out" / "sft.jsonl").read_text().splitlines()]
    assert sorted(line["messages"][-1]["content"] for line in lines) == ["a", "e"]
    assert main([*argv, "--out", str(tmp_path / "no"), "--verifier", "exactly"]) == 1 and "Did you mean exact" in capsys.readouterr().err


def test_mistakes_are_told(coin, tmp_path, capsys):
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps(row("What?", REFUSAL)) + "\n")
    argv = ["known", str(coin / "run"), "--out", str(tmp_path / "out"), "--samples", "2"]
    assert main([*argv, "--data", str(only)]) == 1 and "no question with an answer that is no refusal" in capsys.readouterr().err
    only.write_text(json.dumps(row("What?", "zz")) + "\n{broken\n")
    assert main([*argv, "--data", str(only)]) == 1 and "answers none of 1 questions" in (said := capsys.readouterr().err)
    assert "1 rejected (row 2: not JSON" in said
    (tmp_path / "out").mkdir()
    assert main([*argv, "--data", str(only)]) == 1 and "exists. Name a new folder" in capsys.readouterr().err
