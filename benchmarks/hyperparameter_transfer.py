"""Does the best learning rate of a small model stay the best of a wider or deeper one, and under which parametrisation?

    python benchmarks/hyperparameter_transfer.py

Learning-rate overlays on the embedded text (or on --shards): along the width, standard against muP, with AdamW and with Muon;
along the depth, muP (there it is the standard one) against CompleteP, with AdamW. At the base size all are one. The coordinate
check runs beside them. Every run is kept under --out, and a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from plinth.recipes.coordinate_check import CoordinateConfig, coordinate_check
from plinth.recipes.learning_rate_overlay import OverlayConfig, overlay
from record import RECORDS, write_record

EXPERIMENTS = {
    "AdamW along the width": ("adamw", "width"),
    "AdamW along the depth": ("adamw", "depth"),
    "Muon along the width": ("muon", "width"),
}


def overlay_rows(label: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"experiment": label, "parametrization": name, "sizes": result["sizes"], "log2_lrs": result["log2_lrs"], **found}
        for name, found in result["parametrizations"].items()
    ]


def coordinate_rows(label: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"experiment": label, "parametrization": name, "sizes": result["sizes"], "slopes": found["slopes"], "passes": found["passes"]}
        for name, found in result["parametrizations"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="token shards (default: the embedded text)")
    parser.add_argument("--out", type=Path, default=Path("runs/hyperparameter_transfer"), help="where the runs are kept")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=100, help="updates of each run")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens a sequence; an update has 16")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments to do")
    parser.add_argument("--pictures", type=Path, help="also copy the pictures into this folder")
    options = parser.parse_args()
    started, rows, coordinates = time.perf_counter(), [], []
    for label in options.only:
        optimizer, along = EXPERIMENTS[label]
        name = f"{optimizer}_{along}"
        check = CoordinateConfig(along=along)
        check = replace(check, family=replace(check.family, optimizer=optimizer))
        coordinates += coordinate_rows(label, coordinate_check(options.shards, options.out, check, print))
        if options.pictures:
            shutil.copy(options.out / "coordinates.svg", options.pictures / f"coordinates_{name}.svg")
        config = OverlayConfig(along=along, widths=tuple(options.widths), depths=tuple(options.depths), steps=options.steps)
        config = replace(config, family=replace(config.family, optimizer=optimizer, seq_len=options.seq_len))
        shards = options.shards or options.out / "shards"
        result = overlay(shards, options.out / optimizer, config, print)
        rows += overlay_rows(label, result)
        for row in rows[-2:]:
            print(label, row["parametrization"], "shift", row["shift_octaves"], "cost", row["transfer_cost_nats"], flush=True)
        if options.pictures:
            shutil.copy(options.out / optimizer / "overlay.svg", options.pictures / f"overlay_{name}.svg")
    question = (
        "How far does the best learning rate move with width and depth (octaves), and what does the small model's cost the large one?"
    )
    tokens = options.steps * OverlayConfig().family.sequences_per_step * options.seq_len
    write_record(
        "hyperparameter_transfer", question, rows, coordinate_check=coordinates, tokens_a_run=tokens,
        seeds=1, time_s=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    print(RECORDS / "hyperparameter_transfer.json")


if __name__ == "__main__":
    main()
