"""The report of a single run: every logged number drawn, what is unknown named as it is, and no text that breaks out of the page."""

import html.parser
import json

import pytest

from plinth.cli.main import main
from plinth.evaluation.metric_words import GROUPS, WORDS
from plinth.evaluation.run_report import (
    columns_of,
    command_of,
    curves_of,
    facts_of,
    grouped,
    is_single_run,
    run_report_data,
    write_run_report,
)
from plinth.run import Run

HOSTILE = "</style><script>alert('x')</script>\"'&{{ 7 * 7 }}"


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "tuned", "grpo", {"beta": 0.04, "note": HOSTILE}, argv=["grpo", HOSTILE], seed=3)
    for step in range(1, 61):
        run.log(
            step=step,
            time_s=step / 2,
            loss_nats=-0.01 * step,
            reward=step / 60,
            kl=0.02 * step,
            group_size=8,
            own_number=step % 3,
            tokens=9,
        )
    run.log(step=61, event="spike", action="skip", reason=HOSTILE)
    run.finish({"steps": 60, "time_s": 30.0, "by_kind": {HOSTILE: {"accuracy": 0.5}}, "verdict": HOSTILE})
    return run


class Tags(html.parser.HTMLParser):
    """Collects the tags of a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)


def test_every_number_that_moves_is_drawn_and_the_rest_is_said(run):
    data = run_report_data(run.path)
    assert set(data["curves"]) == {"loss_nats", "reward", "kl", "own_number"} and data["constants"] == {"group_size": 8.0}
    assert data["state"] == "done" and len(data["incidents"]) == 1 and data["missing"] == []
    assert [(heading, names) for heading, names in grouped(data["curves"]) if names] == [
        ("What is learnt", ["loss_nats", "reward"]), ("How far the model moves", ["kl"]), ("Also logged", ["own_number"]),
    ]  # fmt: skip
    page = write_run_report(run.path).read_text()
    assert page.count("<svg") == 4 and "own number" in page and "The same at every step: group size 8." in page
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.found and "{{ 7 * 7 }}" in page and "http" not in page.replace("http-equiv", "")


def test_the_verb_tells_a_run_from_a_build(run, capsys):
    assert is_single_run(run.path) and not is_single_run(run.path.parent)
    assert main(["report", str(run.path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["stage"] == "grpo" and printed["curves"]["reward"]["y"][-1] == 1.0
    assert main(["report", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "tuned: grpo, done" in out and "distance to the reference" in out


def test_a_run_that_logged_nothing_or_nonsense_is_reported_all_the_same(tmp_path):
    run = Run.create(tmp_path / "empty", "sft", {}, argv=[])
    assert "No steps were logged." in write_run_report(run.path).read_text()
    (run.path / "metrics.jsonl").write_text('{"step": 1, "loss_nats": null, "reward": "high"}\nnot json\n')
    data = run_report_data(run.path)
    assert data["curves"] == {} and data["missing"][0]["what"] == "metrics.jsonl"
    assert curves_of([{"loss_nats": 1.0}]) == {}


def test_every_grouped_number_has_words():
    assert {name for _, names in GROUPS for name in names} <= set(WORDS)


def test_numbers_have_names_and_units_scores_their_interval_and_rows_of_one_kind_a_table(tmp_path):
    facts = {"loss_nats": 0.5, "peak_memory_bytes": 3.5e8, "time_s": 90.0, "energy_kwh": 1e-4, "finished": 0.25, "own": 3, "done": True}
    assert facts_of(facts) == [
        ("loss", "0.5 nats"), ("peak memory", "350 MB"), ("time", "1 min 30 s"), ("energy", "360 J"),
        ("completions that ended", "25.0\xa0%"), ("own", "3"),
    ]  # fmt: skip
    score = {"value": 0.75, "n": 40, "stderr": 0.07, "ci95": [0.6, 0.86], "protocol": {"ties": 2}}
    assert columns_of({"length": {"right": score, "ahead": score}, "words": {"right": score, "ahead": score}}) == ["right", "ahead"]
    assert columns_of({"length": score, "words": score}) == columns_of({"a": {"b": 1}}) == columns_of({"a": {"b": 1}, "c": {}}) == []
    run = Run.create(tmp_path / "tuned", "reward", {}, argv=[])
    run.finish({"held_out": {"accuracy": score, "judges": {"length": {"right": score}, "words": {"right": score}}}})
    page = " ".join(write_run_report(run.path).read_text().split())
    assert page.count('0.75 <span class="muted">(0.6 to 0.86, n = 40)</span>, ties 2') == 3 and "stderr" not in page.split("<details>")[0]


@pytest.mark.parametrize(
    "stage, argv, command",
    [
        ("dpo", ["base", "--pairs", "my pairs.jsonl"], "plinth prefer base --pairs 'my pairs.jsonl'"),
        ("classify", ["lm"], "plinth transfer classify lm"),
        ("sft", ["plinth", "build", "--budget", "40s"], "plinth build --budget 40s"),
        ("grpo", [], "plinth grpo"),
    ],
)
def test_the_command_that_is_told_is_the_one_that_was_typed(stage, argv, command):
    assert command_of({"stage": stage, "provenance": {"argv": argv}}) == command
