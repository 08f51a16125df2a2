"""Does a run that is killed again and again, also inside a checkpoint, end with the weights of one that was never stopped?

    python benchmarks/kill_resume.py            (make kill-test)
    python benchmarks/kill_resume.py --trials 2 --no-record

One `plinth pretrain` runs through. Then, in each trial, the same command is started, killed with SIGKILL at a random moment, and
started again with --resume, `--kills` times, and the last time left alone. Every other kill waits for the temporary folder of a
checkpoint that is being written and strikes within some milliseconds; the others strike after a random step or while starting.
Trials take turns with bf16 (where the processor has the units, on kernels of our own) and fp32.
A trial counts when model.safetensors and the state after the last step (fp32 weights and optimizer) have the SHA-256 of the
uninterrupted run's, and metrics.jsonl has each step exactly once with the same losses. The moments are drawn from `--seed`; the machine
decides what they hit. Exit code 0 only when all trials count. With `--folder` the trials done lie there, and a script that was stopped
goes on with the next.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from plinth.run import file_sha256
from plinth.training.checkpoint import STATE_FILE
from record import write_record

STEPS = 60
MODEL = ("--model.hidden-size", "128", "--model.num-layers", "3", "--model.num-heads", "2", "--model.num-kv-heads", "2",
         "--model.head-dim", "64", "--model.intermediate-size", "256")  # fmt: skip
TRAINING = ("--seq-len", "128", "--sequences-per-step", "16", "--micro-batch-size", "4", "--train.steps", str(STEPS),
            "--train.checkpoint-every-s", "0", "--train.keep-final", "--train.num-threads", "2", "--train.device", "cpu",
            "--matmul-flops-per-s", "1e11")  # fmt: skip
DTYPES = ("bfloat16", "float32")  # kernels of our own where the processor has the units, and PyTorch's
COMPARED = ("step", "loss_nats", "grad_norm", "lr", "tokens")


def plinth(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "plinth", *map(str, arguments)]


def prepare(folder: Path) -> None:
    """Make a small text, a tokenizer and shards with the verbs that a user has."""
    texts = folder / "texts"
    texts.mkdir()
    words = [a + b for a in ("har", "lan", "or", "gra", "wil", "cop") for b in ("bour", "tern", "chard", "nite", "low", "per")]
    chance = random.Random(0)
    for i in range(80):
        lines = [" ".join(chance.choices(words, k=12)).capitalize() + "." for _ in range(40)]
        (texts / f"{i:02}.txt").write_text("\n".join(lines))
    for arguments in (
        ("data", "curate", texts, "--out", folder / "corpus"),
        ("tokenizer", "train", folder / "corpus", "--vocab-size", 512, "--out", folder / "tokenizer"),
        ("data", "pack", folder / "corpus", "--tokenizer", folder / "tokenizer", "--out", folder / "shards"),
    ):
        subprocess.run(plinth(*arguments), check=True, capture_output=True)


def start(folder: Path, out: Path, dtype: str) -> subprocess.Popen:
    """Start the run, or go on with it."""
    resume = ("--resume",) if (out / "config.json").exists() else ()
    command = plinth("pretrain", folder / "shards", "--tokenizer", folder / "tokenizer", "--out", out, *MODEL, *TRAINING,
                     "--train.dtype", dtype, *resume)  # fmt: skip
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def being_written(out: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(out / "checkpoints") if entry.name.startswith(".step_") and ".old." not in entry.name}
    except FileNotFoundError:
        return set()


def lines_of(out: Path) -> int:
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def kill(process: subprocess.Popen, out: Path, inside: bool, chance: random.Random) -> str:
    """Kill the process at a random moment; return where it was hit: "write", "elsewhere", or "ended" when it was faster."""
    before = being_written(out)
    if inside:
        skip = chance.randrange(12)  # so many checkpoints are let pass
        seen: set[str] = set()
        while process.poll() is None and len(seen) <= skip:
            seen |= being_written(out) - before
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.02))
    else:
        lines = lines_of(out) + chance.randrange(25)  # so many steps are let pass
        while process.poll() is None and lines_of(out) < lines:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05 if lines else 3.0))
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return "ended"
    return "write" if being_written(out) - before else "elsewhere"


def result(out: Path) -> tuple[str, str, list[tuple]]:
    """Return what must not depend on kills."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tensors = load_file(out / "checkpoints" / f"step_{STEPS:06d}" / STATE_FILE)
    final = hashlib.sha256()
    for key in sorted(tensors):
        if not key.startswith("generator/"):  # nothing here draws from the global generators, which start anew in each process
            final.update(key.encode() + tensors[key].numpy().tobytes())
    return file_sha256(out / "model" / "model.safetensors"), final.hexdigest(), [tuple(r[key] for key in COMPARED) for r in records]


def run_trial(folder: Path, out: Path, dtype: str, kills: int, chance: random.Random, whole: tuple) -> dict:
    """Kill and resume until done; return what was hit and whether the result equals the uninterrupted one."""
    hits = []
    for i in range(kills):
        hits.append(kill(start(folder, out, dtype), out, i % 2 == 0, chance))
        if hits[-1] == "ended":
            break
    code = start(folder, out, dtype).wait()
    assert code == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]
    found = result(out)
    if found[2] != whole[2]:
        first = next((pair for pair in zip(found[2], whole[2]) if pair[0] != pair[1]), (len(found[2]), len(whole[2])))
        print(f"  first difference in metrics.jsonl, resumed against whole: {first[0]} {first[1]}", flush=True)
    same = {"model": found[0] == whole[0], "final_state": found[1] == whole[1], "metrics": found[2] == whole[2]}
    return {"dtype": dtype, "hits": hits, "identical": all(same.values()), **same}


def run_trials(folder: Path, options: argparse.Namespace) -> list[dict]:
    """Run the trials that `folder` does not hold yet, and return all."""
    if not (folder / "shards").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare(folder)
    whole = {}
    for dtype in DTYPES[: options.trials]:
        out = folder / f"whole_{dtype}"
        if not (out / "DONE").exists():
            shutil.rmtree(out, ignore_errors=True)
            assert start(folder, out, dtype).wait() == 0, (folder / f"{out.name}.log").read_text()[-3000:]
        whole[dtype] = result(out)
        assert [row[0] for row in whole[dtype][2]] == list(range(1, STEPS + 1))
    trials = []
    for i in range(options.trials):
        dtype, out, record = DTYPES[i % len(DTYPES)], folder / f"trial{i}", folder / f"trial{i}.json"
        if not record.exists():
            shutil.rmtree(out, ignore_errors=True)
            trial = run_trial(folder, out, dtype, options.kills, random.Random(f"{options.seed}/{i}"), whole[dtype])
            record.write_text(json.dumps(trial))
        trials.append(json.loads(record.read_text()))
        told = ", ".join(f"{name} {value}" for name, value in trials[-1].items() if name != "hits")
        print(f"trial {i + 1}: killed at {', '.join(trials[-1]['hits'])}; {told}", flush=True)
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="kills a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the work here (default: a temporary folder)")
    parser.add_argument("--no-record", action="store_true", help="write no record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        trials = run_trials(options.folder or Path(name), options)
    hits = [hit for trial in trials for hit in trial["hits"]]
    row = {
        "trials": len(trials),
        "identical": sum(trial["identical"] for trial in trials),
        "kills": len(hits) - hits.count("ended"),
        "kills_inside_a_checkpoint": hits.count("write"),
    }
    print(json.dumps(row))
    if not options.no_record:
        write_record("kill_resume", __doc__.splitlines()[0], [row], seed=options.seed, steps=STEPS, each=trials)
    return 0 if row["identical"] == row["trials"] else 1


if __name__ == "__main__":
    sys.exit(main())
