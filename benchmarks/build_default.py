"""What does `plinth build` make of the embedded default, in what time and memory?

    python benchmarks/build_default.py [--budget 4m] [--seeds 1]
    python benchmarks/build_default.py --read runs/demo        # a build that is there, such as the one of `make demo`

Runs the real command in a process of its own and reads the times, the peak memory and the scores that the build wrote.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write_record

SCORES = {
    "pretrain": ("bits_per_byte", "known_exact", "invented_false", "over_refusal", "consistency", "heldout_exact"),
    "sft": ("known_exact", "invented_false", "over_refusal", "consistency", "heldout_exact"),
    "dpo": ("known_exact", "invented_false", "over_refusal", "consistency", "heldout_exact"),
}


def build_once(out: Path, budget: str, seed: int) -> dict:
    """Run the command and return what it took and what came of it."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "plinth", "build", "--out", str(out), "--budget", budget, "--seed", str(seed), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_build(out, seed, time.perf_counter() - started)


def read_build(out: Path, seed: int, wall_s: float) -> dict:
    """Return what a finished build wrote."""
    plan = json.loads((out / "plan.json").read_text())
    row = {
        "seed": seed,
        "wall_s": wall_s,
        "stages_s": {r["stage"]: r["time_s"] for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())},
        "peak_memory_bytes": json.loads((out / "DONE").read_text())["peak_memory_bytes"],
        "model": {key: plan["model"][key] for key in ("num_layers", "hidden_size", "vocab_size")} | {"num_params": plan["num_params"]},
        "predicted": {key: plan["predicted"][key] for key in ("bpb", "time_s", "memory_bytes")},
        "pretrain": json.loads((out / "pretrain" / "DONE").read_text()),
        "functions": json.loads((out / "facts" / "manifest.json").read_text())["subjects"]["known"],
    }
    for stage, names in SCORES.items():
        result = json.loads((out / "evals" / f"{stage}.json").read_text())
        found = {**result["likelihood"], **result["questions"]}
        row[f"scores_{stage}"] = {name: {key: found[name][key] for key in ("value", "n", "ci95")} for name in names}
    row["dpo_minus_sft"] = json.loads((out / "evals" / "differences.json").read_text())["dpo - sft"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="4m", help="training time")
    parser.add_argument("--seeds", type=int, default=1, help="builds, with seeds 0, 1, ...")
    parser.add_argument("--read", type=Path, help="a finished build to read in place of building")
    options = parser.parse_args()
    rows = []
    if options.read is not None:
        rows.append(read_build(options.read, 0, json.loads((options.read / "DONE").read_text())["time_s"]))
    for seed in range(options.seeds if options.read is None else 0):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(build_once(Path(folder) / "build", options.budget, seed))
        print(json.dumps({key: rows[-1][key] for key in ("seed", "wall_s", "peak_memory_bytes", "scores_dpo")}), flush=True)
    print(write_record("build_default", f"What `plinth build --budget {options.budget}` makes of the embedded default", rows))


if __name__ == "__main__":
    main()
