"""The whole life through the real command line: build, look, stop, resume, use."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from e2e.command import SMALL, last_json, plinth
from plinth.models.hub import load_model


def test_build_goes_from_text_to_report(built):
    out, output, errors = built
    data = last_json(output)
    assert data["served"] == "dpo"
    assert set(data["evaluation"]["stages"]) == {"pretrain", "sft", "dpo"}
    for name in ("corpus", "tokenizer", "shards", "plan.json", "pretrain/DONE", "sft/DONE", "dpo/DONE", "report.html", "DONE"):
        assert (out / name).exists(), name
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    assert "Traceback" not in errors and "dpo done" in errors


def test_lineage_names_each_parent_with_its_hash(built):
    out, _, _ = built
    parents = {stage: json.loads((out / stage / "provenance.json").read_text())["parents"] for stage in ("pretrain", "sft", "dpo")}
    assert [p["stage"] for p in parents["pretrain"]] == ["shards", "tokenizer"]
    assert [p["stage"] for p in parents["dpo"]] == ["sft", "pairs.jsonl"]
    assert all(len(p["sha256"]) == 64 for stage in parents.values() for p in stage)


def test_later_verbs_take_the_build(built):
    out, _, _ = built
    answer = last_json(plinth("generate", out, "--chat", "--prompt", "Where is the lantern?", "--temperature", "0", "--json")[0])
    again = last_json(plinth("generate", out, "--chat", "--prompt", "Where is the lantern?", "--temperature", "0", "--json")[0])
    assert answer["completions"][0]["text"] == again["completions"][0]["text"]
    report = last_json(plinth("report", out, "--json")[0])
    assert report["served"] == "dpo"


def test_without_instructions_it_stops_after_pretraining_and_says_so(own_data, tmp_path):
    out = tmp_path / "base"
    output, errors = plinth("build", own_data / "texts", "--budget", "40000tokens", "--out", out, "--json", *SMALL)
    assert "no instruction data" in errors
    assert last_json(output)["served"] == "pretrain" and not (out / "sft").exists()


def test_killed_builds_resume_to_the_same_weights(built, own_data, tmp_path):
    """kill -9 in the middle of pretraining; the resumed build ends with the weights of the uninterrupted one."""
    whole, _, _ = built
    out = tmp_path / "cut"
    out.mkdir()
    # the same plan, whatever the probe measures now
    arguments = [
        "build", str(own_data / "texts"), "--budget", "60000tokens", "--out", str(out), "--sft", str(own_data / "sft.jsonl"),
        "--pairs", str(own_data / "pairs.jsonl"), *SMALL,
    ]  # fmt: skip
    out.rmdir()
    process = subprocess.Popen([sys.executable, "-m", "plinth", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = out / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "DONE").exists()
    refused = plinth(*arguments, check=1)[1]
    assert "already holds a run" in refused and "--resume" in refused
    plinth("build", "--resume", "--out", out)
    plans = [json.loads((path / "plan.json").read_text()) for path in (whole, out)]
    if all(plans[0][key] == plans[1][key] for key in ("steps", "tokens_per_step", "micro_batch_size", "lr", "dtype", "optimizer")):
        one, other = (load_model(path / "pretrain" / "model") for path in (whole, out))
        assert all((a == b).all() for a, b in zip(one.parameters(), other.parameters()))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, plans[1]["steps"] + 1))


def test_the_stages_work_alone(own_data, tmp_path):
    run = tmp_path
    plinth("data", "curate", own_data / "texts", "--out", run / "corpus", "--json")
    plinth("tokenizer", "train", run / "corpus", "--vocab-size", "400", "--out", run / "tokenizer", "--json")
    plinth("data", "pack", run / "corpus", "--tokenizer", run / "tokenizer", "--out", run / "shards", "--json")
    small = ("--model.hidden-size", "64", "--model.num-layers", "2", "--model.num-heads", "2", "--model.num-kv-heads", "2",
             "--model.head-dim", "32", "--model.intermediate-size", "128", "--seq-len", "64", "--train.steps", "12")  # fmt: skip
    base = plinth("pretrain", run / "shards", "--tokenizer", run / "tokenizer", "--out", run / "base", "--json", *small)[0]
    assert last_json(base)["steps"] == 12
    sft = plinth("sft", run / "base", "--messages", own_data / "sft.jsonl", "--out", run / "sft", "--epochs", "1", "--json")[0]
    assert last_json(sft)["conversations"] == 40
    dpo = plinth("prefer", run / "sft", "--pairs", own_data / "pairs.jsonl", "--out", run / "dpo", "--epochs", "1", "--json")[0]
    assert last_json(dpo)["pairs"] == 10
    scores = last_json(plinth("evaluate", run / "dpo", "--shards", run / "shards", "--json")[0])
    assert "bits_per_byte" in json.dumps(scores)
    texts = plinth("generate", run / "base", "--prompt", "Note 1", "--max-tokens", "8", "--seed", "1", "--json")[0]
    assert last_json(texts)["completions"][0]["finish_reason"] in ("length", "stop")


@pytest.mark.slow
def test_the_embedded_default_builds(tmp_path):
    """The main job at a tiny budget: the standard library of this Python, with its questions."""
    out = tmp_path / "default"
    small = ("--plan.hidden-size", "64", "--plan.num-layers", "2", "--plan.vocab-size", "1024", "--plan.exposures-per-fact", "4")
    output, _ = plinth("build", "--budget", "300000tokens", "--out", out, "--json", *small, timeout=600)
    data = last_json(output)
    assert data["served"] == "dpo" and data["evaluation"]["stages"] == ["pretrain", "sft", "dpo"]
    questions = json.loads((out / "evals" / "dpo.json").read_text())["questions"]
    assert {"known_exact", "heldout_exact", "invented_false", "over_refusal", "consistency"} <= set(questions)
    assert all(score["n"] > 0 and len(score["ci95"]) == 2 for score in questions.values())
    sources = {sample["source"].split(":")[0] for sample in data["samples"][0]["samples"]} if data["samples"] else {"x"}
    assert sources


def test_environment_is_not_needed(tmp_path):
    """Help answers without torch: it is imported only by the verbs that need it."""
    code = "import sys, plinth, plinth.cli.main as m; m.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=os.environ)
