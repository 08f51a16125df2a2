"""The report of a single run: every logged number drawn, what is unknown named as it is, and no text that breaks out of the page."""

import html.parser
import json

import pytest

from plinth.cli.main import main
from plinth.evaluation.metric_words import GROUPS, WORDS
from plinth.evaluation.run_report import curves_of, grouped, is_single_run, run_report_data, write_run_report
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
