"""How fast does the loader give tokens, how long does it take to any step, and how much memory does it hold?

Documents with lengths like those of web text (log-normal, median 330 tokens), one and a hundred million of them; the tokens of the larger
set are a hole in a file, since only where they lie matters here. Each case runs in a process of its own, for its memory.

    python benchmarks/loader_throughput.py [--documents 1000000 100000000] [--seconds 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from plinth.config import save_json
from plinth.data.loader import TokenLoader
from record import RECORDS, spread, write_record

SHAPES = ((256, 32), (1024, 512))  # seq_len, sequences a step: the default on a CPU, and half a million tokens for a GPU
BEST_FIT_DOCUMENTS = 10_000_000  # more are packed as a stream only, the plan of an epoch being in memory
REAL_TOKENS_DOCUMENTS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 100_000_000])
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each case is timed")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for num_documents in options.documents:
            shards = write_shards(Path(folder) / str(num_documents), num_documents)
            for packing in ("stream", "best_fit") if num_documents <= BEST_FIT_DOCUMENTS else ("stream",):
                for seq_len, sequences in SHAPES:
                    case = {"shards": str(shards), "seq_len": seq_len, "sequences_per_step": sequences, "packing": packing}
                    row = run_case(case | {"seconds": options.seconds})
                    rows.append({"documents": num_documents, **row})
                    print(json.dumps(rows[-1]))
    print(write_record("loader_throughput", "tokens/s of the loader, seconds to a step, memory", rows, options.out))


def write_shards(folder: Path, num_documents: int) -> Path:
    """Write the train split of a shards folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    offsets = np.lib.format.open_memmap(folder / "train.offsets.npy", mode="w+", dtype=np.int64, shape=(num_documents + 1,))
    total = 0
    for start in range(0, num_documents, 1 << 20):
        lengths = rng.lognormal(5.8, 1.2, min(1 << 20, num_documents - start)).astype(np.int64) + 2
        offsets[start + 1 : start + 1 + len(lengths)] = total + np.cumsum(lengths)
        total += int(lengths.sum())
    offsets.flush()
    with (folder / "train.bin").open("wb") as file:
        if num_documents <= REAL_TOKENS_DOCUMENTS:
            for start in range(0, total, 1 << 24):
                file.write(rng.integers(0, 1 << 15, min(1 << 24, total - start), dtype=np.uint16).tobytes())
        else:
            file.truncate(2 * total)
    for name, dtype in (("bytes", np.int64), ("chars", np.int64), ("kinds", np.uint16)):
        np.lib.format.open_memmap(folder / f"train.{name}.npy", mode="w+", dtype=dtype, shape=(num_documents,)).flush()
    save_json(folder / "manifest.json", {"dtype": "<u2", "kinds": ["web"], "tokens_train": total})
    return folder


def run_case(case: dict) -> dict:
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(shards: str, seq_len: int, sequences_per_step: int, packing: str, seconds: float) -> dict:
    """Return what one loader does; first batches are those of a loader just opened, so they include what it sets up."""
    before, anonymous_before = peak_rss_bytes(), status_bytes("RssAnon")
    far_s = first_batch_s(shards, seq_len, sequences_per_step, packing, 10**6)
    near_s = first_batch_s(shards, seq_len, sequences_per_step, packing, 0)
    loader = TokenLoader(Path(shards), seq_len, sequences_per_step, 0, packing=packing)
    loader.batch(0)
    times, began, step = [], time.perf_counter(), 1
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        loader.batch(step)
        times.append(time.perf_counter() - start)
        step += 1
    return {
        "packing": packing, "seq_len": seq_len, "sequences_per_step": sequences_per_step, "tokens_of_split": loader.num_tokens,
        "first_batch_step_0_s": near_s, "first_batch_step_1000000_s": far_s, "step_s": spread(times),
        "tokens_per_s": seq_len * sequences_per_step / spread(times)["median"], "padding": loader.padding(),
        "peak_rss_grown_bytes": peak_rss_bytes() - before, "anonymous_rss_grown_bytes": status_bytes("RssAnon") - anonymous_before,
    }  # fmt: skip


def first_batch_s(shards: str, seq_len: int, sequences_per_step: int, packing: str, step: int) -> float:
    start = time.perf_counter()
    TokenLoader(Path(shards), seq_len, sequences_per_step, 0, packing=packing).batch(step)
    taken_s = time.perf_counter() - start
    gc.collect()  # its memory does not count for the next one
    return taken_s


def peak_rss_bytes() -> int:
    return status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """Return a field of /proc/self/status; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")


if __name__ == "__main__":
    main()
