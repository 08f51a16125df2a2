"""Evaluating models and builds through the library and the command line, on a tiny model of random weights."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError, read_json
from plinth.data.shards import pack_corpus
from plinth.evaluation.run import EvaluationConfig, compare_samples, compare_stages, evaluate_build, evaluate_model
from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.run import Run
from plinth.tasks.verify import REFUSAL
from plinth.tokenizer.train import train_tokenizer

TEXTS = [f"Question: What does m.f{i} do?\nAnswer: Copy file number {i}.\nI don't know." for i in range(8)]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def messages(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A finished build of two stages whose models were never trained."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer(TEXTS, 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48,
        max_seq_len=96,
    )  # fmt: skip
    (path / "corpus").mkdir(parents=True)
    for split in ("train", "heldout"):
        table = pa.table({"text": TEXTS, "kind": ["text"] * 8, "doc_id": [str(i) for i in range(8)]})
        pq.write_table(table, path / "corpus" / f"{split}.parquet")
    pack_corpus(path / "corpus", tokenizer, path / "shards")
    for seed, stage in enumerate(("pretrain", "sft")):
        run = Run.create(path / stage, stage, {}, seed=seed)
        model = Transformer(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2, generator=generator)
        save_model(model, tokenizer, run.model_dir)
        run.finish({})
    groups = [
        ("known", "m.f{}", "Copy file number {}."),
        ("heldout", "m.h{}", "Move file number {}."),
        ("invented", "invented:m.g{}", REFUSAL),
    ]
    questions = [
        {"id": f"{name.format(i)}#describe/{p}", "group": group, "fact_id": f"{name.format(i)}#describe", "kind": "describe", "phrasing": p,
         "question": f"{word} {name.format(i)}?", "answers": [answer.format(i)], "source": f"m.py:{i}"}
        for group, name, answer in groups for i in range(6) for p, word in enumerate(("Explain", "What is"))
    ]  # fmt: skip
    write_lines(path / "facts" / "questions.jsonl", questions)
    rows = [{"messages": messages(f"What does m.t{i} do?", f"Copy number {i}."), "fact_id": f"m.t{i}#describe"} for i in range(5)]
    rows += [{"messages": messages("What does m.x do?", REFUSAL), "fact_id": "invented:m.x#describe"}]
    write_lines(path / "facts" / "sft.jsonl", rows)
    return path


KEYS = {"known_exact", "known_f1", "over_refusal", "consistency", "heldout_exact", "heldout_f1", "heldout_refusal", "invented_refusal",
        "invented_false", "accuracy_answered", "coverage", "refusal_recall", "ece"}  # fmt: skip


def test_a_build_is_evaluated_stage_by_stage(build):
    result = evaluate_build(build, EvaluationConfig(max_questions=6))
    assert list(result["stages"]) == ["pretrain", "sft"]
    for stage, found in result["stages"].items():
        assert read_json(build / "evals" / f"{stage}.json") == json.loads(json.dumps(found))
        assert set(found["likelihood"]) == {"loss_nats", "perplexity", "bits_per_byte", "bits_per_char"}
        assert set(found["questions"]) == KEYS and len(found["samples"]) == 18
        for score in found["questions"].values():
            assert score["ci95"][0] <= score["value"] <= score["ci95"][1] and 1 <= score["n"] <= 9
    base, sft = (found["protocol"] for found in result["stages"].values())
    assert base["style"] == "few_shot" and base["questions"]["num_shots"] >= 1
    assert base["questions"]["prompt"].endswith("Question: {question}\nAnswer:")
    assert sft["style"] == "chat" and "shots" not in sft["questions"]
    assert set(result["differences"]) == {"sft - pretrain"}
    assert read_json(build / "evals" / "differences.json")["sft - pretrain"]["known_exact"]["n"] == 3


def test_the_same_seed_gives_the_same_result(build):
    config = EvaluationConfig(max_questions=4, seed=7)
    first, second = (evaluate_model(build / "sft", shards=build / "shards", facts=build / "facts", config=config) for _ in range(2))
    for found in (first, second):
        found["protocol"].pop("time_s")
    assert first == second


def test_the_number_answered_at_a_time_changes_nothing(build):
    one, many = (
        evaluate_model(build / "sft", facts=build / "facts", config=EvaluationConfig(max_batch=size, max_questions=6)) for size in (1, 32)
    )
    assert one["samples"] == many["samples"]


def test_a_question_longer_than_the_context_counts_as_unanswered(build, tmp_path):
    questions = [json.loads(line) for line in (build / "facts" / "questions.jsonl").read_text().splitlines()][:4]
    questions[0]["question"] = "why " * 200
    write_lines(tmp_path / "questions.jsonl", questions)
    for style in ("chat", "few_shot"):
        write_lines(tmp_path / "sft.jsonl", [json.loads(line) for line in (build / "facts" / "sft.jsonl").read_text().splitlines()])
        found = evaluate_model(build / "sft", facts=tmp_path, config=EvaluationConfig(style=style))
        assert found["protocol"]["questions"]["too_long"] == 1
        assert [s["answer"] for s in found["samples"] if s["question"].startswith("why why")] == [""]


def test_nothing_to_evaluate_on_is_said(build):
    with pytest.raises(UserError, match="--shards .* --facts"):
        evaluate_model(build / "sft")
    with pytest.raises(UserError, match="max_questions=0 must be at least 1"):
        EvaluationConfig(max_questions=0)


def test_a_build_without_a_finished_stage_is_said(tmp_path):
    with pytest.raises(UserError, match="no finished stage"):
        evaluate_build(tmp_path)


def test_the_command_answers_in_json_and_in_a_table(build, tmp_path, capsys):
    assert main(["evaluate", str(build / "sft"), "--max-questions", "2", "--out", str(tmp_path / "sft.json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert printed == read_json(tmp_path / "sft.json") and set(printed["questions"]) == KEYS and printed["likelihood"]
    assert main(["evaluate", str(build), "--max-questions", "2"]) == 0
    shown = capsys.readouterr().out
    assert "BASE" in shown and "SFT" in shown and "bits per byte" in shown and "sft - pretrain" in shown


def test_the_command_names_mistakes(build, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "nowhere"), "--shards", str(build / "shards")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main(["evaluate", str(build), "--out", "x.json"]) == 1
    assert "Name one stage" in capsys.readouterr().err


def test_differences_are_paired_by_question():
    def answered(rights):
        samples = []
        for i, right in enumerate(rights):
            samples.append({"id": f"f{i // 2}/{i % 2}", "group": "known", "fact_id": f"f{i // 2}", "exact": float(right), "refusal": False})
        return samples

    first, second = answered([1, 1, 1, 0, 1, 1]), answered([1, 0, 0, 0, 1, 0])[::-1]
    score = compare_samples(first, second)["known_exact"]
    assert score.value == 0.5 and score.n == 3
    stages = {name: {"samples": samples} for name, samples in (("pretrain", second), ("sft", first), ("dpo", first))}
    differences = compare_stages(stages)
    assert list(differences) == ["sft - pretrain", "dpo - sft", "dpo - pretrain"]
    assert differences["dpo - sft"]["known_exact"]["value"] == 0.0
