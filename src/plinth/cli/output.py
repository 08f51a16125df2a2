"""How every verb answers: text for people, one JSON object last on standard output for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console


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
