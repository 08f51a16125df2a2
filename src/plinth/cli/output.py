"""How every verb answers: text for people, one JSON object last on standard output for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from plinth.run import Run


def emit(result: dict[str, Any], as_json: bool, render: Callable[[Console], None]) -> None:
    """Print `result` as one JSON line, or let `render` draw it on a console on standard output."""
    if as_json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()
    else:
        render(Console())


def say(text: str) -> None:
    """Tell the user, on standard error, what is happening."""
    print(text, file=sys.stderr, flush=True)


def show_run(run: Run, as_json: bool, next_verb: str = "generate {run} --prompt '...'") -> None:
    """Print a finished training run, and the verb that comes next, with its arguments."""
    summary = {"path": str(run.path), "model": str(run.model_dir), **(run.summary or {})}

    reward = summary.get("reward")  # where a policy learns from rewards, its loss says nothing
    result = f"training loss {summary['loss_nats']:.3f}" if reward is None else f"mean reward {reward:.3f} in the last roll-out"

    def render(console: Console) -> None:
        console.print(
            f"{run.path}: {summary['steps']:,} step{'' if summary['steps'] == 1 else 's'} in {summary['time_s']:.0f} s, {result}. "
            f"Next: plinth {next_verb.format(run=run.path)}",
            markup=False,
        )

    emit(summary, as_json, render)
