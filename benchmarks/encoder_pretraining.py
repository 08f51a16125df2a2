"""What is BERT's and ELECTRA's pretraining worth when labels are few, at equal operations?

    python benchmarks/encoder_pretraining.py --steps 250 --seeds 2

Encoders of 3 layers x 128 learn the docstrings of Python's standard library: BERT (hidden tokens), ELECTRA (replaced tokens, generator of
half the width), and ELECTRA counting the hidden positions only. Each gets as many operations as BERT has in `--steps` updates of 16 rows
of 128 tokens, by the formula of `train_flops_per_token`. Then each is finetuned to tell the module of a docstring (its signature left out)
among eight, from few labels, beside the same encoder with fresh weights. The docstrings to tell are in no corpus of the pretraining.
The speed is tokens of rows a second of processor time, all threads added up, so that other load on the machine matters less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa

from plinth.data.curate import CurateConfig, curate
from plinth.data.labelled import TextExample
from plinth.data.shards import pack_corpus
from plinth.data.stdlib import stdlib_documents
from plinth.evaluation.labelled import score_labels
from plinth.inference.encoding import TextEncoder
from plinth.inference.labelling import classify_texts
from plinth.models.encoder_config import EncoderConfig
from plinth.posttraining.finetuning import FinetuneConfig, finetune
from plinth.recipes.encoder_pretraining import BertConfig, ElectraConfig, encoder_train_config, flops_per_counted_token, pretrain_encoder
from plinth.recipes.encoder_rows import RowConfig
from plinth.run import usable_cores
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from record import write_record

SHAPE = EncoderConfig(hidden_size=128, num_layers=3, num_heads=4, intermediate_size=512, max_seq_len=128)
ROWS = RowConfig("stream", 128, 16, 8)
CLASSES, TESTED, VOCABULARY = 8, 400, 2048


def labelled_documents(table: pa.Table) -> list[tuple[str, str, str]]:
    """Return (document, docstring without signature, module) of the modules with the most docstrings of twelve words and more."""
    found = []
    for text, source in zip(table["text"].to_pylist(), table["source"].to_pylist()):
        body = text.partition("\n\n")[2]
        if len(body.split()) >= 12:
            found.append((text, body, source.removeprefix("stdlib:Lib/").split("/")[0].split(".")[0]))
    modules = [name for name, _ in Counter(module for _, _, module in found).most_common(CLASSES)]
    return [row for row in found if row[2] in modules]


def arms(steps: int, seed: int) -> dict[str, BertConfig]:
    """Return the pretrainings, each with the operations of BERT's `steps` updates."""
    train = dataclasses.replace(encoder_train_config(), steps=steps, seed=seed, num_threads=usable_cores())
    bert = BertConfig(SHAPE, train, ROWS)
    electra = ElectraConfig(SHAPE, train, ROWS, generator_share=0.5)
    ratio = flops_per_counted_token(electra) / (flops_per_counted_token(bert) * bert.masking.share)
    electra = dataclasses.replace(electra, train=dataclasses.replace(train, steps=round(steps / ratio)))
    return {"bert": bert, "electra": electra, "electra, hidden positions only": dataclasses.replace(electra, rtd_tokens="masked")}


def accuracy(folder: Path, run: Path, train: list, test: list, seed: int, fresh: bool) -> float:
    """Return the share of test docstrings whose module is told after finetuning on `train`."""
    folder.mkdir()
    lines = (json.dumps({"text": body, "label": module}) + "\n" for _, body, module in train)
    (folder / "train.jsonl").write_text("".join(lines))
    options = TrainConfig(
        steps=120, warmup_steps=10, decay_fraction=0.9, keep_pre_decay=False, seed=seed,
        optimizer=OptimizerConfig(name="adamw", lr=0.001, weight_decay=0.01),
    )  # fmt: skip
    config = FinetuneConfig("classify", options, examples_per_step=16, micro_batch_size=8, truncate=True, fresh=fresh, max_seq_len=64)
    finetune(folder / "run", run, folder / "train.jsonl", config)
    told = classify_texts(TextEncoder.load(folder / "run"), [TextExample(body) for _, body, _ in test], truncate=True)
    return score_labels([label.label for label in told], [module for _, _, module in test])["accuracy"].value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 200])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        table = stdlib_documents()
        table = table.filter(pa.array([kind == "docs" for kind in table["kind"].to_pylist()]))
        examples = labelled_documents(table)
        random.Random(0).shuffle(examples)
        test, left = examples[:TESTED], examples[TESTED:]
        kept = {text for text, _, _ in test}
        table = table.filter(pa.array([text not in kept for text in table["text"].to_pylist()]))
        curate(table, root / "corpus", CurateConfig(heldout_fraction=0.05))
        train_tokenizer(table["text"].to_pylist(), VOCABULARY).save(root / "tokenizer")
        manifest = pack_corpus(root / "corpus", Tokenizer.load(root / "tokenizer"), root / "shards")
        for seed in range(options.seeds):
            for name, config in arms(options.steps, seed).items():
                out, began = root / f"{name.split()[-1]}{seed}", time.process_time()
                summary = pretrain_encoder(out, [root / "shards"], root / "tokenizer", config).summary or {}
                tokens = config.train.steps * ROWS.sequences_per_step * ROWS.seq_len
                row = {"name": name, "seed": seed, "steps": config.train.steps, "params": summary["num_params"], "tokens": tokens}
                row |= {"tokens_per_cpu_s": tokens / (time.process_time() - began)}
                row |= {key: summary[key] for key in ("loss_nats", "heldout_nats", "heldout_unigram_nats", "heldout_accuracy")}
                for count in options.labels:
                    row[f"accuracy {count}"] = accuracy(root / f"f{len(rows)}_{count}", out, left[:count], test, seed, False)
                    if name == "bert":
                        row[f"fresh accuracy {count}"] = accuracy(root / f"n{len(rows)}_{count}", out, left[:count], test, seed, True)
                rows.append(row)
                print(json.dumps(row), flush=True)
    majority = Counter(module for _, _, module in test).most_common(1)[0][1] / len(test)
    print(write_record("encoder_pretraining", __doc__.splitlines()[0], rows, labels=options.labels, tested=len(test), majority=majority,
                       classes=CLASSES, corpus_tokens=manifest["tokens_train"], cores=usable_cores()))  # fmt: skip


if __name__ == "__main__":
    main()
