"""At equal active parameters and equal tokens, how much does a decoder gain from experts, and what do they cost in time here?

A dense decoder against one whose blocks have 8 experts of half its feed-forward width, of which a token takes 2. Both read the same
batches of the same text (documentation strings and sources of Python's standard library) with the same rates, on every seed; the order
of the two alternates. Loss in bits a byte of held-out documents. Equal tokens are equal operations but for the routers. Writes
benchmarks/records/moe_equal_active.json; takes a few minutes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from plinth.data.curate import CurateConfig, curate
from plinth.data.shards import pack_corpus, read_manifest
from plinth.data.stdlib import stdlib_documents
from plinth.evaluation.likelihood import score_corpus
from plinth.models.config import DecoderConfig
from plinth.models.cost import count_active_params, count_params, train_flops_per_token
from plinth.models.hub import load_decoder
from plinth.recipes.pretraining import PretrainConfig, pretrain
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from record import spread, write_record

VOCAB = 1024
DENSE = DecoderConfig(
    vocab_size=VOCAB, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=512, max_seq_len=256
)
MODELS = {
    "dense": DENSE,
    "8 experts, 2 active": replace(DENSE, num_experts=8, num_active_experts=2, expert_intermediate_size=256),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="runs a model")
    parser.add_argument("--steps", type=int, default=150, help="updates of 8,192 tokens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards, tokenizer = prepare(folder)
        found: dict[str, list[dict]] = {name: [] for name in MODELS}
        for seed in range(arguments.seeds):
            for name in list(MODELS)[:: 1 if seed % 2 else -1]:
                found[name].append(measure(name, seed, arguments.steps, folder, shards, tokenizer))
        corpus = {name: read_manifest(shards)["sha256"][name] for name in ("train.bin", "heldout.bin")}
    rows = [summarise(name, runs) for name, runs in found.items()]
    gains = [a["bits_per_byte"] - b["bits_per_byte"] for a, b in zip(found["dense"], found["8 experts, 2 active"])]
    more = {"steps": arguments.steps, "tokens_per_step": 8192, "bits_per_byte_gained_by_seed": spread(gains), "shards_sha256": corpus}
    print(write_record("moe_equal_active", __doc__.splitlines()[0], rows, **more))
    return 0


def prepare(folder: Path) -> tuple[Path, Path]:
    """Return the shards and the tokenizer that packed them."""
    documents = stdlib_documents()
    curate(documents, folder / "corpus", CurateConfig(heldout_fraction=0.02))
    tokenizer = train_tokenizer(documents["text"].to_pylist()[::20], VOCAB)
    tokenizer.save(folder / "tokenizer")
    pack_corpus(folder / "corpus", tokenizer, folder / "shards")
    return folder / "shards", folder / "tokenizer"


def measure(name: str, seed: int, steps: int, folder: Path, shards: Path, tokenizer: Path) -> dict:
    """Return what one run gave."""
    config = PretrainConfig(
        model=MODELS[name], seq_len=256, sequences_per_step=32, micro_batch_size=16,
        train=TrainConfig(steps=steps, warmup_steps=10, seed=seed, dtype="bfloat16", checkpoint_every_s=1e9),
    )  # fmt: skip
    run = pretrain(folder / f"{name}-{seed}", shards, tokenizer, config)
    score = score_corpus(load_decoder(run.model_dir), shards, tokenizer=Tokenizer.load(tokenizer))["bits_per_byte"].value
    lines = [line for line in run.metrics() if "tokens_per_s" in line]
    found = {
        "bits_per_byte": score,
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
        "load_entropy": lines[-1].get("load_entropy"),
        "seed": seed,
    }
    print(name, found, flush=True)
    return found


def summarise(name: str, runs: list[dict]) -> dict:
    """Return a row of the record."""
    config = MODELS[name]
    entropies = [run["load_entropy"] for run in runs if run["load_entropy"] is not None]
    return {
        "model": name,
        "params": count_params(config)["total"],
        "active_params": count_active_params(config),
        "train_flops_per_token": train_flops_per_token(config, 256),
        "bits_per_byte": spread([run["bits_per_byte"] for run in runs]),
        "tokens_per_s": spread([run["tokens_per_s"] for run in runs]),
        "load_entropy": spread(entropies) if entropies else None,
        "runs": runs,
    }


if __name__ == "__main__":
    raise SystemExit(main())
