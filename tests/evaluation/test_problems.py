"""Problems with a verifier: pass@k of a model that is known, through the command too."""

import json

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.evaluation.problems import Problem, ProblemConfig, score_problems
from plinth.inference.engine import Engine
from plinth.inference.text import TextEngine
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, save_model
from plinth.models.transformer import Transformer
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that says 0 or 1 and nothing else, by turns of chance."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["01"], 262)
    shape = DecoderConfig(
        vocab_size=262, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64, max_seq_len=32,
        tie_embeddings=False,
    )  # fmt: skip
    decoder = Transformer(shape).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoder.embed.weight.copy_(torch.ones(262, 32))
        decoder.head.weight.fill_(-1.0)
        decoder.head.weight[tokenizer.encode("01")] = 1.0
        decoder.head.weight[tokenizer.encode("1")[0], 0] = 1.5  # a little more likely
    save_model(decoder, tokenizer, folder / "model")
    return folder


def text_engine(model):
    tokenizer = Tokenizer.load(model / "model")
    return TextEngine(Engine(load_decoder(model / "model"), eos_ids=tokenizer.end_ids), tokenizer)


def ask(answer, verifier=None):
    return Problem([{"role": "user", "content": "heads?"}], answer, verifier)


def test_pass_at_k_of_a_coin(model):
    problems = [ask("1"), ask("0"), ask("0", "numeric"), ask("^[01]$", "regex")]
    found = score_problems(text_engine(model), problems, ProblemConfig(samples=8, max_tokens=1))
    scores = {name: score["value"] for name, score in found["scores"].items()}
    assert scores["greedy"] == 0.5 and list(scores) == ["greedy", "pass@1", "pass@2", "pass@4", "pass@8"]
    shares = [sample["right_of_samples"] / 8 for sample in found["samples"]]
    assert shares[3] == 1.0 and all(0 < share < 1 for share in shares[:3])
    assert scores["pass@1"] == pytest.approx(sum(shares) / 4) and scores["pass@1"] < scores["pass@2"] < scores["pass@8"] == 1.0
    assert found["protocol"]["verifiers"] == ["exact", "numeric", "regex"]
    assert found == score_problems(text_engine(model), problems, ProblemConfig(samples=8, max_tokens=1))


def test_the_greedy_answer_alone_and_mistakes(model):
    found = score_problems(text_engine(model), [ask("1")] * 3, ProblemConfig(samples=0, max_problems=2, max_tokens=1))
    assert list(found["scores"]) == ["greedy"] and found["scores"]["greedy"]["n"] == 2
    with pytest.raises(UserError, match="verifier='exct' is none of"):
        score_problems(text_engine(model), [ask("1", "exct")])
    with pytest.raises(UserError, match="samples=-1 must be at least 0"):
        ProblemConfig(samples=-1)


def test_the_command_asks_problems_of_a_file(model, tmp_path, capsys):
    rows = [{"prompt": "heads?", "answer": "1"}, {"prompt": "tails?", "answer": 0, "verifier": "numeric"}, {"prompt": "?"}]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "evaluate",
        str(model),
        "--problems",
        str(tmp_path / "problems.jsonl"),
        "--problem.samples",
        "4",
        "--problem.max-tokens",
        "1",
    ]
    assert main([*arguments, "--json", "--out", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert found == json.loads((tmp_path / "found.json").read_text()) and found["rejected_rows"] == 1 and "1 rejected" in printed.err
    assert set(found["scores"]) == {"greedy", "pass@1", "pass@2", "pass@4"}
    assert main(arguments) == 0 and "pass@4" in capsys.readouterr().out
