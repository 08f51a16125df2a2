"""Which loss law do this project's own runs follow at the scale of minutes?

Pretrains decoders of several sizes for several lengths on the standard library of this Python, with the batch, the
learning rates and the optimizer that the plan would take, scores each on held-out documents, and fits a Chinchilla law
in bytes. Prints one JSON record; --law-out writes the law in the form that `plinth plan --law FILE.json` reads.
Takes some 15 minutes on two quiet cores with bf16 units, 4 with --quick.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

from plinth.config import save_json, to_dict
from plinth.data.curate import curate
from plinth.data.shards import pack_corpus
from plinth.data.stdlib import stdlib_documents
from plinth.evaluation.likelihood import score_corpus
from plinth.models.hub import load_decoder
from plinth.recipes.pretraining import PretrainConfig, pretrain
from plinth.run import describe_hardware, installed_versions, usable_cores
from plinth.scaling.candidates import choose_optimizer, choose_tokens_per_step, decoder_config
from plinth.scaling.fit import LawPoint, fit_chinchilla
from plinth.scaling.laws import REPETITION, STEP_LAW
from plinth.scaling.plan_config import PlanConfig
from plinth.scaling.timing import body_params
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig

SEQ_LEN = 256
SHAPES = ((2, 64), (3, 128), (4, 192), (6, 256))
TOKENS = (0.75e6, 1.5e6, 3.0e6, 6.0e6)
MAX_RUN_FLOPS = 1.1e14


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only runs below a quarter of the largest, in FLOPs")
    parser.add_argument("--vocab-size", type=int, default=2048, help="entries of the tokenizer (default 2048)")
    parser.add_argument("--free-exponents", action="store_true", help="fit alpha and beta too; needs the full set of runs")
    parser.add_argument("--law-out", type=Path, help="write the law here, JSON")
    arguments = parser.parse_args()
    limit = MAX_RUN_FLOPS / 4 if arguments.quick else MAX_RUN_FLOPS
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.vocab_size, limit)
    gains = [PlanConfig().muon_gain if row["optimizer"] == "muon" else 1.0 for row in rows]  # the law counts in AdamW's bytes
    points = [LawPoint(row["params"], row["effective_bytes"] * gain, row["bpb"] * math.log(2)) for row, gain in zip(rows, gains)]
    exponents = {} if arguments.free_exponents else {"param_exponent": 0.3478, "token_exponent": 0.3658}
    fitted = fit_chinchilla(points, name="own runs", source="benchmarks/scaling_law.py on the standard library", **exponents)
    if arguments.law_out:
        save_json(arguments.law_out, fitted.law)
    record = {
        "question": "Which loss law do this project's own runs follow at the scale of minutes?",
        "value": to_dict(fitted.law),
        "unit": "nats a byte; parameters of the blocks; effective bytes",
        "n": len(rows),
        "spread": {"relative_rmse": fitted.relative_rmse},
        "runs": rows,
        "hardware": describe_hardware(),
        "versions": installed_versions(),
    }
    print(json.dumps(record))
    return 0


def measure(folder: Path, vocab_size: int, max_run_flops: float) -> list[dict]:
    """Train and score every shape at every length that stays within the FLOPs; returns a row a run."""
    manifest = curate(stdlib_documents(), folder / "corpus")
    import pyarrow.parquet as pq

    texts = pq.read_table(folder / "corpus" / "train.parquet", columns=["text"]).column("text").to_pylist()
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save(folder / "tokenizer")
    packed = pack_corpus(folder / "corpus", tokenizer, folder / "shards")
    bytes_per_token = packed["bytes_train"] / packed["tokens_train"]
    rows = []
    for layers, width in SHAPES:
        config = decoder_config(layers, width, tokenizer.vocab_size, 2 * SEQ_LEN, None)
        for tokens in TOKENS:
            flops = 6.0 * tokens * (body_params(config) + vocab_size * width)
            if flops > max_run_flops:
                continue
            row = train_one(folder, config, tokens, tokenizer)
            total_bytes = row["tokens"] * bytes_per_token
            row["effective_bytes"] = REPETITION.effective_tokens(manifest["bytes_train"], total_bytes)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def train_one(folder: Path, config, tokens: float, tokenizer: Tokenizer) -> dict:
    """Pretrain one model as the plan would and score it."""
    options = PlanConfig()
    tokens_per_step = choose_tokens_per_step(tokens, SEQ_LEN, config.hidden_size, options)
    optimizer = choose_optimizer(config, tokens_per_step, options)
    steps = int(tokens / tokens_per_step)
    sequences = tokens_per_step // SEQ_LEN
    train = TrainConfig(
        steps=steps,
        warmup_steps=max(10, round(options.warmup_share * steps)),
        decay_fraction=options.decay_share,
        optimizer=OptimizerConfig(
            name=optimizer,
            lr=STEP_LAW.lr(body_params(config), tokens),
            muon_lr=options.muon_lr,
            weight_decay=options.weight_decay,
            beta2=0.99,
        ),
    )
    setup = PretrainConfig(config, train, SEQ_LEN, sequences, max(1, math.ceil(sequences / usable_cores())))
    out = folder / f"{config.num_layers}x{config.hidden_size}_{int(tokens)}"
    started = time.perf_counter()
    run = pretrain(out, folder / "shards", folder / "tokenizer", setup)
    elapsed = time.perf_counter() - started
    score = score_corpus(load_decoder(run.model_dir), folder / "shards", tokenizer=tokenizer, seq_len=SEQ_LEN)["bits_per_byte"]
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "params": body_params(config),
        "tokens": steps * tokens_per_step,
        "steps": steps,
        "optimizer": optimizer,
        "lr": train.optimizer.lr,
        "bpb": score.value,
        "bpb_ci95": list(score.ci95),
        "time_s": elapsed,
    }


if __name__ == "__main__":
    sys.exit(main())
