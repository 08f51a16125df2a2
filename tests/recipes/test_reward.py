"""`plinth reward` and `plinth reward score` through the command line: report, files, and what they print."""

import json

import pytest
import torch

from plinth.cli.main import main
from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.tokenizer.train import train_tokenizer

NAMES = ["copy", "move", "read", "write", "open", "close", "seek", "flush"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = train_tokenizer([f"What does {name} do? It does {name} things." for name in NAMES] * 3, 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16,
        intermediate_size=64, max_seq_len=64,
    )  # fmt: skip
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer, folder / "model")
    transcript = "\n\nHuman: What does {} do?\n\nAssistant: It does {}."
    records = [{"chosen": transcript.format(a, a), "rejected": transcript.format(a, b)} for a in NAMES for b in NAMES if a < b]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["reward", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--out", str(folder / "run")]
    options = ["--train.steps", "12", "--prompts-per-step", "14", "--held-out-share", "0.3", "--train.num-threads", "2"]
    assert main([*arguments, *options, "--train.optimizer.lr", "0.005"]) == 0
    return folder


def test_the_run_holds_the_report(trained):
    summary = json.loads((trained / "run/DONE").read_text())
    report = json.loads((trained / "run/evals/reward.json").read_text())
    assert summary["held_out"] == report and summary["prompts"] == 20 and report["pairs"] == 8
    assert set(report["baselines"]) == {"length", "words", "coin"} and report["verdict"].startswith("Right in")


def test_the_runs_report_draws_the_calibration(trained, capsys):
    assert main(["report", str(trained / "run")]) == 0
    page = (trained / "run/report.html").read_text()
    assert "reliability" in page and "mean score" in page and "Right in" in page


def test_score_reports_on_pairs_with_the_same_baselines(trained, capsys):
    tail = (trained / "pairs.jsonl").read_text().splitlines()[20:]
    (trained / "tail.jsonl").write_text("\n".join(tail))
    arguments = ["reward", "score", str(trained / "run"), "--data", str(trained / "tail.jsonl")]
    assert main([*arguments, "--json", "--out", str(trained / "scores.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    report = json.loads((trained / "run/evals/reward.json").read_text())
    assert found["accuracy"] == report["accuracy"] and found["baselines"] == report["baselines"]
    lines = [json.loads(line) for line in (trained / "scores.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == [0, 1] * 8 and lines[0]["row"] == 1
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "bag of words" in shown and "ties, which count half" in shown and "Scores: mean" in shown


def test_score_of_conversations_and_of_a_folder_without_baselines(trained, capsys):
    file = trained / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]}))
    assert main(["reward", "score", str(trained / "run"), "--data", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conversations"] == 1
    assert main(["reward", "score", str(trained / "run/model"), "--data", str(trained / "pairs.jsonl")]) == 0
    told = capsys.readouterr()
    assert "compares with a coin alone" in told.err and "bag of words" not in told.out


def test_rankings_go_the_same_way(trained, capsys):
    rows = [{"prompt": f"What does {a} do?", "completions": [f"It does {b}." for b in NAMES[:4]],
             "scores": [3 if a == b else 1 for b in NAMES[:4]]} for a in NAMES[:4]]  # fmt: skip
    (trained / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = trained / "ranked"
    arguments = ["reward", str(trained / "model"), "--data", str(trained / "ranked.jsonl"), "--out", str(out)]
    assert main([*arguments, "--held-out", str(trained / "ranked.jsonl"), "--train.steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 4 and found["held_out"]["pairs"] == 12 and found["held_out"]["prompts"] == 4


def test_a_single_held_out_prompt_leaves_the_difference_without_an_interval(trained, capsys):
    lines = (trained / "pairs.jsonl").read_text().splitlines()
    (trained / "one.jsonl").write_text("\n".join(lines[:3]))
    assert main(["reward", "score", str(trained / "run"), "--data", str(trained / "one.jsonl")]) == 0
    assert "? to ?" in " ".join(capsys.readouterr().out.split())


def test_a_published_reward_model_is_imported_and_scores_alike(trained, capsys):
    folder, pairs = str(trained / "imported"), str(trained / "pairs.jsonl")
    assert main(["import", str(trained / "run/model"), "--out", folder, "--no-check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "reward model" and "plinth reward score" in found["used_by"]
    reports = []
    for path in (folder, str(trained / "run/model")):
        assert main(["reward", "score", path, "--data", pairs, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
