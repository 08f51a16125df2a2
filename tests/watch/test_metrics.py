"""metrics.jsonl read as it grows: only what was appended, nothing half written, everything anew after a resume."""

import json
import os

import numpy as np
import pytest

from plinth.watch.metrics import MetricsFile, smooth, thin


def test_reads_only_what_was_appended_and_waits_for_the_end_of_a_line(written):
    run = written()
    run.step(1)
    run.step(2)
    metrics = MetricsFile(run.path / "metrics.jsonl")
    assert metrics.poll() and metrics.num_steps == 2
    assert not metrics.poll()
    line = json.dumps({"step": 3, "loss_nats": 1.5, "tokens": 9})
    run.append(line[:10])
    assert metrics.poll() and metrics.num_steps == 2
    run.append(line[10:] + "\n")
    assert metrics.poll() and metrics.num_steps == 3 and metrics.last("loss_nats") == 1.5
    data = bytearray((run.path / "metrics.jsonl").read_bytes())
    data[: len(data) - 20] = b"#" * (len(data) - 20)  # what was read already is not looked at again
    with (run.path / "metrics.jsonl").open("r+b") as file:
        file.write(data)
    run.step(4)
    assert metrics.poll() and metrics.num_steps == 4 and metrics.column("step").tolist() == [1, 2, 3, 4]


def test_a_line_cut_off_by_a_crash_is_left_out(written):
    run = written()
    run.step(1)
    run.append('{"step": 2, "lo\n[1]\n\xff\n')
    run.step(3)
    metrics = MetricsFile(run.path / "metrics.jsonl")
    metrics.poll()
    assert metrics.column("step").tolist() == [1, 3]


def test_a_file_that_a_resume_cut_is_read_anew(written):
    run = written()
    for step in range(1, 6):
        run.step(step)
    file = run.path / "metrics.jsonl"
    metrics = MetricsFile(file)
    metrics.poll()
    lines = file.read_text().splitlines(keepends=True)
    (run.path / "new").write_text("".join(lines[:3]))
    os.replace(run.path / "new", file)
    run.step(4, loss_nats=0.25)
    run.step(5)
    run.step(6)
    metrics.poll()
    assert metrics.column("step").tolist() == [1, 2, 3, 4, 5, 6] and metrics.column("loss_nats")[3] == 0.25


def test_values_that_come_late_or_are_missing_are_nan(written):
    run = written()
    run.step(1)
    run.step(2, accuracy=0.5)
    run.step(3, loss_nats=None)
    metrics = MetricsFile(run.path / "metrics.jsonl")
    metrics.poll()
    assert np.isnan(metrics.column("accuracy")).tolist() == [True, False, True]
    assert np.isnan(metrics.column("loss_nats")).tolist() == [False, False, True]
    assert metrics.last("loss_nats") == 8.0 and np.isnan(metrics.column("nothing")).all()


def test_thinning_keeps_both_ends_and_every_spike():
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[31_234], y[77_777], y[5] = 50.0, -50.0, np.nan
    thinned_x, thinned_y = thin(x, y, 600)
    assert len(thinned_x) <= 610 and (np.diff(thinned_x) > 0).all()
    assert thinned_x[0] == 0 and thinned_x[-1] == 99_999
    assert {31_234.0, 77_777.0} <= set(thinned_x) and thinned_y.max() == 50 and thinned_y.min() == -50
    assert (thin(x[:7], y[:7], 600)[0] == [0, 1, 2, 3, 4, 6]).all()


def test_the_moving_mean_is_the_mean_of_its_window():
    y = np.random.default_rng(0).normal(size=50)
    expected = [y[max(0, i - 4) : i + 5].mean() for i in range(50)]
    assert smooth(y, 8) == pytest.approx(expected)
