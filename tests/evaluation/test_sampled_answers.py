"""Quality against the number of answers, from a model whose answers are known by heart, through the command line."""

import json

import pytest

from plinth.cli.main import main
from plinth.config import UserError
from plinth.evaluation.sampled_answers import answer_curve, picture
from plinth.inference.engine import Engine
from plinth.inference.text import TextEngine
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from small_models import coin_decoder, coin_tokenizer

QUESTIONS = [
    {"id": f"f{i}/{j}", "group": "known", "fact_id": f"f{i}#k", "kind": "k", "question": f"What is {i}{j}?", "answers": ["e"]}
    for i in range(3)
    for j in range(2)
]


@pytest.fixture(scope="module")
def tokenizer():
    return coin_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    """Tosses a coin for one letter, e or a, and ends: nothing but the last token's embedding reaches the head."""
    return coin_decoder(tokenizer)


def test_a_coin_gives_the_curve_of_a_coin(model, tokenizer):
    """Half of the answers are right: the more of them, the surer that one is, while a vote stays what it is."""
    text = TextEngine(Engine(model, max_batch=32, eos_ids=(tokenizer.end_of_text_id, tokenizer.end_id)), tokenizer)
    result = answer_curve(text, QUESTIONS, samples=64, seed=1)
    rows = result["rows"]
    assert [row["n"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    for row in rows[:4]:  # 384 tosses in all
        assert abs(row["coverage"]["value"] - (1 - 0.5 ** row["n"])) < 0.1
        assert abs(row["best_of"]["value"] - 0.5) < 0.1
    first, last = rows[0], rows[-1]
    assert first["majority"]["value"] == pytest.approx(first["coverage"]["value"]) and last["coverage"]["value"] == 1.0
    assert (first["completion_tokens"], last["completion_tokens"]) == (1.0, 64.0)
    assert last["prompt_tokens"] == first["prompt_tokens"] and last["flops"] < 64 * first["flops"]
    assert result == answer_curve(text, QUESTIONS, samples=64, seed=1)
    assert picture(result).startswith("<svg")


def test_the_command_writes_the_curve_and_its_picture(model, tokenizer, tmp_path, capsys):
    save_model(model, tokenizer, tmp_path / "run" / "model")
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    argv = ["samples", str(tmp_path / "run"), "--samples", "4", "--max-questions", "4", "--out", str(tmp_path / "out")]
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "samples.json").read_text()) and len(printed["rows"]) == 3
    assert main(argv) == 0 and "GFLOP" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples.svg").read_text().startswith("<svg")
    assert main([*argv[:2], "--facts", str(tmp_path)]) == 1 and "holds no questions.jsonl" in capsys.readouterr().err


def test_what_gives_no_curve_is_named(model, tokenizer):
    text = TextEngine(Engine(model), tokenizer)
    with pytest.raises(UserError, match="samples=1 gives no curve"):
        answer_curve(text, QUESTIONS, samples=1)
    with pytest.raises(UserError, match="no question about a known fact"):
        answer_curve(text, [question | {"group": "invented"} for question in QUESTIONS])
