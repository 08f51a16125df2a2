"""How much of what the best of n answers gains does a student keep that was finetuned on them?

    python benchmarks/best_of_n.py --data runs/reviews     # the world's models (about two minutes, once), then two minutes a seed

In the world of reviews the gold reward is known. For each n, the best of n answers of the finetuned model to the training prompts, scored
by the gold reward, are finetuned on; the student's single answers to held-out prompts are compared with the best of n answers of the model
that it began with. A control is finetuned on as many answers that nobody chose. Every student is made with several seeds, of the answers
that are drawn and of the finetuning; intervals are over prompts, of the seeds' mean. Writes benchmarks/records/best_of_n.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from plinth.inference.best_of import best_of_kl, best_of_mean
from plinth.inference.local_model import LocalModel
from plinth.posttraining.prompts import read_prompts
from plinth.posttraining.selection import SelectionConfig, draw_answers
from plinth.recipes.selecting import select_answers
from plinth.tasks.reviews import reward
from record import write_record
from reviews_world import plinth, ready

SIZES = (4, 16)
ROUNDS = 12  # times that each training prompt is asked
DRAWS = 64  # answers to each held-out prompt
MAX_TOKENS = 60
EPOCHS = 4


def held_out_answers(folder: Path, world: Path, draws: int = DRAWS) -> tuple[np.ndarray, list[tuple[list[int], list[int]]]]:
    """Return the gold rewards of a model's answers to held-out prompts, (prompts, draws), and some answers as (prompt, answer) tokens."""
    model, prompts = LocalModel.load(folder), read_prompts(world / "prompts_heldout.jsonl")
    found, _ = draw_answers(model, prompts, SelectionConfig(n=draws, max_tokens=MAX_TOKENS, seed=1000))
    whole = min(map(len, found))  # answers that were cut off are not among them
    rewards = np.array([[reward(prompt.text, text) for text in texts[:whole]] for prompt, texts in zip(prompts, found)])
    tokenizer = model.text.tokenizer
    rows = []
    for prompt, texts in zip(prompts, found):
        before = model.text.render(prompt.messages)
        room = model.text.engine.max_seq_len - len(before)  # a text may have more tokens than it was written in
        rows += [(before, [*tokenizer.encode(text), tokenizer.end_id][:room]) for text in texts[:8]]
    return rewards, rows


def kl_to(student: Path, base: Path, rows: list[tuple[list[int], list[int]]]) -> float:
    """Return the mean log-ratio in nats of the student's own answers, student over base."""
    values = []
    for folder in (student, base):
        engine = LocalModel.load(folder).text.engine
        scores = engine.score([prompt + answer for prompt, answer in rows])
        values.append(np.array([sum(score[-len(answer) :]) for score, (_, answer) in zip(scores, rows)]))
    return float((values[0] - values[1]).mean())


def teach(base: Path, data: Path, name: str, n: int, by: str, seed: int) -> tuple[Path, float]:
    """Draw, choose and finetune; return the student and the seconds that it took."""
    out, start = data / f"student_{name}", time.perf_counter()
    folder = data / f"drawn_{name}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    model, lines = LocalModel.load(base), []
    for draw in range(ROUNDS * seed, ROUNDS * (seed + 1)):
        select_answers(model, data / "world/prompts.jsonl", folder, SelectionConfig(n=n, by=by, max_tokens=MAX_TOKENS, seed=draw))
        lines.append((folder / "sft.jsonl").read_text())
    (folder / "all.jsonl").write_text("".join(lines))
    speed = ["--train.seed", seed, "--train.num-threads", 1, "--train.optimizer.lr", 0.0005, "--train.optimizer.muon-lr", 0.0015]
    size = ["--epochs", EPOCHS, "--conversations-per-step", 64, "--micro-batch-size", 32]
    plinth("sft", base, "--messages", folder / "all.jsonl", "--out", out, *size, *speed)
    return out, time.perf_counter() - start


def student_of(base: Path, data: Path, name: str, n: int, by: str, seed: int) -> tuple[np.ndarray, float, float]:
    """Return of one student its mean gold reward a held-out prompt, its nats from the start, and the seconds that it took."""
    student, seconds = teach(base, data, name, n, by, seed)
    rewards, answers = held_out_answers(student, data / "world")
    return rewards.mean(1), kl_to(student, base, answers), seconds


def share_interval(base: np.ndarray, best: np.ndarray, student: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Return (student − base) / (best − base) of means over prompts, with a 95 % bootstrap interval over the prompts."""
    columns = np.stack([base, best, student])
    drawn = np.random.default_rng(0).integers(0, columns.shape[1], size=(resamples, columns.shape[1]))
    means = columns[:, drawn].mean(2)
    shares = (means[2] - means[0]) / (means[1] - means[0])
    whole = columns.mean(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float((whole[2] - whole[0]) / (whole[1] - whole[0])), float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/reviews"), help="folder of the world and its models")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data = ready(options.data)
    torch.set_num_threads(1)
    base = data / "sft"
    base_rewards, _ = held_out_answers(base, data / "world")
    rows = [{"name": "the model as it was", "n": 1, "reward": float(base_rewards.mean())}]
    for name, n, by in [("control", 4, "first"), *((f"best_of_{n}", n, "reviews") for n in SIZES)]:
        made = [student_of(base, data, name, n, by, seed) for seed in range(options.seeds)]
        rewards = np.stack([rewards_N for rewards_N, _, _ in made])
        row = {
            "name": name, "n": n, "by": by, "reward": float(rewards.mean()), "rewards_by_seed": rewards.mean(1).tolist(),
            "kl_nats": float(np.mean([kl for _, kl, _ in made])), "time_s": sum(seconds for _, _, seconds in made),
        }  # fmt: skip
        if by != "first":
            best = np.array([best_of_mean(each.tolist(), n) for each in base_rewards])
            share, low, high = share_interval(base_rewards.mean(1), best, rewards.mean(0))
            gain = best.mean() - base_rewards.mean()
            row |= {
                "best_of_n_reward": float(best.mean()),
                "best_of_n_kl_nats": best_of_kl(n),
                "share_kept": {"value": share, "ci95": [low, high]},
                "shares_by_seed": ((rewards.mean(1) - base_rewards.mean()) / gain).tolist(),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    path = write_record(
        "best_of_n", "how much of the gain of the best of n does a student keep?", rows,
        rounds=ROUNDS, seeds=options.seeds, draws=DRAWS, epochs=EPOCHS, max_tokens=MAX_TOKENS,
    )  # fmt: skip
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
