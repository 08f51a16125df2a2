"""Reading a build directory for its report: every file is optional, and every one that is absent or damaged is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from plinth.config import UserError, read_json
from plinth.run import Run

STAGES = ("pretrain", "sft", "dpo")
NAMES = {"pretrain": "BASE", "sft": "SFT", "dpo": "DPO"}


class BuildFiles:
    """The files of one build, and the list of those that could not be read."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.gaps: list[dict[str, str]] = []

    def say(self, what: str, why: str) -> None:
        """Record once that something is missing from the report, and why."""
        if not any(gap["what"] == what for gap in self.gaps):
            self.gaps.append({"what": what, "why": why})

    def json(self, name: str, meaning: str, *, quiet: bool = False) -> dict[str, Any]:
        """The JSON object in a file, or {} after saying that `meaning` is missing (not said when absent and `quiet`)."""
        file = self.path / name
        if not file.exists():
            if not quiet:
                self.say(name, f"{meaning}: the file is not there.")
            return {}
        try:
            value = read_json(file)
        except (UserError, OSError) as error:
            self.say(name, f"{meaning}: {error}")
            return {}
        if not isinstance(value, dict):
            self.say(name, f"{meaning}: the file holds a {type(value).__name__}, not an object.")
            return {}
        return value

    def json_lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON objects of a .jsonl file, [] when it is absent; lines that are damaged are counted and said."""
        file = self.path / name
        if not file.exists():
            return []
        records, damaged = [], 0
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            elif line.strip():
                damaged += 1
        if damaged:
            self.say(name, f"{damaged} of {damaged + len(records)} lines are not JSON objects and were left out.")
        return records

    def stage(self, name: str) -> dict[str, Any]:
        """What is known of one training stage: its state, summary, config, provenance and logged steps."""
        run = Run(self.path / name)
        there = (run.path / "config.json").exists()
        summary = self.json(f"{name}/DONE", f"summary of {NAMES[name]}", quiet=True) if there else {}
        return {
            "name": name,
            "state": run_state(run) if there else "not run",
            "summary": summary,
            "config": self.json(f"{name}/config.json", f"configuration of {NAMES[name]}") if there else {},
            "provenance": self.json(f"{name}/provenance.json", f"provenance of {NAMES[name]}") if there else {},
            "metrics": self.json_lines(f"{name}/metrics.jsonl"),
        }


def run_state(run: Run) -> str:
    """Return done, what it failed of, or how far it is."""
    if run.is_done:
        return "done"
    failed = run.path / "FAILED.txt"
    if failed.exists():
        return "failed: " + failed.read_text(encoding="utf-8", errors="replace").strip()
    return f"unfinished, last checkpoint at step {run.last_step}"


def number(value: Any) -> float | None:
    """The value as a finite float, or None: a report must survive a NaN, a null and a string."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def table(value: Any) -> dict[str, Any]:
    """The value if it is an object, else {}: for nested keys of files that another version may have written."""
    return value if isinstance(value, dict) else {}


def rows(value: Any) -> list[Any]:
    """The value if it is a list, else []."""
    return value if isinstance(value, list) else []
