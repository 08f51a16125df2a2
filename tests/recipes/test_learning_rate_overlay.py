"""The learning-rate overlay: points are kept, shared and never repeated; optima and shifts are worked out right."""

import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from plinth.config import UserError, read_json
from plinth.recipes.learning_rate_overlay import OverlayConfig, Point, Points, optimum, overlay, transfer_cost
from plinth.recipes.transfer import Family, Size

TINY = OverlayConfig(
    family=Family(base_width=32, seq_len=32, sequences_per_step=4), widths=(32, 64), log2_lrs=(-9, -7, -5), steps=10, heldout_rows=8
)


def stamps(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "points").glob("*lr2*.json")}


def test_points_are_kept_and_added_to_and_never_repeated(shards, tmp_path):
    said = []
    result = overlay(shards, tmp_path, TINY, said.append)
    assert "9 of 9 runs of 10 updates are to do: about" in said[0]
    before = stamps(tmp_path)
    (tmp_path / "points" / Point("mup", Size(64, 2), -7).file_name).unlink()
    again = overlay(shards, tmp_path, replace(TINY, log2_lrs=(-11, -9, -7, -5)), said.append)
    after = stamps(tmp_path)
    assert "4 of 12 runs" in said[1]
    kept = [name for name in before if before[name] == after[name]]
    assert len(before) == 9 and len(after) == 12 and len(kept) == 8
    for name, found in result["parametrizations"].items():  # the point that was lost came out the same again
        assert found["loss_nats"] == [row[1:] for row in again["parametrizations"][name]["loss_nats"]]
    assert read_json(tmp_path / "overlay.json") == again
    assert len(list(ElementTree.parse(tmp_path / "overlay.svg").iter("{http://www.w3.org/2000/svg}polyline"))) == 4
    standard, mup = (again["parametrizations"][name] for name in ("standard", "mup"))
    assert standard["loss_nats"][0] == mup["loss_nats"][0] and standard["loss_nats"][1] != mup["loss_nats"][1]


def test_what_is_the_same_is_trained_once():
    family = Family(base_width=32, base_depth=2)
    same = {("mup", 32, 8): "standard", ("mup", 64, 2): "mup", ("completep", 32, 2): "standard", ("completep", 64, 2): "mup"}
    same |= {("completep", 32, 8): "completep", ("standard", 64, 8): "standard"}
    for (name, width, depth), simplest in same.items():
        assert family.simplest(name, Size(width, depth)) == simplest
    assert (
        len(OverlayConfig(family=family, widths=(32, 64), log2_lrs=(-9, -8), parametrizations=("standard", "mup", "completep")).points) == 6
    )


def test_points_of_other_settings_are_not_mixed_in(shards, tmp_path):
    overlay(shards, tmp_path, TINY)
    with pytest.raises(UserError, match="holds points with steps=10, and this is 20.*--out"):
        overlay(shards, tmp_path, replace(TINY, steps=20))


def test_those_who_share_a_folder_do_no_point_twice(tmp_path):
    """Threads stand for processes: each opens the lock files anew, and the system's locks belong to the opened file."""
    done, ready = [], threading.Barrier(3)

    def train(point):
        done.append(point.file_name)
        time.sleep(0.001)  # others get their turn
        return {"loss_nats": 1.0}

    def fill():
        points = Points(tmp_path, {"a": 1})
        ready.wait()
        for wait in (False, True):
            for point in OverlayConfig().points:
                points.fill(point, train, wait=wait)

    threads = [threading.Thread(target=fill) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(point.file_name for point in OverlayConfig().points)


def test_a_point_whose_process_died_is_done_by_the_next(tmp_path):
    points, point = Points(tmp_path, {}), Point("mup", Size(64, 2), -7)
    with pytest.raises(KeyboardInterrupt):
        points.fill(point, lambda one: (_ for _ in ()).throw(KeyboardInterrupt), wait=False)
    assert points.get(point) is None
    assert points.fill(point, lambda one: {"loss_nats": 2.0}, wait=False) and points.get(point) == {"loss_nats": 2.0}


def test_the_optimum_is_the_vertex_of_the_parabola():
    lrs = [-10, -9, -8, -7]
    assert optimum(lrs, [(x + 8.3) ** 2 + 1 for x in lrs]) == {"log2_lr": pytest.approx(-8.3, abs=1e-3), "index": 2, "at_edge": False}
    assert optimum(lrs, [4.0, 3.0, 2.0, 1.0]) == {"log2_lr": -7.0, "index": 3, "at_edge": True}
    assert optimum(lrs, [4.0, 3.0, 2.0, None]) == {"log2_lr": -8.0, "index": 2, "at_edge": False}  # its neighbour diverged
    assert optimum(lrs, [None] * 4) == {"log2_lr": None, "index": None, "at_edge": True}


def test_what_the_bases_rate_costs_elsewhere():
    assert transfer_cost([3.0, 2.0, 2.5], 1) == 0.0
    assert transfer_cost([3.0, 2.0, 2.5], 2) == 0.5
    assert transfer_cost([3.0, 2.0, None], 2) is None
