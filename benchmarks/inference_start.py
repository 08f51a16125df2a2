"""How long after the command does the first token appear?

    python benchmarks/inference_start.py [--folder runs/bench-inference] [--rounds 3]

`plinth generate` on the models of inference_peers.py, from the start of its process to the first bytes on its standard output; `cold`
has an empty cache of compiled kernels, so that the C compiler runs first, `warm` is every later start. The files lie in the system's
cache both times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inference_peers import SHAPES, prepare
from record import spread, write_record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-inference"), help="models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    journal = arguments.folder / "start.jsonl"
    for size in arguments.sizes:
        prepare(arguments.folder / size, size)
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as cache:
                for start in ("cold", "warm"):
                    line = {"size": size, "start": start, "first_token_s": first_token(arguments.folder / size / "hf", cache)}
                    print(line, file=sys.stderr, flush=True)
                    with journal.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    record(journal)
    return 0


def record(journal: Path) -> None:
    """Write benchmarks/records/inference_start.json."""
    waits: dict[tuple[str, str], list[float]] = {}
    for line in map(json.loads, journal.read_text().splitlines()):
        waits.setdefault((line["size"], line["start"]), []).append(line["first_token_s"])
    rows = [{"size": size, "start": start, "first_token_s": spread(seconds)} for (size, start), seconds in sorted(waits.items())]
    write_record("inference_start", "How long after the command does the first token appear?", rows)


def first_token(model: Path, cache: str) -> float:
    """Return the seconds from the start of the process to its first output."""
    command = [sys.executable, "-m", "plinth", "generate", str(model), "--prompt", "The ", "--max-tokens", "1"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"XDG_CACHE_HOME": cache})
    if not process.stdout.read(1):
        raise SystemExit(f"{command} ended with {process.wait()}")
    waited = time.perf_counter() - started
    process.communicate()
    return waited


if __name__ == "__main__":
    raise SystemExit(main())
