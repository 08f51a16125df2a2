"""What do ten minutes of GRPO on two cores make of a model that was taught a little arithmetic, and what does a random reward?

    python benchmarks/grpo_arithmetic.py --work runs/grpo_arithmetic          # all pieces, then benchmarks/records/grpo_arithmetic.json
    python benchmarks/grpo_arithmetic.py --work runs/grpo_arithmetic --piece start     # or one of: start, verifier, random, report

The task: sums and differences of two numbers below 100, 20,000 problems, of which 1,000 are held out. A decoder of 2 layers learns the
answers of 4,000 of them for so few updates that it gets about three in ten right (`plinth sft`). Then `plinth grpo` asks it the other
problems and rewards what the verifier finds right; the control tosses a coin in the verifier's place, with all else the same. Every score
is of held-out problems: pass@1 and pass@8 of 8 answers drawn at temperature 1, and the greedy answer, by `plinth evaluate --problems`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.run import Run, usable_cores
from plinth.tasks.arithmetic import arithmetic_problems, arithmetic_rows
from plinth.tokenizer.train import train_tokenizer
from record import write_record

PROBLEMS, HELD_OUT, TAUGHT, SFT_STEPS, ROLLOUTS = 20_000, 1_000, 4_000, 195, 600
SHAPE = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "intermediate_size": 384}
OPTIONS = [
    "--loss", "dapo", "--resample-rounds", "0", "--prompts-per-rollout", "256", "--micro-batch-size", "256", "--sample.group-size", "8",
    "--sample.max-tokens", "8", "--train.optimizer.name", "adamw", "--train.optimizer.lr", "0.0006",
    "--train.warmup-steps", "20",
]  # fmt: skip
EVALUATE = ["--problem.samples", "8", "--problem.max-tokens", "8", "--problem.max-problems", str(HELD_OUT)]
CURVE_POINTS = 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/grpo_arithmetic"))
    parser.add_argument("--piece", choices=("start", "verifier", "random", "report"), help="default: all of them in turn")
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work, threads = arguments.work, ["--train.num-threads", str(arguments.threads), "--train.seed", str(arguments.seed)]
    pieces = [arguments.piece] if arguments.piece else ["start", "verifier", "random", "report"]
    if "start" in pieces:
        start(work, threads)
    for reward in ("verifier", "random"):
        if reward in pieces:
            shutil.rmtree(work / reward, ignore_errors=True)
            data = ["--data", str(work / "problems.jsonl"), "--out", str(work / reward)]
            plinth("grpo", str(work / "sft"), *data, *OPTIONS, "--reward.rewards", reward, "--rollouts", str(arguments.rollouts), *threads)
            evaluate(work, reward)
    if "report" in pieces:
        report(work, arguments.threads)
    return 0


def start(work: Path, threads: list[str]) -> None:
    """Write the problems and teach the model a little."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    problems = arithmetic_problems(PROBLEMS)
    training, held_out = problems[:-HELD_OUT], problems[-HELD_OUT:]
    for name, part in (("taught", training[:TAUGHT]), ("problems", training), ("held_out", held_out)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in arithmetic_rows(part)))
    tokenizer = train_tokenizer([question for question, _ in training[:200]], 262)
    model = Transformer(DecoderConfig(vocab_size=tokenizer.vocab_size, max_seq_len=32, **SHAPE)).init_weights(
        torch.Generator().manual_seed(0)
    )
    save_model(model, tokenizer, work / "untrained" / "model")
    steps = ["--train.steps", str(SFT_STEPS), "--train.optimizer.name", "muon"]
    plinth("sft", str(work / "untrained"), "--messages", str(work / "taught.jsonl"), "--out", str(work / "sft"), *steps, *threads)
    evaluate(work, "sft")


def evaluate(work: Path, name: str) -> None:
    """Score a run on the held-out problems."""
    out = ["--out", str(work / f"{name}.json"), "--json"]
    plinth("evaluate", str(work / name), "--problems", str(work / "held_out.jsonl"), *EVALUATE, *out)
    print(name, {key: score["value"] for key, score in json.loads((work / f"{name}.json").read_text())["scores"].items()}, file=sys.stderr)


def plinth(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "plinth", *arguments], check=True, stdout=subprocess.DEVNULL)


def report(work: Path, threads: int) -> None:
    """Write the record."""
    rows = [row_of(work, name) for name in ("sft", "verifier", "random") if (work / f"{name}.json").exists()]
    question = (
        "What do ten minutes of GRPO on two cores make of a model that was taught a little arithmetic, and what does a random reward?"
    )
    more = {"threads": threads, "task": "a+b and a-b below 100", "num_params": num_params(), "options": OPTIONS}
    print(write_record("grpo_arithmetic", question, rows, **more), file=sys.stderr)


def row_of(work: Path, name: str) -> dict[str, Any]:
    """Return a run's scores, its time, and how it went."""
    run = Run.open(work / name)
    found = json.loads((work / f"{name}.json").read_text())
    scores = {key: {part: score[part] for part in ("value", "ci95", "n")} for key, score in found["scores"].items()}
    row: dict[str, Any] = {"run": name, "scores": scores, "time_s": run.summary["time_s"], "updates": run.summary["steps"]}
    lines = [line for line in run.metrics() if "reward" in line]
    if lines:
        shown = lines[:: max(1, len(lines) // CURVE_POINTS)]
        keys = ("step", "time_s", "reward", "completion_tokens", "entropy", "zero_spread_groups", "clip_fraction", "engine_gap")
        row |= {"completions": 8 * 256 * len(lines), "curve": [{key: line[key] for key in keys} for line in shown]}
    return row


def num_params() -> int:
    shape = DecoderConfig(vocab_size=262, max_seq_len=32, **SHAPE)
    return sum(parameter.numel() for parameter in Transformer(shape).parameters())


if __name__ == "__main__":
    sys.exit(main())
