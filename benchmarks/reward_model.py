"""What is a reward model trained from scratch on 1,280 pairs worth on the rest of the file, beside the length, the words and a coin?

    python benchmarks/reward_model.py --data hh_rlhf_harmless.jsonl.gz --work DIR --piece pretrain
    python benchmarks/reward_model.py --data hh_rlhf_harmless.jsonl.gz --work DIR --piece train --seed 0     # also 1 and 2
    python benchmarks/reward_model.py --data hh_rlhf_harmless.jsonl.gz --work DIR --piece train --seed 0 --untrained
    python benchmarks/reward_model.py --data hh_rlhf_harmless.jsonl.gz --work DIR --piece report             # writes the record

The data are transcripts of Bai et al. 2022 (arXiv:2204.05862), a pair a line. The last fifth of the file is held out and nothing is chosen
on it. A tokenizer and a small decoder learn the text of the other transcripts, every token of them; then reward models start from that
decoder, and one from weights that have read nothing. The pieces are apart so that each takes a minute or two on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import read_json
from plinth.data.buckets import LengthBuckets
from plinth.evaluation.comparisons import Baselines, compare_judges
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, save_model
from plinth.models.transformer import Transformer
from plinth.posttraining.batches import pad_rows
from plinth.posttraining.formats import read_examples
from plinth.posttraining.reward import load_reward
from plinth.posttraining.reward_data import Choice, read_choices, split_tail
from plinth.posttraining.reward_tuning import RewardTuning
from plinth.recipes.reward import make_reward_model, pairs_of
from plinth.run import Run, file_sha256, usable_cores
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.job import Job, run_job
from plinth.training.loop import TrainConfig
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig
from record import spread, write_record

HELD_OUT, CONTEXT, VOCABULARY, SEEDS = 0.2, 256, 2048, 3
SHAPE = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "intermediate_size": 320}


@dataclass(frozen=True)
class Reading:
    """How the decoder reads the transcripts."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(optimizer=OptimizerConfig(name="muon", lr=0.004, muon_lr=0.02)))
    """optimizer and schedule"""
    epochs: float = 4.0
    """passes over the transcripts, of each the chosen and the rejected one"""
    rows_per_step: int = 64
    """transcripts an update"""


def tuning(seed: int) -> RewardTuning:
    """Return the configuration of every reward model."""
    optimizer = OptimizerConfig(name="muon", lr=1e-3, muon_lr=5e-3)
    train = TrainConfig(
        warmup_steps=5, decay_fraction=0.6, keep_pre_decay=False, seed=seed, optimizer=optimizer, num_threads=usable_cores()
    )  # fmt: skip
    return RewardTuning(
        train, epochs=1.0, prompts_per_step=32, micro_batch_size=16, max_seq_len=CONTEXT, too_long="cut_start", held_out_share=HELD_OUT
    )


def prepare(data: Path, work: Path) -> Tokenizer:
    """Return the tokenizer of the training transcripts, and write an untrained decoder."""
    rows = read_examples(data, "preference").rows
    kept = rows[: len(rows) - round(HELD_OUT * len(rows)) - 40]  # rows left out as too long move the border a little: stay away from it
    tokenizer = train_tokenizer([message["content"] for row in kept for message in (*row.prompt, *row.chosen, *row.rejected)], VOCABULARY)
    config = DecoderConfig(vocab_size=-(-tokenizer.vocab_size // 64) * 64, max_seq_len=CONTEXT, **SHAPE)
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer, work / "untrained/model")
    return tokenizer


def read_split(data: Path, tokenizer: Tokenizer) -> tuple[list[Choice], list[Choice]]:
    """Return the training and the held-out pairs, as `plinth reward` splits them."""
    return split_tail(read_choices(data, tokenizer, CONTEXT, "cut_start").choices, HELD_OUT)


def pretrain(data: Path, work: Path) -> None:
    """Let the decoder read the training transcripts."""
    tokenizer = prepare(data, work)
    rows = [row for choice in read_split(data, tokenizer)[0] for row in choice.rows]

    def job(config: Reading) -> Job:
        buckets = LengthBuckets([len(row) for row in rows], config.rows_per_step, config.rows_per_step // 2, config.train.seed)

        def batches_at(step: int) -> list[Any]:
            parts = [[rows[i] for i in part] for part in buckets.indices(step)]
            return [pad_rows(part, [[True] * len(row) for row in part], tokenizer.pad_id or 0) for part in parts]

        model = load_decoder(work / "untrained/model")
        return Job(model, causal_lm_loss, batches_at, buckets.steps_for(config.epochs, None), tokenizer, "reading")

    run = run_job(work / "pretrained", "pretrain", Reading(), job)
    print(run.summary)


def train(data: Path, work: Path, seed: int, untrained: bool) -> None:
    """Train one reward model."""
    base = "untrained" if untrained else "pretrained"
    run = make_reward_model(work / f"{base}_{seed}", work / base, data, tuning(seed), warn=print)
    assert run.summary is not None
    print(run.summary["held_out"]["verdict"])


def report(data: Path, work: Path) -> None:
    """Judge the reward models and their mean on the held-out pairs, and write the record."""
    tokenizer = Tokenizer.load(work / "pretrained/model")
    training, unseen = read_split(data, tokenizer)
    baselines = Baselines.fit([pair for pair, _, _ in pairs_of(training)])
    held_out = [pair for pair, _, _ in pairs_of(unseen)]
    names = [f"pretrained_{seed}" for seed in range(SEEDS)]
    found = {name: differences(work / name, unseen) for name in [*names, "untrained_0"]}
    mean = np.mean([found[name] / found[name].std() for name in names], axis=0)
    reports = {name: compare_judges(list(values), held_out, baselines) for name, values in {**found, "mean of three": mean}.items()}
    seconds = [(Run(work / name).summary or {})["time_s"] for name in names]
    rows = [{"name": name, "report": each} for name, each in reports.items()]
    one = Run(work / names[0]).summary or {}
    path = write_record(
        "reward_model", "How often is a reward model trained from scratch right on held-out pairs of hh-rlhf harmless, beside baselines?",
        rows, accuracy=spread([reports[name]["accuracy"]["value"] for name in names]), training_pairs=len(training),
        held_out_pairs=len(unseen),
        counts={name: one[name] for name in ("cut_rows", "too_long_rows", "rejected_rows", "repeated_prompts")},
        shape=SHAPE, context=CONTEXT,
        train_time_s=spread(seconds), pretrain_epochs=Reading().epochs, pretrain_time_s=(Run(work / "pretrained").summary or {})["time_s"],
        words={"features": len(baselines.words.places), "penalty": baselines.words.penalty}, length_sign=baselines.length.sign,
        data_sha256=file_sha256(data), config=read_json(work / names[0] / "config.json"),
    )  # fmt: skip
    for name, each in reports.items():
        print(f"{name}: {each['verdict']}")
    print(path)


def differences(run: Path, choices: Sequence[Choice]) -> np.ndarray:
    """Return by how much the chosen answers score higher."""
    scores = load_reward(run).score_tokens([row for choice in choices for row in choice.rows]).double().numpy().reshape(-1, 2)
    return scores[:, 0] - scores[:, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="hh_rlhf_harmless.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--piece", choices=("pretrain", "train", "report"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untrained", action="store_true", help="start from weights that have read nothing")
    options = parser.parse_args()
    if options.piece == "pretrain":
        pretrain(options.data, options.work)
    elif options.piece == "train":
        train(options.data, options.work, options.seed, options.untrained)
    else:
        report(options.data, options.work)


if __name__ == "__main__":
    main()
