"""The models that experiments with a known reward begin with: a decoder pretrained on stories and finetuned on reviews of the grammar.

    python benchmarks/reviews_world.py --data runs/reviews     # about two minutes on one core

Writes world/ (text, pairs and prompts of `plinth.tasks.reviews`), tokenizer/, shards/, base/ (pretrained) and sft/ (finetuned); what is
there already is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from plinth.data.curate import CurateConfig, curate
from plinth.data.documents import Document, TableBuilder
from plinth.data.quality import RULES
from plinth.data.shards import open_split, pack_corpus
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.tasks.reviews import ReviewsConfig, write_reviews
from plinth.tokenizer.train import train_tokenizer
from plinth.training.objectives import causal_lm_loss

VOCAB_SIZE, SEQ_LEN = 640, 96  # larger, 600 updates do not teach it to name the thing that was asked about
SHAPE = ["--model.hidden-size", "96", "--model.num-layers", "3", "--model.num-heads", "3", "--model.num-kv-heads", "3",
         "--model.head-dim", "32", "--model.intermediate-size", "256", "--model.max-seq-len", str(SEQ_LEN)]  # fmt: skip


def plinth(*words: str | Path) -> dict:
    """Run a verb in a process of its own and return what it answers as JSON."""
    command = [sys.executable, "-m", "plinth", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ready(folder: Path, threads: int = 1) -> Path:
    """Write what is missing of the world and its models, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    world = folder / "world"
    if not world.exists():
        write_reviews(world, ReviewsConfig())
    if not (folder / "shards").exists():
        pack(folder)
    speed = ["--train.num-threads", str(threads)]
    if not (folder / "base" / "DONE").exists():
        plinth("pretrain", folder / "shards", "--tokenizer", folder / "tokenizer", "--out", folder / "base", *SHAPE, *speed,
               "--seq-len", str(SEQ_LEN), "--sequences-per-step", "32", "--micro-batch-size", "16", "--train.steps", "600")  # fmt: skip
    if not (folder / "sft" / "DONE").exists():
        plinth("sft", folder / "base", "--messages", world / "sft.jsonl", "--out", folder / "sft", *speed, "--epochs", "3",
               "--conversations-per-step", "64", "--micro-batch-size", "32", "--train.optimizer.lr", "0.0005",
               "--train.optimizer.muon-lr", "0.0015")  # fmt: skip
    return folder


def pack(folder: Path) -> None:
    """Train the tokenizer on both kinds of text and pack the stories."""
    builder, texts = TableBuilder(), []
    for i, line in enumerate((folder / "world" / "stories.jsonl").read_text().splitlines()):
        texts.append(json.loads(line)["text"])
        builder.add(Document(texts[-1], f"stories:{i}"))
    for line in (folder / "world" / "sft.jsonl").read_text().splitlines():
        texts += [message["content"] for message in json.loads(line)["messages"]]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    tokenizer.save(folder / "tokenizer")
    every = CurateConfig(heldout_fraction=0.05, near_duplicate_threshold=None, skip_rules=tuple(RULES))
    curate(builder.finish(), folder / "corpus", every)
    pack_corpus(folder / "corpus", tokenizer, folder / "shards")


@torch.no_grad()
def general_loss(model: Transformer, folder: Path, batch: int = 32) -> float:
    """Return nats a token on the held-out stories, in windows of SEQ_LEN, fp32: what pretraining taught."""
    tokens = torch.from_numpy(open_split(folder / "shards", "heldout").tokens.astype("int64"))
    rows = (len(tokens) - 1) // SEQ_LEN
    inputs, targets = tokens[: rows * SEQ_LEN].view(rows, SEQ_LEN), tokens[1 : rows * SEQ_LEN + 1].view(rows, SEQ_LEN)
    total = sum(float(causal_lm_loss(model, (x, y))[0]) for x, y in zip(inputs.split(batch), targets.split(batch)))
    return total / targets.numel()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/reviews"), help="folder for text and runs")
    folder = ready(parser.parse_args().data)
    for name in ("base", "sft"):
        print(name, general_loss(load_decoder(folder / name / "model"), folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
