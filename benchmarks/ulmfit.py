"""How many labels is a language model worth, and which ingredient of ULMFiT is worth what?

    python benchmarks/ulmfit.py --data DIR                   # goes on where it was stopped; writes benchmarks/records/ulmfit.json
    python benchmarks/ulmfit.py --data DIR --seconds 300     # begins no further arm after so long; several processes may share DIR

A passage of a few lines of the Python standard library: which of eight packages is it from? Passages that name one of the eight are left
out, equal ones count once. A small decoder (--trunk awd-lstm: an AWD-LSTM) is pretrained on the rest of the library (none of the eight
packages' files), finetuned on passages of the eight without their labels (those to test on are not among them), and then learns from 100
and more labels; beside it the same model from fresh weights. Then single ingredients are taken away. Every arm has the same updates for
the same number of labels. Seeds draw the labelled passages, the head and the order; each language model is trained once, which no
interval here covers.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from ulmfit_tables import PICTURE, ulmfit_picture

from plinth.config import write_atomic
from plinth.data.documents import Document, TableBuilder
from plinth.data.labelled import TextExample
from plinth.data.shards import pack_corpus, read_manifest
from plinth.data.stdlib import stdlib_documents
from plinth.inference.text_classifier import LoadedClassifier
from plinth.models.config import DecoderConfig
from plinth.models.recurrent import AwdLstmConfig
from plinth.models.text_classifier import PooledHeadConfig
from plinth.posttraining.depth_rates import RateConfig
from plinth.posttraining.text_classification import TransferClassifyConfig, train_classifier
from plinth.recipes.language_model_finetuning import LmFinetuneConfig, finetune_language_model
from plinth.recipes.pretraining import PretrainConfig, pretrain
from plinth.recipes.recurrent_pretraining import AwdLstmPretrainConfig, pretrain_awd_lstm
from plinth.run import Run
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from record import write_record

CLASSES, TESTED, VOCABULARY, PASSAGE = 8, 800, 2048, 240
SHAPES = {
    "decoder": DecoderConfig(vocab_size=VOCABULARY, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
                             intermediate_size=384, max_seq_len=512),
    "awd-lstm": AwdLstmConfig(vocab_size=VOCABULARY, embedding_size=128, hidden_size=256, num_layers=2).without_dropout(0.5),
}  # fmt: skip
SEQ_LEN = {"decoder": 128, "awd-lstm": 70}
EPOCHS = {100: 30, 200: 20, 500: 14, 1000: 10, 2000: 8}  # passes over so many labels, the same for every arm
LM_EPOCHS, GENERAL_EPOCHS, ROWS, LM_RATE = 3.0, 2.0, 16, 0.004
PLAIN = RateConfig(depth_factor=1.0, slanted=False)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way from text to labels."""

    language_model: str
    """what it starts from, a key of LANGUAGE_MODELS, or fresh"""
    rates: RateConfig = RateConfig()
    unfreeze: str = "gradual"
    pooling: str = "concat"
    lr: float = 0.01
    """of the head"""


ONE_RATE = 0.003  # where all layers learn alike: the best of 0.001, 0.003 and 0.01 from scratch with 100 labels, on one draw
FULL = Arm("target")
CURVE = {
    "from scratch": Arm("fresh", RateConfig(depth_factor=1.0), "all", lr=ONE_RATE),
    "pretrained": Arm("general", RateConfig(depth_factor=1.0), "all", lr=ONE_RATE),
    "the whole recipe": FULL,
}
ABLATIONS = {
    "no pretraining on other text": Arm("target, from scratch"),
    "no finetuning of the language model": Arm("general"),
    "language model finetuned at one constant rate": Arm("target, plain"),
    "language model finetuned by depth, constant rate": Arm("target, by depth"),
    "labels: all layers at one constant rate": Arm("target", PLAIN, "all", lr=ONE_RATE),
    "labels: the head alone": Arm("target", unfreeze="head"),
    "labels: no discriminative rates": Arm("target", RateConfig(depth_factor=1.0), lr=ONE_RATE),
    "labels: no slanted triangle": Arm("target", RateConfig(slanted=False)),
    "labels: no gradual unfreezing": Arm("target", unfreeze="all"),
    "labels: the last state alone": Arm("target", pooling="last"),
}
LANGUAGE_MODELS: dict[str, RateConfig | None] = {  # how it is finetuned on the eight packages' text; None where it is trained from scratch
    "general": None,
    "target": RateConfig(),
    "target, plain": PLAIN,
    "target, by depth": RateConfig(slanted=False),
    "target, from scratch": None,
}


def settings(lr: float, seed: int, *, steps: int | None = None, decay: float = 0.9) -> TrainConfig:
    """Return how everything here is trained: AdamW, one thread."""
    return TrainConfig(
        steps=steps, warmup_steps=10 if decay else 0, decay_fraction=decay, keep_pre_decay=False, num_threads=1, seed=seed,
        checkpoint_every_s=600.0, optimizer=OptimizerConfig(name="adamw", lr=lr, beta1=0.7, beta2=0.99, eps=1e-8, weight_decay=0.01),
    )  # fmt: skip


def passages_of(text: str) -> Iterator[str]:
    """Cut a file between lines into passages of about PASSAGE characters."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip():
            lines.append(line)
        if sum(map(len, lines)) >= PASSAGE:
            yield "\n".join(lines)
            lines = []


def packages(sources: list[str], sizes: list[int]) -> list[str]:
    """Return the packages with the most text, tables of characters left out."""
    total: Counter[str] = Counter()
    for source, size in zip(sources, sizes):
        parts = source.removeprefix("stdlib:Lib/").split("/")
        if len(parts) > 1 and parts[0] not in ("encodings", "distutils", "ensurepip"):
            total[parts[0]] += size
    return sorted(name for name, _ in total.most_common(CLASSES))


def prepare(folder: Path) -> None:
    """Write the passages to learn and to test, the tokenizer, and the shards of other text and of the passages to learn."""
    table = stdlib_documents()
    table = table.filter(pa.array([kind == "code" for kind in table["kind"].to_pylist()]))
    texts, sources = table["text"].to_pylist(), table["source"].to_pylist()
    names = packages(sources, [len(text) for text in texts])
    named = re.compile(r"\b(" + "|".join(names) + r")", re.IGNORECASE)
    found, general = defaultdict(list), []
    for text, source in zip(texts, sources):
        package = source.removeprefix("stdlib:Lib/").split("/")[0]
        if package in names:
            found[package] += [passage for passage in passages_of(text) if not named.search(passage) and len(passage) < 2 * PASSAGE]
        elif package != "encodings":
            general.append(text)
    seen = Counter(passage for each in found.values() for passage in set(each))
    rng, learn, test = random.Random(0), [], []
    unique = {name: sorted({passage for passage in each if seen[passage] == 1}) for name, each in found.items()}
    for name, each in unique.items():
        rng.shuffle(each)
        test += [{"text": text, "label": name} for text in each[: TESTED // CLASSES]]
        learn.append([{"text": text, "label": name} for text in each[TESTED // CLASSES :]])
    size = min(map(len, learn))
    pool = [example for group in zip(*(each[:size] for each in learn)) for example in group]  # the labels in turn
    train_tokenizer(general, VOCABULARY).save(folder / "tokenizer")
    rest = [example["text"] for each in learn for example in each]
    rng.shuffle(rest)
    for name, documents in (("general", general), ("target", rest)):
        rng.shuffle(documents)
        pack(folder, name, documents)
    (folder / "test.json").write_text(json.dumps(test))
    (folder / "pool.json").write_text(json.dumps(pool))


def pack(folder: Path, name: str, documents: list[str]) -> None:
    """Write shards, one document of twenty held out."""
    corpus = folder / f"{name}-corpus"
    corpus.mkdir()
    for split, chosen in (("heldout", documents[::20]), ("train", [text for i, text in enumerate(documents) if i % 20])):
        builder = TableBuilder()
        for i, text in enumerate(chosen):
            builder.add(Document(text, f"{name}:{split}:{i}", "text", None, None, None))
        pyarrow.parquet.write_table(builder.finish(), corpus / f"{split}.parquet")
    pack_corpus(corpus, Tokenizer.load(folder / "tokenizer"), folder / name)


def model_folder(folder: Path, trunk: str, name: str) -> Path:
    return folder / trunk / name.replace(", ", "-").replace(" ", "_")


def language_model(folder: Path, trunk: str, name: str) -> Path:
    """Train a language model unless it is there, and return its run; other processes wait."""
    out, rates = model_folder(folder, trunk, name), LANGUAGE_MODELS[name]
    with (folder / f"{trunk}-{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (out / "DONE").exists():
            return out
        resume = out.exists()
        if rates is None:
            shards = folder / ("general" if name == "general" else "target")
            seq_len = SEQ_LEN[trunk]
            steps = round((GENERAL_EPOCHS if name == "general" else LM_EPOCHS) * read_manifest(shards)["tokens_train"] / (ROWS * seq_len))
            if trunk == "decoder":
                train = TrainConfig(steps, num_threads=1, keep_pre_decay=False, compile=False)
                shape = PretrainConfig(SHAPES[trunk], train, seq_len, ROWS, ROWS)
                pretrain(out, [shards], folder / "tokenizer", shape, resume=resume)
            else:
                train = TrainConfig(steps, num_threads=1, keep_pre_decay=False, optimizer=OptimizerConfig(name="adamw", lr=0.01))
                config = AwdLstmPretrainConfig(SHAPES[trunk], train, sequences_per_step=ROWS, micro_batch_size=ROWS)
                pretrain_awd_lstm(out, [shards], folder / "tokenizer", config, resume=resume)
        else:
            train = settings(LM_RATE, 0, decay=0.9 if rates.slanted else 0.0)
            tuning = LmFinetuneConfig(rates, train, LM_EPOCHS, SEQ_LEN[trunk], ROWS, ROWS)
            finetune_language_model(out, language_model(folder, trunk, "general"), [folder / "target"], tuning, resume=resume)
    return out


def learn(folder: Path, trunk: str, arm: Arm, labels: int, seed: int, scratch: Path) -> dict:
    """Train a classifier and return what it reached on the passages to test."""
    pool = json.loads((folder / "pool.json").read_text())
    block = random.Random(seed)
    groups = [pool[i : i + CLASSES] for i in range(0, len(pool) - CLASSES + 1, CLASSES)]
    chosen = [example for group in block.sample(groups, -(-labels // CLASSES)) for example in group][:labels]
    (scratch / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in chosen))
    base = language_model(folder, trunk, "general" if arm.language_model == "fresh" else arm.language_model)
    config = TransferClassifyConfig(
        PooledHeadConfig(arm.pooling), arm.rates, arm.unfreeze, train=settings(arm.lr, seed, decay=0.9 if arm.rates.slanted else 0.0),
        epochs=EPOCHS[labels], micro_batch_size=32, fresh=arm.language_model == "fresh",
    )  # fmt: skip
    began = time.process_time()
    run = train_classifier(scratch / "run", base, scratch / "train.jsonl", config)
    test = json.loads((folder / "test.json").read_text())
    told = LoadedClassifier.load(run.path).classify([TextExample(example["text"]) for example in test])
    right = [int(label.label == example["label"]) for label, example in zip(told, test)]
    return {
        "accuracy": sum(right) / len(right),
        "right": f"{int(''.join(map(str, right)), 2):x}",
        "steps": (run.summary or {})["steps"],
        "cpu_s": round(time.process_time() - began, 1),
    }


def name_of(arm: str, labels: int, seed: int) -> str:
    return f"{arm}, {labels} labels, seed {seed}"


def runs(counts: list[int], ablated: list[int], seeds: int) -> list[tuple[str, Arm, int, int]]:
    """Return (arm, its settings, labels, seed) of everything, the curve first."""
    curve = [(name, arm, labels, seed) for labels in counts for seed in range(seeds) for name, arm in CURVE.items()]
    return curve + [(name, arm, labels, seed) for labels in ablated for seed in range(seeds) for name, arm in ABLATIONS.items()]


def run_missing(folder: Path, trunk: str, plan: list[tuple[str, Arm, int, int]], seconds: float | None) -> None:
    """Do the runs that no process has done or does, until `seconds` are over."""
    began = time.monotonic()
    (folder / trunk / "rows").mkdir(parents=True, exist_ok=True)
    for name, arm, labels, seed in plan:
        out = folder / trunk / "rows" / f"{name_of(name, labels, seed)}.json"
        if seconds is not None and time.monotonic() - began > seconds:
            return
        with out.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if out.exists():
                continue
            with tempfile.TemporaryDirectory() as scratch:
                row = {"name": name, "labels": labels, "seed": seed} | learn(folder, trunk, arm, labels, seed, Path(scratch))
            write_atomic(out, json.dumps(row) + "\n")
            print(f"{name_of(name, labels, seed)}: {row['accuracy']:.3f} in {row['cpu_s']} s", flush=True)


def report(folder: Path, trunk: str, plan: list[tuple[str, Arm, int, int]]) -> Path:
    """Write the record of the runs that are there."""
    files = [folder / trunk / "rows" / f"{name_of(name, labels, seed)}.json" for name, _, labels, seed in plan]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    models = {}
    for name in LANGUAGE_MODELS:
        run = Run(model_folder(folder, trunk, name))
        if run.is_done:
            kept = ("steps", "tokens", "loss_nats", "heldout_loss_nats_before", "heldout_loss_nats")
            models[name] = {key: value for key, value in (run.summary or {}).items() if key in kept}
    test = json.loads((folder / "test.json").read_text())
    path = write_record(
        "ulmfit", __doc__.splitlines()[0], rows, missing=[file.stem for file in files if not file.exists()], models=models,
        classes=sorted({example["label"] for example in test}), tested=len(test), curve=list(CURVE), ablations=list(ABLATIONS),
        tokens={name: read_manifest(folder / name)["tokens_train"] for name in ("general", "target")},
        trunk=trunk, model=dataclasses.asdict(SHAPES[trunk]),
    )  # fmt: skip
    if rows:
        (path.parents[2] / PICTURE).write_text(ulmfit_picture(json.loads(path.read_text())))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts, models and results")
    parser.add_argument("--trunk", choices=SHAPES, default="decoder", help="kind of language model")
    parser.add_argument("--seconds", type=float, help="begin no further run after so many seconds (default: do all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 200, 500, 1000], choices=EPOCHS)
    parser.add_argument(
        "--ablated", type=int, nargs="*", default=[100, 500], choices=EPOCHS, help="labels at which ingredients are left out"
    )
    options = parser.parse_args()
    options.data.mkdir(parents=True, exist_ok=True)
    with (options.data / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (options.data / "pool.json").exists():
            prepare(options.data)
    plan = runs(options.labels, options.ablated, options.seeds)
    run_missing(options.data, options.trunk, plan, options.seconds)
    print(report(options.data, options.trunk, plan))


if __name__ == "__main__":
    main()
