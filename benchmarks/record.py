"""One JSON record a benchmark: question, rows, machine, versions, commit. Tables in the README and docs come from these."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from plinth.run import describe_hardware, installed_versions

RECORDS = Path(__file__).parent / "records"


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest, largest and number of the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def threads_of(record: dict[str, Any]) -> str:
    """Return how many threads a record or one of its rows was made with, in words."""
    return f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"


def write_record(name: str, question: str, rows: list[dict[str, Any]], folder: Path = RECORDS, **more: Any) -> Path:
    """Write NAME.json into `folder`, by default benchmarks/records, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = git.stdout.strip()
    record = {
        "question": question,
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
        **more,
        "hardware": describe_hardware(),
        "versions": installed_versions(),
        "commit": commit,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
