"""How long after the command does the first token appear?

    python benchmarks/inference_start.py [--folder runs/bench-inference] [--rounds 3]

`plinth generate` on the models of inference_peers.py, from the start of its process to the first bytes on its standard output; `cold`
has an empty cache of compiled kernels, so that the C compiler runs first, `warm` is every later start. The files lie in the system's
cache both times.
"""

from __future__ import annotations

import argparse
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
    arguments = parser.parse_args()
    rows = []
    for size in SHAPES:
        prepare(arguments.folder / size, size)
        waits: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as cache:
                for start in waits:
                    waits[start].append(first_token(arguments.folder / size / "hf", cache))
        rows += [{"size": size, "start": start, "first_token_s": spread(seconds)} for start, seconds in waits.items()]
        print(rows[-2:], file=sys.stderr, flush=True)
    write_record("inference_start", "How long after the command does the first token appear?", rows)
    return 0


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
