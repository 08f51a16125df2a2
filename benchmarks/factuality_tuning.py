"""Does tuning on what a model knows keep it from making answers up, and what does it cost where it knows?

    python benchmarks/factuality_tuning.py --build runs/demo [--seeds 1] [--out FOLDER]     # twenty minutes of one core a seed
    python benchmarks/factuality_tuning.py --build runs/demo --seeds 2 --add               # the seeds that the record lacks

Takes the pretrained model and the questions of a build of the embedded default (`make demo`). Of its functions, by seed, five in ten are
taught, three are the pool that the model is asked about beside them without having been taught them, and two are never trained on.
Four models follow from the one that was taught, each by the command that a reader would type:

  taught     as it is: it has never seen a refusal
  answers    finetuned on the pool with all right answers, known or not
  aware      finetuned on what `plinth known` makes of the pool, as many updates
  aware, dpo `aware` tuned on the preference pairs that `plinth known` makes
  free       finetuned on what `plinth known --reference-free` makes of the pool's questions: agreement for truth
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import RECORDS, write_record

SCORES = (
    "known_exact", "over_refusal", "heldout_refusal", "heldout_exact", "invented_refusal", "accuracy_answered", "coverage",
    "refusal_precision", "refusal_recall", "auroc", "ece",
)  # fmt: skip
LABELS = {
    "taught": "as taught", "answers": "all right answers", "aware": "`plinth known`, sft", "aware_dpo": "and then its pairs, dpo",
    "free_aware": "`--reference-free`, sft",
}  # fmt: skip
SHARES = {"taught": 0.5, "pool": 0.3, "never": 0.2}
POOL_PHRASINGS = 2
TEACH = ["--epochs", "8", "--join-turns", "1"]
TUNE = ["--train.steps", "150", "--train.optimizer.lr", "0.001", "--train.optimizer.muon-lr", "0.005"]
FREE = ["--reference-free", "--known-share", "0.8", "--unknown-share", "0.5"]
PREFER = ["--train.steps", "60", "--train.optimizer.lr", "3e-5", "--train.optimizer.muon-lr", "2e-4"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def part_of(subject: str, seed: int) -> str:
    """Return the part that a function belongs to, by the hash of its name."""
    place = int(hashlib.sha256(f"factuality tuning {seed} {subject}".encode()).hexdigest()[:8], 16) / 2**32
    for part, share in SHARES.items():
        place -= share
        if place < 0:
            return part
    return part


def make_data(build: Path, out: Path, seed: int) -> dict[str, int]:
    """Write taught.jsonl, pool.jsonl and the facts folder to evaluate on; returns the counts of rows."""
    taught: list[dict[str, Any]] = []
    pool: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for row in lines(build / "facts" / "sft.jsonl"):
        part = part_of(row["fact_id"].partition("#")[0], seed)
        if row["kind"] == "refusal" or part == "never":
            continue
        if part == "taught":
            taught.append(row)
        seen[row["fact_id"]] = seen.get(row["fact_id"], 0) + 1
        if seen[row["fact_id"]] <= POOL_PHRASINGS:
            pool.append(row)
    questions = []
    for row in lines(build / "facts" / "questions.jsonl"):
        part = part_of(row["fact_id"].partition("#")[0], seed)
        if row["group"] == "known" and part in ("taught", "never"):
            questions.append(row | {"group": "known" if part == "taught" else "heldout"})
        elif row["group"] == "invented":
            questions.append(row)
    write(out / "taught.jsonl", taught)
    write(out / "pool.jsonl", pool)
    write(out / "facts" / "questions.jsonl", questions)
    return {"taught": len(taught), "pool": len(pool), "questions": len(questions)}


def plinth(*words: str | Path) -> dict[str, Any]:
    """Run a verb and return what it answers."""
    command = [sys.executable, "-m", "plinth", *map(str, words), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def one_seed(build: Path, out: Path, seed: int) -> list[dict[str, Any]]:
    """Train the five models of a seed and return their scores."""
    counts = make_data(build, out, seed)
    common = ["--train.seed", str(seed), "--train.num-threads", "1"]
    plinth("sft", build / "pretrain", "--messages", out / "taught.jsonl", "--out", out / "taught", *TEACH, *common)
    asked = {}
    for name, options in (("known", []), ("free", FREE)):
        asked[name] = plinth("known", out / "taught", "--data", out / "pool.jsonl", "--out", out / name, "--seed", str(seed), *options)
    plinth("sft", out / "taught", "--messages", out / "pool.jsonl", "--out", out / "answers", *TUNE, *common)
    plinth("sft", out / "taught", "--messages", out / "known" / "sft.jsonl", "--out", out / "aware", *TUNE, *common)
    plinth("prefer", out / "aware", "--pairs", out / "known" / "pairs.jsonl", "--out", out / "aware_dpo", *PREFER, *common)
    plinth("sft", out / "taught", "--messages", out / "free" / "sft.jsonl", "--out", out / "free_aware", *TUNE, *common)
    rows = []
    for name in LABELS:
        found = plinth("evaluate", out / name, "--facts", out / "facts", "--max-questions", "300", "--style", "chat")
        scores = {key: found["questions"][key] for key in SCORES if key in found["questions"]}
        scores = {key: {part: score[part] for part in ("value", "n", "ci95")} for key, score in scores.items()}
        rows.append({"name": LABELS[name], "seed": seed, "scores": scores})
    keep = ("questions", "facts", "right_share", "sft_lines", "pairs", "refusals_over_the_bound")
    return [row | {"data": counts, "asked": {name: {key: one[key] for key in keep} for name, one in asked.items()}} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="a build of the embedded default")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--add", action="store_true", help="keep the record's seeds, which should be of the same build")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: one that goes away)")
    options = parser.parse_args()
    started = time.perf_counter()
    record, plan = RECORDS / "factuality_tuning.json", json.loads((options.build / "plan.json").read_text())
    kept = json.loads(record.read_text()) if options.add and record.exists() else {"rows": [], "num_params": plan["num_params"]}
    if kept["num_params"] != plan["num_params"]:
        parser.error(f"the record is of a build of {kept['num_params']} parameters, {options.build} has {plan['num_params']}")
    rows = kept["rows"]
    with tempfile.TemporaryDirectory() as folder:
        for seed in sorted(set(range(options.seeds)) - {row["seed"] for row in rows}):
            rows += one_seed(options.build, (options.out or Path(folder)) / str(seed), seed)
    question = "Does tuning on what a model knows keep it from making answers up, and what does it cost where it knows?"
    more = {"num_params": plan["num_params"], "wall_s": kept.get("wall_s", 0.0) + time.perf_counter() - started}
    print(write_record("factuality_tuning", question, rows, **more))


if __name__ == "__main__":
    main()
