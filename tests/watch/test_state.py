"""What is said of a run at each moment of its life, and of a build."""

import json
import os
import time

import pytest

from plinth.scaling.curve import predicted_curve
from plinth.scaling.plan import make_plan
from plinth.scaling.plan_record import save_plan
from plinth.watch.state import Watcher
from plinth.watch.terminal import braille, frame, sparkline


def test_a_run_from_before_its_beginning_to_its_end(written, tmp_path):
    watcher = Watcher(tmp_path / "run")
    assert watcher.state()["status"] == "waiting" and watcher.curves()["loss_nats"]["raw"] == [[], []]
    run = written(steps=10)
    assert (watcher.state()["status"], watcher.state()["message"]) == ("running", "No step is finished yet.")
    for step in range(1, 7):
        run.step(step, energy_source="estimate: 2 cores x 10 W, no counter read")
    state = watcher.state()
    assert state["status"] == "running" and (state["step"], state["steps"]) == (6, 10)
    assert state["eta_s"] == pytest.approx(4 * 0.5) and state["mfu"] == 0.4 and state["energy_kwh"] == pytest.approx(6e-5)
    (run.path / "DONE").write_text(json.dumps({"time_s": 3.5, "energy_kwh": 9e-5, "cost": 0.25}))
    state = watcher.state()
    assert (state["status"], state["eta_s"], state["time_s"], state["energy_kwh"], state["cost"]) == ("done", None, 3.5, 9e-5, 0.25)


def test_a_run_whose_process_is_gone_is_quiet_and_one_that_failed_says_why(written):
    run = written()
    for step in range(1, 5):
        run.step(step)
    hour_ago = time.time() - 3600
    os.utime(run.path / "metrics.jsonl", (hour_ago, hour_ago))
    assert Watcher(run.path).state()["status"] == "quiet"
    (run.path / "FAILED.txt").write_text("pretrain: the disk is full\n")
    assert (Watcher(run.path).state()["status"], Watcher(run.path).state()["message"]) == ("failed", "pretrain: the disk is full")
    later = time.time() + 60
    run.step(5)
    os.utime(run.path / "metrics.jsonl", (later, later))
    assert Watcher(run.path).state()["status"] == "running"  # resumed: the old reason is no longer true


def test_incidents_and_a_stop_are_told(written):
    run = written()
    for step in range(1, 4):
        run.step(step)
    run.step(4, loss_nats=None, event="non-finite", action="skip", skipped=True, reason="loss inf.", documents="train document 7")
    run.append(json.dumps({"step": 5, "event": "spike", "action": "stop", "reason": "loss 9.", "documents": "train document 8"}) + "\n")
    state = Watcher(run.path).state()
    assert state["status"] == "stopped" and "train document 8" in state["message"]
    assert (state["step"], state["num_incidents"], state["num_skipped"]) == (4, 2, 1)
    assert [one["documents"] for one in state["incidents"]] == ["train document 7", "train document 8"]


def test_a_build_shows_its_newest_stage_or_the_one_asked_for(written):
    build = written("build", stage="build")
    build.append(json.dumps({"stage": "curate", "time_s": 2.0, "energy_j": 5.0}) + "\n")
    watcher = Watcher(build.path)
    assert [stage["name"] for stage in watcher.state()["stages"]] == ["curate"]
    first = written("build/pretrain", steps=10)
    first.step(1)
    (first.path / "DONE").write_text("{}")
    assert (watcher.state()["stage"], watcher.state()["message"]) == ("pretrain", "The build goes on.")
    second = written("build/sft", steps=20, stage="sft")
    second.step(1)
    second.step(2, accuracy=0.75)
    assert (watcher.state()["stage"], watcher.state()["steps"]) == ("sft", 20)
    assert watcher.curves()["accuracy"]["raw"] == [[2.0], [0.75]]
    assert (watcher.state("pretrain")["stage"], watcher.state("pretrain")["steps"]) == ("pretrain", 10)
    assert [(stage["name"], stage["state"]) for stage in watcher.state()["stages"]] == [
        ("curate", "done"),
        ("pretrain", "done"),
        ("sft", "begun"),
    ]


def test_curves_of_a_part_are_the_points_of_that_part(written):
    run = written(steps=300)
    for step in range(1, 301):
        run.step(step)
    curve = Watcher(run.path).curves(first=100, last=149)["loss_nats"]
    assert curve["raw"][0] == list(range(100, 150)) and curve["raw"][1][0] == pytest.approx(3.1)
    assert len(curve["smooth"][0]) == 50


def test_the_predicted_curve_ends_at_the_plans_prediction(written, corpus, probe):
    plan = make_plan("60s", corpus, probe)
    curve = predicted_curve(plan)
    losses = [loss for _, loss in curve]
    assert curve[-1] == (plan.tokens, pytest.approx(plan.predicted.loss_nats)) and losses == sorted(losses, reverse=True)
    run = written("build/pretrain", steps=plan.steps)
    run.step(1)
    assert Watcher(run.path).state()["predicted"] is None
    save_plan(plan, run.path.parent / "plan.json")
    predicted = Watcher(run.path.parent).state()["predicted"]
    assert predicted["loss_nats"] == plan.predicted.loss_nats and predicted["law"] == plan.laws[0].law
    assert predicted["x"][-1] == plan.steps and predicted["y"][-1] == pytest.approx(plan.predicted.loss_nats, abs=1e-4)
    (run.path.parent / "plan.json").write_text("{}")
    assert Watcher(run.path).state()["predicted"] is None


def test_a_frame_holds_the_numbers_and_both_curves(written):
    from rich.console import Console

    run = written(steps=200)
    for step in range(1, 101):
        run.step(step)
    watcher = Watcher(run.path)
    state = watcher.state() | {"predicted": {"loss_nats": 2.9, "law": "a law", "x": [10.0, 200.0], "y": [3.6, 2.9]}}
    for width in (40, 80, 160):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(frame(state, watcher.curves(), width))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "step 100 of 200" in text and "predicted" in text and "40.0%" in text and any("⠀" < mark <= "⣿" for mark in text)


def test_dots_lie_where_the_line_is():
    assert braille([(0, 0), (3, 0)], (0, 3, 0, 3), 2, 1) == ["⣀⣀"]
    assert braille([(0, 3), (0, 0)], (0, 3, 0, 3), 2, 1) == ["⡇ "]
    assert sparkline([1, 2, 3, 4], 4) == "▁▃▆█" and sparkline([5.0] * 9, 3) == "▁▁▁"
