"""Does PPO reach the optimum of a known reward, what does it pay in KL, and where does a learnt reward lead it astray?

    python benchmarks/ppo_gold.py gold                # ten minutes on two cores, at most
    python benchmarks/ppo_gold.py frontier            # several coefficients of the KL, against the best that can be had
    python benchmarks/ppo_gold.py astray              # a learnt reward followed too far, judged by the known one
    python benchmarks/ppo_gold.py mix                 # what the pretraining mix keeps
    python benchmarks/ppo_gold.py draw                # the pictures of docs/ppo.md again, from the records

The world is `plinth.tasks.reviews`, whose best policy at every KL is computed; the models are those of reviews_world.py. Each part writes
benchmarks/records/ppo_PART.json; one that was cut off goes on where it stopped, and runs that are done are not done again. Rewards are
means over held-out prompts, KL is that to the finetuned model in nats an answer.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from ppo_pictures import draw

from plinth.models.hub import load_decoder
from plinth.posttraining.reward import load_reward
from plinth.posttraining.rollouts import SampleConfig, Sampler
from plinth.tasks import reviews
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from record import write_record
from reviews_world import general_loss, plinth, ready

GOAL = 0.9 * reviews.OPTIMUM
MAX_TOKENS = 56
BASE = ["--prompts-per-rollout", "256", "--epochs", "2", "--minibatches", "4", "--sample.max-tokens", str(MAX_TOKENS),
        "--train.optimizer.name", "muon", "--train.optimizer.lr", "0.001", "--train.optimizer.muon-lr", "0.003",
        "--critic.coef", "1", "--critic.lr-factor", "2"]  # fmt: skip
BETAS = (0.4, 0.2, 0.1, 0.05, 0.02)
CALM = ("--train.optimizer.lr", "0.0005", "--train.optimizer.muon-lr", "0.0015")  # BASE's rates drift away from the reference for nothing
PAIRS, NOISE = 1500, 0.1


def answers(model_dir: Path, reference_dir: Path, each: int = 8, threads: int = 1, seed: int = 11) -> dict:
    """Return what a model answers to the held-out prompts, with gold rewards and log-probability ratios to the reference."""
    tokenizer, policy = Tokenizer.load(model_dir), load_decoder(model_dir)
    asked = reviews.prompts("heldout")
    tokens = [render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True).tokens for prompt in asked]
    sampler = Sampler(policy, tokenizer.end_ids, SampleConfig(group_size=each, max_tokens=MAX_TOKENS), threads)
    rollouts = sampler.sample(tokens, [seed])
    rows = rollouts.rows()
    ratio = ((rows["log_probs"] - sampler.score(rows, load_decoder(reference_dir))) * rows["mask"]).sum(1)
    sampler.close()
    texts = [tokenizer.decode(rollouts.answer_tokens(i)) for i in range(len(rollouts))]
    prompts = [prompt for prompt in asked for _ in range(each)]
    return {"prompts": prompts, "texts": texts, "gold": [reviews.reward(p, t) for p, t in zip(prompts, texts)], "ratio": ratio.tolist(),
            "tokens": [len(row) for row in rollouts.completions]}  # fmt: skip


def mean(values: list[float]) -> dict[str, float]:
    """Return mean, standard error and number."""
    return {"value": statistics.fmean(values), "stderr": statistics.stdev(values) / math.sqrt(len(values)), "n": len(values)}


def measured(folder: Path, run: Path, threads: int) -> dict:
    """Return a run's held-out reward, KL, length and general loss."""
    found = answers(run / "model", folder / "sft" / "model", threads=threads)
    return {
        "reward": mean(found["gold"]),
        "kl_nats": mean(found["ratio"]),
        "answer_tokens": statistics.fmean(found["tokens"]),
        "general_nats": general_loss(load_decoder(run / "model"), folder),
        "example": found["texts"][0],
    }


def train(folder: Path, name: str, threads: int, *options: str, reward: str | Path = "reviews") -> tuple[Path, dict, list[dict]]:
    """Run `plinth ppo` unless it is done; return the run, its summary and a line a roll-out of its metrics."""
    run = folder / name
    if not (run / "DONE").exists():
        resume = ["--resume"] if run.exists() else []
        plinth("ppo", folder / "sft", "--reward", reward, "--data", folder / "world" / "prompts.jsonl", "--out", run,
               "--train.num-threads", str(threads), *BASE, *options, *resume)  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = {line["rollout"]: line for line in reversed(lines)}
    return run, json.loads((run / "DONE").read_text()), [first[number] for number in sorted(first)]


def gold(folder: Path, threads: int, completions: int) -> None:
    """Train on the known reward until it is near its optimum."""
    began = time.perf_counter()
    run, summary, lines = train(folder, "ppo_gold", threads, "--completions", str(completions), "--kl.coef", "0.01")
    wall = time.perf_counter() - began
    every = max(1, len(lines) // 30)
    reached = next((line["time_s"] for line in lines if line["reward"] >= GOAL), None)
    row = {"threads": threads, "completions": completions, "wall_s": wall, "train_s": summary["time_s"], "goal": GOAL,
           "goal_reached_s": reached, "before": measured(folder, folder / "sft", threads), "after": measured(folder, run, threads),
           "curve": [{key: line[key] for key in ("time_s", "rollout", "reward", "kl")} for line in lines[::every]]}  # fmt: skip
    show(row | {"curve": None})
    write_record("ppo_gold", "Does PPO reach 90 % of a known reward's optimum in ten minutes on two cores?", [row])


def frontier(folder: Path, threads: int, completions: int) -> None:
    """Train at several coefficients, and rank the finetuned model's own answers for the best of n."""
    rows = []
    for beta in BETAS:
        run, summary, _ = train(folder, f"ppo_beta_{beta}", threads, "--completions", str(completions), "--kl.coef", str(beta), *CALM)
        best = reviews.best_mean(beta)
        rows.append({"method": "ppo", "beta": beta, "train_s": summary["time_s"], **measured(folder, run, threads),
                     "best_kl_nats": best[0], "best_reward": best[1]})  # fmt: skip
        show(rows[-1])
    drawn = answers(folder / "sft" / "model", folder / "sft" / "model", each=32, threads=threads)["gold"]
    groups, rng = np.array(drawn).reshape(-1, 32), np.random.Generator(np.random.PCG64(0))
    for n in (1, 2, 4, 8, 16, 32):
        picked = np.array([[rng.permutation(group)[:n].max() for group in groups] for _ in range(16)]).mean(0)
        rows.append({"method": "best_of_n", "n": n, "kl_nats": {"value": math.log(n) - (n - 1) / n, "stderr": 0.0, "n": 0},
                     "reward": mean(picked.tolist()), "best_reward": reviews.best_of_n_mean(n)})  # fmt: skip
    curve = [reviews.best_mean(beta) for beta in np.geomspace(2.0, 0.015, 40)]
    question = "What reward does PPO reach at which KL, beside the best of n and the best that can be had?"
    write_record("ppo_frontier", question, rows, attainable=curve, completions=completions)


def astray(folder: Path, threads: int, completions: int) -> None:
    """Train a reward model on few, noisy pairs, follow it far, and judge by the known reward."""
    pairs = folder / "pairs_astray.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in reviews.preferences(PAIRS, seed=4, noise=NOISE)))
    model = folder / "reward_astray"
    if not (model / "DONE").exists():
        plinth("reward", folder / "sft", "--data", pairs, "--out", model, "--held-out", folder / "world" / "pairs_heldout.jsonl",
               "--epochs", "4", "--normalise", "mean_std", "--train.num-threads", str(threads))  # fmt: skip
    run, _, lines = train(
        folder, "ppo_astray", threads, "--completions", str(completions), "--kl.coef", "0.0", "--watch", "reviews", reward=model
    )
    drawn = answers(folder / "sft" / "model", folder / "sft" / "model", each=32, threads=threads)
    proxy = np.array(load_reward(model).score(drawn["prompts"], drawn["texts"]))
    slope, shift = np.polyfit(proxy, drawn["gold"], 1).tolist()  # in the known reward's unit, as far as the finetuned model's answers tell
    keys = ("rollout", "kl", "gold", "completion_tokens")
    curve = [{**{key: line[key] for key in keys}, "reward": slope * line["reward"] + shift} for line in lines]
    ranked = best_by_proxy((slope * proxy + shift).reshape(-1, 32), np.array(drawn["gold"]).reshape(-1, 32))
    fits = {"ppo": gao_fit([(line["kl"], line["gold"]) for line in curve], rl=True),
            "best_of_n": gao_fit([(row["kl"], row["gold"]) for row in ranked], rl=False)}  # fmt: skip
    row = {"pairs": PAIRS, "noise": NOISE, "accuracy": accuracy(model, folder), "curve": curve, "best_of_n": ranked, "fits": fits,
           "after": measured(folder, run, threads)}  # fmt: skip
    show({**row, "curve": None, "best_of_n": None})
    write_record("ppo_astray", "How far does a learnt reward carry before what it stands for falls?", [row], completions=completions)


def best_by_proxy(proxy: np.ndarray, known: np.ndarray) -> list[dict]:
    """Return proxy and gold of the answer that the proxy likes best of n, with the KL log n - (n - 1)/n."""
    rng, rows = np.random.Generator(np.random.PCG64(1)), []
    for n in (1, 2, 4, 8, 16, 32):
        picked = []
        for _ in range(16):
            chosen = np.stack([rng.permutation(proxy.shape[1])[:n] for _ in proxy])
            best = chosen[np.arange(len(proxy)), np.take_along_axis(proxy, chosen, 1).argmax(1)]
            picked.append((proxy[np.arange(len(proxy)), best].mean(), known[np.arange(len(proxy)), best].mean()))
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n, "reward": float(np.mean(picked, 0)[0]), "gold": float(np.mean(picked, 0)[1])})
    return rows


def gao_fit(points: list[tuple[float, float]], *, rl: bool) -> dict:
    """Fit gold - gold at 0 = d(α - β log d), d = sqrt(KL), or d(α - β d) for the best of n; returns both and R².

    Source: Gao et al. 2022, arXiv:2210.10760, eqs. 1 and 2.
    """
    start = points[0][1]
    d, y = np.array([(math.sqrt(kl), value - start) for kl, value in points if kl > 0.05]).T
    features = np.stack([d, -d * (np.log(d) if rl else d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(features, y, rcond=None)
    left = y - features @ [alpha, beta]
    return {"alpha": float(alpha), "beta": float(beta), "r2": float(1 - (left**2).sum() / ((y - y.mean()) ** 2).sum()), "start": start}


def accuracy(model: Path, folder: Path) -> float:
    """Return the share of held-out pairs that a reward model orders as the known reward does."""
    rows = [json.loads(line) for line in (folder / "world" / "pairs_heldout.jsonl").read_text().splitlines()]
    reward, prompts = load_reward(model), [row["prompt"] for row in rows]
    chosen, rejected = (reward.score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    return float(np.mean(np.array(chosen) > np.array(rejected)))


def mix(folder: Path, threads: int, completions: int) -> None:
    """Train with and without texts of pretraining in each update, alike in all else."""
    before = measured(folder, folder / "sft", threads)
    rows = [{"run": "before", **before}]
    texts = ["--ptx.texts", str(folder / "world" / "stories.jsonl")]
    for name, options in (("plain", []), ("ptx", [*texts, "--ptx.coef", "1.0"])):
        run, summary, _ = train(folder, f"ppo_mix_{name}", threads, "--completions", str(completions), "--kl.coef", "0.02", *options)
        rows.append({"run": name, "train_s": summary["time_s"], **measured(folder, run, threads)})
        rows[-1]["general_change"] = rows[-1]["general_nats"] / before["general_nats"] - 1
        show(rows[-1])
    write_record("ppo_mix", "What of pretraining does PPO lose, with and without its texts in the updates?", rows, completions=completions)


def show(row: dict) -> None:
    print({key: value for key, value in row.items() if value is not None}, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("gold", "frontier", "astray", "mix", "draw"))
    parser.add_argument("--data", type=Path, default=Path("runs/reviews"), help="folder for text and runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--completions", type=int, help="of each run (default: the part's own)")
    options = parser.parse_args()
    if options.part == "draw":
        return draw()
    folder = ready(options.data, options.threads)
    torch.set_num_threads(options.threads)
    part, default = {"gold": (gold, 32_000), "frontier": (frontier, 10_240), "astray": (astray, 16_000), "mix": (mix, 8_000)}[options.part]
    part(folder, options.threads, options.completions or default)
    return draw()


if __name__ == "__main__":
    raise SystemExit(main())
