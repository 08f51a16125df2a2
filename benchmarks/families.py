"""What does each family of models learn here in the same short time, against what frequencies or chance alone give, and how fast?

    python benchmarks/families.py                  # half a minute of training each; writes benchmarks/records/families.json
    python benchmarks/families.py --family decoder --family bert      # these again; the other rows stay

Every family is trained by `plinth pretrain` from scratch: models of text on this Python's standard library (4,096 entries, context 256),
models of pairs on numerals in English and German, CLIP on drawn shapes. The loss is on held-out text, pairs or images; what it stands
beside is the loss of the tokens' frequencies, and for CLIP that of naming at random among the images of a batch. Losses of different
families are of different things (a next token, a hidden one, a token of a translation, an image's own caption): compare within a row.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ablations.league import heldout_loss, prepare

from plinth.data.pictures import read_pictures
from plinth.data.shards import open_split
from plinth.evaluation.zero_shot import ImageTextModel
from plinth.models.hub import load_decoder
from plinth.recipes.shapes_world import write_world
from plinth.tasks.numerals import numeral_pairs
from record import RECORDS, write_record

WIDTH = ["--model.hidden-size", "256", "--model.num-layers", "4", "--model.num-heads", "4"]
DECODER = [*WIDTH, "--model.num-kv-heads", "4", "--model.head-dim", "64", "--model.intermediate-size", "704"]
ENCODER_DECODER = ["--model.hidden-size", "128", "--model.num-layers", "2", "--model.num-heads", "4", "--model.head-dim", "32",
                   "--model.intermediate-size", "256", "--model.dropout", "0"]  # fmt: skip
CELLS = ["--model.hidden-size", "128", "--model.embedding-size", "128", "--model.dropout", "0"]
PAIRED = ["--data.tokenizer-size", "400", "--data.pairs-per-step", "64", "--data.micro-batch-size", "32",
          "--train.optimizer.lr", "0.004", "--train.optimizer.muon-lr", "0.02"]  # fmt: skip
PAIRS_HELD_OUT, PAIRS = 200, 4000
CALIBRATION_STEPS = 6


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    data: str
    """text, pairs or images"""
    options: list[str]
    """of `plinth pretrain`"""


FAMILIES = {
    "decoder": Family("text", DECODER),
    "decoder, 8 experts of which 2": Family("text", [*DECODER[:-1], "352", "--model.num-experts", "8", "--model.num-active-experts", "2"]),
    "awd-lstm": Family(
        "text", ["--family", "awd-lstm", "--model.embedding-size", "256", "--model.hidden-size", "512", "--train.optimizer.lr", "0.01"]
    ),
    "bert": Family("text", ["--family", "bert", *WIDTH, "--model.intermediate-size", "1024", "--model.max-seq-len", "256"]),
    "electra": Family("text", ["--family", "electra", *WIDTH, "--model.intermediate-size", "1024", "--model.max-seq-len", "256"]),
    "transformer (2017)": Family("pairs", ["--family", "transformer", "--label-smoothing", "0", *ENCODER_DECODER, *PAIRED]),
    "t5": Family("pairs", ["--family", "t5", *ENCODER_DECODER, *PAIRED]),
    "gru, no attention": Family("pairs", ["--family", "gru", "--attention", "none", *CELLS, *PAIRED]),
    "gru, additive attention": Family("pairs", ["--family", "gru", "--attention", "additive", *CELLS, *PAIRED]),
    "lstm, multiplicative attention": Family("pairs", ["--family", "lstm", "--attention", "multiplicative", *CELLS, *PAIRED]),
    "clip": Family("images", ["--family", "clip"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/families"), help="folder for data and runs")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training a family")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all")
    arguments = parser.parse_args()
    ready(arguments.data)
    path = RECORDS / "families.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": [], "seconds": arguments.seconds}
    found = {row["family"]: row for row in known["rows"] if known["seconds"] == arguments.seconds}
    for name in arguments.family or FAMILIES:
        found[name] = row_of(arguments.data, name, FAMILIES[name], arguments.seconds)
        print(found[name], file=sys.stderr, flush=True)
    rows = [found[name] for name in FAMILIES if name in found]
    question = "What does each family learn here in the same short time, against frequencies or chance alone, and how fast?"
    write_record("families", question, rows, seconds=arguments.seconds)
    return 0


def ready(folder: Path) -> None:
    """Write what is missing of the data."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "shards").exists():
        prepare(folder)
    if not (folder / "shapes").exists():
        write_world(folder / "shapes", images_each=12)
    pairs = numeral_pairs(PAIRS + PAIRS_HELD_OUT)
    for name, part in (("train", pairs[:PAIRS]), ("heldout", pairs[PAIRS:])):
        for side, language in enumerate(("en", "de")):
            (folder / f"{name}.{language}").write_text("".join(pair[side] + "\n" for pair in part), encoding="utf-8")


def row_of(folder: Path, name: str, family: Family, seconds: float) -> dict:
    """Train a family for about so many seconds and return its row."""
    data = {
        "text": [str(folder / "shards"), "--tokenizer", str(folder / "tokenizer")],
        "pairs": ["--pairs", *(str(folder / f"train.{side}") for side in ("en", "de")),
                  "--held-out", *(str(folder / f"heldout.{side}") for side in ("en", "de"))],
        "images": ["--images", str(folder / "shapes" / "train")],
    }[family.data]  # fmt: skip
    first = train([*data, *family.options], folder / "calibration", CALIBRATION_STEPS)
    steps = max(20, round(seconds / first["time_s"] * CALIBRATION_STEPS))
    summary = train([*data, *family.options], folder / "run", steps)
    row = {
        "family": name,
        "num_params": summary["num_params"],
        "steps": steps,
        "counted_per_s": summary["tokens"] / summary["time_s"],
        "counted": "pairs" if family.data == "images" else "tokens",
        **measured(folder, family, summary),
    }
    remove(folder / "run")
    remove(folder / "calibration")
    return row


def train(options: list[str], out: Path, steps: int) -> dict:
    """Run `plinth pretrain` and return its summary."""
    remove(out)
    command = [sys.executable, "-m", "plinth", "pretrain", *options, "--out", str(out), "--train.steps", str(steps), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def remove(out: Path) -> None:
    subprocess.run(["rm", "-rf", str(out)], check=True)


def measured(folder: Path, family: Family, summary: dict) -> dict[str, float]:
    """Return held-out loss and what it stands beside, in nats."""
    if family.data == "images":
        return {"heldout_nats": held_out_contrast(folder), "trivial_nats": math.log(CONTRASTED)}
    trivial = summary.get("heldout_unigram_nats") or unigram_nats(folder / "shards")
    found = summary.get("heldout_nats", summary.get("heldout_loss_nats"))
    if found is None:
        found = heldout_loss(load_decoder(folder / "run" / "model"), folder / "shards", 256)
    return {"heldout_nats": found, "trivial_nats": trivial}


def unigram_nats(shards: Path) -> float:
    """Return the loss of the training tokens' frequencies on held-out text; one is added to each count."""
    train_tokens, held = open_split(shards, "train").tokens, open_split(shards, "heldout").tokens
    counts = np.bincount(train_tokens, minlength=int(max(train_tokens.max(), held.max())) + 1) + 1.0
    return float(-np.log(counts / counts.sum())[held].mean())


CONTRASTED = 32  # images among whose captions each is sought


@torch.no_grad()
def held_out_contrast(folder: Path) -> float:
    """Return the mean loss of finding an image's own caption among those of CONTRASTED images of combinations never seen."""
    model = ImageTextModel.load(folder / "run")
    pictures, _ = read_pictures(folder / "shapes" / "held_out")
    seen, chosen = set(), []
    for picture in pictures:  # one image of each combination: equal captions would count as mistakes
        if picture.captions[0] not in seen:
            seen.add(picture.captions[0])
            chosen.append(picture)
    chosen = chosen[:CONTRASTED]
    images, texts = model.images([one.image for one in chosen]), model.texts([one.captions[0] for one in chosen])
    scores = model.model.logit_scale.float().exp() * images @ texts.T
    return float(torch.nn.functional.cross_entropy(scores, torch.arange(len(chosen))))


if __name__ == "__main__":
    raise SystemExit(main())
