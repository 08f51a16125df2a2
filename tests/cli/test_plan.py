"""`plinth plan` end to end: real text, real probe, one JSON object; mistakes in one line."""

import json

import pytest

from plinth.cli.main import main
from plinth.config import from_dict
from plinth.scaling.plan import Plan, load_plan


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        lines = [f"Line {j} of document {i} says what number {i * j} is and why {i + j} matters to nobody at all." for j in range(40)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


def test_json_and_file_hold_the_same_plan(texts, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", str(texts), "--budget", "20m", "--json", "--out", str(out), "--max-epochs", "2000"]) == 0
    captured = capsys.readouterr()
    plan = from_dict(Plan, json.loads(captured.out))
    assert plan == load_plan(out) and plan.predicted.time_s > 0 and plan.steps >= 100
    assert [stage.stage for stage in plan.stages] == ["pretrain"]
    assert "probing: matrix products" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget", "10"], "budget='10' has no unit"),
        (["--budget", "1m", "--pretrain-share", "0.9"], "must be non-negative and add up to 1"),
        (["--budget", "1m"], "absent does not exist"),
    ],
)
def test_mistakes_take_one_line(tmp_path, capsys, argv, message):
    assert main(["plan", str(tmp_path / "absent"), *argv]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--budgte", "1m"])
    assert stop.value.code == 2
    assert "--budget" in capsys.readouterr().err
