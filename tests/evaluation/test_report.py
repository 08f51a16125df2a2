"""The report of a build: what it shows, what it says is missing, and that no text of the data can break out of the page."""

import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from evaluation.made_build import HOSTILE, METER, make_build, score, write
from plinth.cli.main import main
from plinth.config import UserError
from plinth.evaluation import formats, verdict
from plinth.evaluation.charts import nice_ticks, smooth, thin
from plinth.evaluation.report import report_card, report_data, write_report
from plinth.run import tree_sha256


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return make_build(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def build(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "mine", ignore=shutil.ignore_patterns("report.html"))
    return tmp_path / "mine"


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that elements close in order."""

    INLINE = {"b", "code", "strong", "small", "abbr", "span"}
    VOID = {"meta", "link", "img", "br", "hr", "wbr", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.text += "" if tag in self.INLINE else " "
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def page_of(build: Path) -> Page:
    return Page(write_report(build).read_text(encoding="utf-8"))


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_page_shows_every_part(finished):
    text = words(page_of(finished))
    for part in (
        "A decoder of 6.3 million parameters that answers 63 % of known facts right, asserts something false about 14 % of "
        "invented names and refuses 12 % of what it was taught: 2 of 3 goals met (missed: refusals of known facts).",
        "Total time 5 min 36 s",
        "✓ met known facts answered right at unseen phrasings: 63.1 % (95 % interval 61.1–65.1 %, n = 2,400)",
        "✗ missed refusals of known facts: 12.0 %",
        "fewer false answers on invented names than SFT: 31.0 % → 14.0 %, beyond the intervals "
        "(on the same questions −17.0 points, 95 % interval −20.1 to −13.9)",
        "Documents read 44 –",
        "exact duplicate 41 3",
        "the same as",
        "photo.jpg",
        "lines.jsonl 1",
        "text 40 27.5 kB 100.0 %",
        "repeated ngrams 40 1",
        "Rules that dropped nothing: too short",
        "not stated 40",
        "describe higher is better 2.1 %",
        "Invented names: refused, DPO against SFT +17.0 +13.9 to +20.1, n = 600",
        "Held-out loss, nats per token 2.61 2.66 1.02 bpb x 3.503 bytes a token, measured on this text",
        "Time of all training 7 min 10 s 4 min 20 s 0.61 time model on 4 measured training speeds",
        "Energy of pretraining 3.8 kJ (1.06 Wh) 3.82 kJ (1.06 Wh) 1.01 estimate: 2 cores x 10 W, no counter read; actual: estimate:",
        "354 updates are few",
        "besiroglu a paper 1.07 4,100,000 yes",
        "No price was given, so no cost is stated.",
        "Peak memory 1.9 GB 1.72 GB 0.91",
        "✗ wrong",
        "source: shutil.py:230",
        "expected: I don't know. · source: invented (two real parts)",
        "4,800 sft lines, 1,200 pairs, 2,400 questions",
        "estimate: 2 cores x 10 W, no counter read",
        "DPO model (served)",
        "SFT: read sft.jsonl at",
        "plinth build stdlib",
        "torch 2.13.0",
    ):
        assert part in text, part
    assert "Missing from this report" not in text


def test_page_needs_no_network(finished):
    page = page_of(finished)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src", "action", "srcset"))
    raw = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://", raw)


def test_charts_are_named_for_those_who_cannot_see_them(finished):
    raw = write_report(finished).read_text(encoding="utf-8")
    titles = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"><title>([^<]+)</title>', raw)
    assert len(titles) == raw.count("<svg ") == 1 + 2 + 2 + 4
    assert any(title.startswith("BASE: training loss in nats per token over steps, from") for _, title in titles)
    assert "nan" not in raw.split("<svg", 1)[1].lower().split("</svg>")[0]


def test_hostile_text_stays_text(build):
    manifest = json.loads((build / "corpus/manifest.json").read_text())
    manifest["rules"][1] = {
        "rule": HOSTILE,
        "kept": 3,
        "dropped": 1,
        "examples": [{"source": HOSTILE, "excerpt": HOSTILE, "reason": HOSTILE}],
    }
    manifest["rejected_files"] = [{"path": HOSTILE, "reason": HOSTILE}]
    manifest["composition"] = {HOSTILE: {"documents": 1, "bytes": 1}}
    manifest["licences"] = {HOSTILE: 1}
    manifest["sources"] = [{"path": HOSTILE, "documents": 3, "bytes": 4, "sha256": HOSTILE}]
    manifest["malformed"] = [{"path": HOSTILE, "count": 1, "first": [HOSTILE]}]
    manifest["intake"]["examples"] = [{"source": HOSTILE, "excerpt": HOSTILE}]
    manifest["warnings"] = [HOSTILE]
    write(build / "corpus/manifest.json", manifest)
    pyarrow.parquet.write_table(pyarrow.table({"text": [HOSTILE * 2], "source": [HOSTILE]}), build / "corpus/heldout.parquet")
    plan = json.loads((build / "plan.json").read_text())
    plan["sources"] = {key: HOSTILE for key in ("loss_nats", "lr", "energy_j")}
    plan["model"], plan["alternatives"], plan["warnings"] = {HOSTILE: HOSTILE}, [{HOSTILE: HOSTILE}], [HOSTILE]
    write(build / "plan.json", plan)
    result = json.loads((build / "evals/dpo.json").read_text())
    result["samples"] = [
        {"question": HOSTILE, "answer": HOSTILE, "expected": [HOSTILE], "source": HOSTILE, "group": HOSTILE, "correct": False}
    ]
    result["protocol"], result["model"] = {HOSTILE: HOSTILE}, HOSTILE
    result["questions"][HOSTILE] = score(0.5, 10, 0.1)
    result["questions_by_kind"] = {HOSTILE: {"known_exact": score(0.5, 10, 0.1)}}
    write(build / "evals/differences.json", {f"{HOSTILE} - {HOSTILE}": {HOSTILE: score(0.1, 10, 0.2)}})
    write(build / "evals/dpo.json", result)
    write(
        build / "provenance.json", {"argv": [HOSTILE], "created": HOSTILE, "versions": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: HOSTILE}}
    )
    write(build / "metrics.jsonl", json.dumps({"stage": HOSTILE, "time_s": 1.0, "energy_j": 1.0, "energy_source": HOSTILE}) + "\n")
    write(build / "FAILED.txt", HOSTILE)
    page = page_of(build)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert('x')</script>") >= 20
    assert "{{ 7 * 7 }}" in page.text


def test_a_build_without_pairs_says_so(build):
    for name in ("facts", "dpo"):
        shutil.rmtree(build / name)
    write(build / "config.json", {"text": ["texts"], "sft": "messages.jsonl", "pairs": None})
    assert "DPO: There were no preference pairs (--pairs was not given), so the build stopped after SFT." in words(page_of(build))


def test_a_build_without_instruction_data_says_so(build):
    for name in ("facts", "sft", "dpo"):
        shutil.rmtree(build / name)
    for name in ("sft", "dpo"):
        (build / f"evals/{name}.json").unlink()
    base = json.loads((build / "evals/pretrain.json").read_text())
    base["questions"], base["samples"] = {}, []
    write(build / "evals/pretrain.json", base)
    text = words(page_of(build))
    assert "SFT: There was no instruction data (--sft was not given), so the build stopped after pretraining." in text
    assert "DPO: Preference tuning starts from an SFT model, and there is none." in text
    assert "that needs 1.099 bits per byte of held-out text; whether its answers are true was not measured." in text
    assert "BASE model (served)" in text


@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        "corpus",
        "shards",
        "tokenizer",
        "evals",
        "metrics.jsonl",
        "provenance.json",
        "config.json",
        "pretrain",
        "facts/manifest.json",
        "DONE",
    ],
)
def test_each_missing_part_leaves_a_page(build, name):
    path = build / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page_of(build)
    if name not in ("DONE", "facts/manifest.json"):
        assert report_data(build)["missing"]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '"text"', '{"rules": 5, "composition": [], "predicted": 3, "questions": "x", "parents": [1]}']
)
def test_damaged_files_are_named_and_survived(build, damage):
    names = [
        "plan.json",
        "corpus/manifest.json",
        "evals/dpo.json",
        "sft/DONE",
        "provenance.json",
        "dpo/provenance.json",
        "shards/manifest.json",
    ]
    for name in names:
        write(build / name, damage)
    write(build / "tokenizer/tokenizer.json", damage)
    (build / "corpus/heldout.parquet").write_bytes(b"PAR1 broken")
    write(build / "pretrain/metrics.jsonl", '{"step": 1, "loss_nats": NaN}\n{"step": 2, "loss_nats": 3.0}\n{"step"')
    page_of(build)
    gaps = {gap["what"] for gap in report_data(build)["missing"]}
    assert {"tokenizer", "pretrain/metrics.jsonl"} <= gaps
    if not damage.startswith('{"'):
        assert set(names) <= gaps


def test_failed_and_unfinished_stages_show(build):
    (build / "dpo/DONE").unlink()
    write(build / "dpo/FAILED.txt", "loss is not finite at step 31")
    (build / "sft/DONE").unlink()
    data = report_data(build)
    assert data["served"] == "pretrain"
    assert data["goals"][0]["cell"]["value"] == 0.071
    text = words(page_of(build))
    assert "DPO: The stage did not finish: failed: loss is not finite at step 31." in text
    assert "SFT: The stage did not finish: unfinished, last checkpoint at step 0." in text


def test_only_the_page_is_written(build):
    before = {path: path.read_bytes() for path in build.rglob("*") if path.is_file()}
    page = write_report(build)
    after = {path: path.read_bytes() for path in build.rglob("*") if path.is_file()}
    assert page == build / "report.html"
    assert after.pop(page) and after == before


def test_lineage_notices_a_changed_parent(build):
    links = {link["label"]: link for link in report_data(build)["lineage"]}
    assert list(links) == [
        "DPO model (served)",
        "SFT model",
        "BASE model",
        "Instruction data",
        "Token shards",
        "Tokenizer",
        "Corpus",
        "Source",
    ]
    assert links["BASE model"]["sha256"] == tree_sha256(build / "pretrain/model")
    assert [(entry["by"], entry["same"]) for entry in links["BASE model"]["recorded"]] == [("SFT", True), ("evaluation of BASE", True)]
    assert [(entry["by"], entry["same"]) for entry in links["Corpus"]["recorded"]] == [("token shards", True)]
    assert [(entry["by"], entry["same"]) for entry in links["Tokenizer"]["recorded"]] == [("token shards", True)]
    assert [(entry["by"], entry["same"]) for entry in links["Token shards"]["recorded"]] == [("BASE", True)]
    assert links["Source"]["path"].endswith("texts") and len(links["Source"]["sha256"]) == 64
    assert [entry["same"] for entry in links["Instruction data"]["recorded"]] == [True]
    (build / "pretrain/model/model.safetensors").write_bytes(b"another")
    write(build / "facts/sft.jsonl", "another")
    links = {link["label"]: link for link in report_data(build)["lineage"]}
    assert [entry["same"] for entry in links["BASE model"]["recorded"]] == [False, False]
    assert [entry["same"] for entry in links["Instruction data"]["recorded"]] == [False]
    assert [entry["same"] for entry in links["SFT model"]["recorded"]] == [True, True]


def test_lineage_names_inputs_from_outside_of_the_build(build):
    provenance = json.loads((build / "sft/provenance.json").read_text())
    provenance["parents"][1] = {"path": "/home/user/messages.jsonl", "stage": "messages.jsonl", "sha256": "ab" * 32}
    write(build / "sft/provenance.json", provenance)
    other = [link for link in report_data(build)["lineage"] if link["label"] == "Other input"]
    assert [(link["path"], link["sha256"]) for link in other] == [("/home/user/messages.jsonl", "ab" * 32)]


def test_comparison_needs_intervals_apart():
    cell = lambda low, high: {"value": (low + high) / 2, "n": 9, "ci95": [low, high]}  # noqa: E731
    assert verdict.compare(cell(0.5, 0.6), cell(0.1, 0.4), verdict.UP) == "better"
    assert verdict.compare(cell(0.5, 0.6), cell(0.1, 0.4), verdict.DOWN) == "worse"
    assert verdict.compare(cell(0.1, 0.2), cell(0.3, 0.4), verdict.DOWN) == "better"
    assert verdict.compare(cell(0.1, 0.2), cell(0.3, 0.4), verdict.UP) == "worse"
    assert verdict.compare(cell(0.3, 0.4), cell(0.1, 0.3), verdict.UP) == "unclear"
    assert verdict.compare(cell(0.3, 0.4), None, verdict.UP) is None
    assert verdict.compare({**cell(0.3, 0.4), "ci95": None}, cell(0.1, 0.2), verdict.UP) is None


def test_goal_exactly_reached_is_met_and_unclear():
    cells = {"dpo": {"value": 0.60, "n": 100, "ci95": [0.5, 0.7]}}
    table = {"groups": [{"rows": [{"key": "known_exact", "cells": cells}]}]}
    known, false, refused = verdict.goals(table, "dpo")
    assert (known["met"], known["clear"]) == (True, False)
    assert false["met"] is None and refused["met"] is None


def test_samples_show_failures_and_successes_in_turn(finished):
    groups = {group["group"]: group for group in report_data(finished)["samples"]}
    marks = [sample["answers"]["dpo"]["correct"] for sample in groups["known"]["samples"]]
    assert marks == [False, True] * 4 + [True] * 2
    assert groups["known"]["right"] == {"pretrain": [0, 10], "sft": [6, 10], "dpo": [6, 10]}


def test_segmentation_covers_the_passage(finished):
    section = report_data(finished)["tokenizer"]
    shards = json.loads((finished / "shards/manifest.json").read_text())
    document = pyarrow.parquet.read_table(finished / "corpus/heldout.parquet").to_pylist()[0]
    assert [passage["title"] for passage in section["passages"]] == [f"Held-out text ({document['source']})", "A line of code"]
    shown = "".join(token["text"] for token in section["passages"][0]["tokens"])
    assert shown == document["text"].strip()[:240].replace(" ", "·").replace("\n", "⏎")
    assert "⟨c3⟩" in "".join(token["text"] for token in section["passages"][1]["tokens"])
    assert section["bytes_per_token"]["train"] == pytest.approx(shards["bytes_train"] / shards["tokens_train"])
    assert all(len(pair) == 2 and "Ġ" not in "".join(pair) for pair in section["first_merges"])


def test_time_energy_and_cost_by_stage(build):
    spent = report_data(build)["spent"]
    assert (spent["total_s"], spent["total_j"], spent["total_cost"], spent["price_per_hour"]) == (336.2, 6724.0, None, None)
    assert spent["sources"] == [METER]
    plan = json.loads((build / "plan.json").read_text())
    plan["config"]["price_per_hour"] = 1.8
    write(build / "plan.json", plan)
    (build / "DONE").unlink()
    resumed = {"stage": "pretrain", "time_s": 100.0, "energy_j": 10.0, "energy_source": "measured: RAPL package-0"}
    with (build / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(resumed) + "\n")
    spent = report_data(build)["spent"]
    entry = next(entry for entry in spent["stages"] if entry["name"] == "pretrain")
    assert entry["time_s"] == pytest.approx(291.2) and entry["cost"] == pytest.approx(0.1456)
    assert spent["total_s"] == pytest.approx(434.4) and spent["total_cost"] == pytest.approx(0.2172)
    assert spent["sources"] == [METER, "measured: RAPL package-0"]


def test_energy_that_was_not_recorded_is_said_to_be_predicted(build):
    lines = [json.loads(line) for line in (build / "metrics.jsonl").read_text().splitlines()]
    write(build / "metrics.jsonl", "".join(json.dumps({k: v for k, v in line.items() if "energy" not in k}) + "\n" for line in lines))
    write(build / "DONE", {"time_s": 336.2})
    text = words(page_of(build))
    assert "Energy was not recorded. The plan predicted 8.6 kJ (2.39 Wh) for all training (estimate: 2 cores x 10 W" in text


def test_report_card_fits_a_terminal(finished):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(report_card(finished))
    text = console.export_text()
    assert "▲ 63.1\u00a0% n=2,400" in text and "✗ missed refusals of known facts: 12.0\u00a0%" in text
    assert max(map(len, text.splitlines())) <= 80


def test_command_line(build, capsys):
    assert main(["report", str(build), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["report"] == str(build / "report.html") and answer["served"] == "dpo" and answer["missing"] == []
    assert main(["report", str(build)]) == 0
    assert "report.html" in capsys.readouterr().out


def test_a_directory_without_a_build_is_one_clear_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"plinth: {tmp_path} holds neither a build (none of provenance.json, plan.json, corpus, pretrain, evals) nor a run. "
        "Name a directory that a plinth verb wrote with --out.\n"
    )
    with pytest.raises(UserError, match="is not a directory"):
        write_report(tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(2.61, 8.3, 4) == [4.0, 6.0, 8.0]
    assert nice_ticks(-3, 12, 5) == [0.0, 5.0, 10.0]
    assert nice_ticks(5, 5) == [5]
    with pytest.raises(ValueError, match="finite"):
        nice_ticks(0, math.inf)


def test_thinning_keeps_spikes_and_ends():
    x = list(range(10_000))
    y = [9.0 if i == 4321 else 1.0 + (i % 7) / 100 for i in x]
    few_x, few_y = thin(x, y)
    assert len(few_x) <= 402 and few_x == sorted(few_x) and few_x[-1] == 9999
    assert (4321, 9.0) in zip(few_x, few_y, strict=True)
    assert thin([1, 2, 3], [1.0, math.nan, 3.0]) == ([1, 3], [1.0, 3.0])


def test_smoothing_keeps_a_line_and_its_length():
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.5, 2.0, 3.0, 4.0, 4.5]
    assert smooth([7.0] * 9, 5) == [7.0] * 9
    assert smooth([], 5) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.share(0.6316), "63.2\u00a0%"),
        (formats.duration(9.84), "9.8 s"),
        (formats.duration(59.7), "60 s"),
        (formats.duration(336.2), "5 min 36 s"),
        (formats.duration(7530), "2 h 5 min"),
        (formats.size(1_720_000_000), "1.72 GB"),
        (formats.size(812), "812 B"),
        (formats.joules(9500), "9.5 kJ (2.64 Wh)"),
        (formats.joules(950), "950 J"),
        (formats.money(0.00071), "0.00071"),
        (formats.points(-0.1731), "−17.3"),
        (formats.quantity(False, ""), "no"),
        (formats.plain(6_312_448.0), "6,312,448"),
        (formats.plain(2.6612), "2.661"),
        (formats.quantity(None, "s"), "not measured"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected
