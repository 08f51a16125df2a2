"""How many labels is a language model worth, and which ingredient of ULMFiT is worth what?

    python benchmarks/ulmfit.py --data DIR --declarations udhr2.zip   # goes on where it was stopped; writes benchmarks/records/ulmfit.json
    python benchmarks/ulmfit.py --data DIR --seconds 300              # begins no further run after so long; several processes may share DIR
    python benchmarks/ulmfit.py --data DIR --tune                     # what the settings below were chosen by
    python benchmarks/ulmfit.py --data DIR --task packages            # another task: Python's standard library; ulmfit_packages.json

A line of some 80 characters of the Universal Declaration of Human Rights: which of twenty Bantu languages is it in? A small decoder
(--trunk awd-lstm: an AWD-LSTM) is pretrained on the declaration in other languages (280 versions in Latin letters), finetuned on lines of
the twenty without their labels (those to tune on and to test are not among them), and then learns from 100 and more labels; beside it the
same model from fresh weights, and naive Bayes over words. Then single ingredients are taken away. Settings were chosen on the tuning lines,
with one draw of labels that is not reported; the rate of `pretrained` and the shared rate of the ablations were not tuned. In both
directions, as the paper has it: the same once more on texts read from their end, with the settings as they are, probabilities averaged.
Seeds draw the labelled lines, the head and the order; each language model is trained once, which no interval here covers.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulmfit_tables import FULL, LONGER, PICTURE, SCRATCH, TWICE, WORDS, ulmfit_picture
from ulmfit_text import TASKS, VOCABULARY, draw, naive_bayes, prepare, told_right

from plinth.config import write_atomic
from plinth.data.labelled import TextExample
from plinth.data.shards import pack_corpus, read_manifest
from plinth.evaluation.predictions import averaged
from plinth.inference.labelling import Label
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
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from record import write_record

SHAPES = {
    "decoder": DecoderConfig(vocab_size=VOCABULARY, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
                             intermediate_size=384, max_seq_len=512),
    "awd-lstm": AwdLstmConfig(vocab_size=VOCABULARY, embedding_size=128, hidden_size=256, num_layers=2).without_dropout(0.5),
}  # fmt: skip
SEQ_LEN = {"decoder": 128, "awd-lstm": 70}
EPOCHS = {100: 30, 200: 20, 500: 14, 1000: 10}  # passes over so many labels, times an arm's factor
GENERAL_EPOCHS, LM_EPOCHS, ROWS, LM_RATE = 3.0, {"languages": 30.0, "packages": 4.0}, 16, 0.004
EVEN = RateConfig(depth_factor=1.0)
PLAIN = RateConfig(depth_factor=1.0, slanted=False)
SMOOTHING = 0.1  # of naive Bayes
TUNING_SEED = 100
RECORDS = {"languages": "ulmfit", "packages": "ulmfit_packages"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way from text to labels."""

    language_model: str
    """what it starts from, a key of LANGUAGE_MODELS, or fresh; words: naive Bayes"""
    rates: RateConfig = RateConfig()
    unfreeze: str = "gradual"
    pooling: str = "mean"
    hidden: int = 0
    """width of the head's hidden layer; 0: none"""
    lr: float = 0.01
    """of the head"""
    epochs: float = 1.0
    """factor on EPOCHS"""
    both: bool = False
    """average it with the same on texts that are read from their end"""


SCRATCH_RATE, ONE_RATE = 0.001, 0.003  # where all layers learn alike: from fresh weights, and from pretrained ones
RECIPE = Arm("target")
CURVE = {
    WORDS: Arm("words"),
    SCRATCH: Arm("fresh", EVEN, "all", lr=SCRATCH_RATE, epochs=2.0),
    "pretrained": Arm("general", EVEN, "all", lr=ONE_RATE),
    FULL: RECIPE,
}
BOTH = {f"{name}{TWICE}": dataclasses.replace(CURVE[name], both=True) for name in (SCRATCH, FULL)}
AGAIN = {LONGER: dataclasses.replace(CURVE[SCRATCH], epochs=4.0)}  # better on the tuning lines, with 500 labels
TUNING = {  # labels: arms; one draw of labels, told on the tuning set
    500: {
        f"from scratch, rate {lr}, epochs x {factor}": Arm("fresh", EVEN, "all", lr=lr, epochs=factor)
        for lr, factor in ((0.001, 2), (0.003, 2), (0.001, 4))
    },
    100: {
        **{f"the whole recipe, rate {lr}": Arm("target", lr=lr) for lr in (0.003, 0.01)},
        "the whole recipe, epochs x 2": Arm("target", epochs=2.0),
        "the whole recipe, the paper's head": Arm("target", pooling="concat", hidden=50),
        **{f"pretrained, rate {lr}": Arm("general", EVEN, "all", lr=lr) for lr in (0.001, 0.003)},
        **{f"from scratch, rate {lr}, epochs x 2": Arm("fresh", EVEN, "all", lr=lr, epochs=2.0) for lr in (0.001, 0.003)},
    },
}
ABLATIONS = {
    "no pretraining on other text": Arm("target, from scratch"),
    "no finetuning of the language model": Arm("general"),
    "language model finetuned at one constant rate": Arm("target, plain"),
    "language model finetuned by depth, constant rate": Arm("target, by depth"),
    "labels: all layers at one constant rate": Arm("target", PLAIN, "all", lr=ONE_RATE),
    "labels: the head alone": Arm("target", unfreeze="head"),
    "labels: no discriminative rates": Arm("target", EVEN, lr=ONE_RATE),
    "labels: no slanted triangle": Arm("target", RateConfig(slanted=False)),
    "labels: no gradual unfreezing": Arm("target", unfreeze="all"),
    "labels: the paper's head (three poolings, a hidden layer)": Arm("target", pooling="concat", hidden=50),
}
BACKWARDS = ", backwards"  # of a language model: it reads texts from their end
LANGUAGE_MODELS: dict[str, RateConfig | None] = {  # how it is finetuned on the task's text; None where it is trained from scratch
    "general": None,
    "target": RateConfig(),
    f"general{BACKWARDS}": None,
    f"target{BACKWARDS}": RateConfig(),
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


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where the runs are kept, and what they are of."""

    folder: Path
    """texts, models and results"""
    trunk: str
    """kind of language model, a key of SHAPES"""
    task: str
    """a key of TASKS"""

    def model(self, name: str) -> Path:
        return self.folder / self.trunk / name.replace(", ", "-").replace(" ", "_")

    def row(self, name: str, labels: int, seed: int) -> Path:
        return self.folder / self.trunk / "rows" / f"{name}, {labels} labels, seed {seed}.json"

    def read(self, part: str) -> list[dict[str, str]]:
        return json.loads((self.folder / f"{part}.json").read_text())


def language_model(bench: Bench, name: str) -> Path:
    """Train a language model unless it is there, and return its run; other processes wait."""
    out, rates = bench.model(name), LANGUAGE_MODELS[name]
    with (bench.folder / f"{bench.trunk}-{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (out / "DONE").exists():
            return out
        resume, turned = out.exists(), BACKWARDS if name.endswith(BACKWARDS) else ""
        if rates is None:
            from_scratch(bench, out, "general" if name.startswith("general") else "target", resume, turned)
        else:
            train = settings(LM_RATE, 0, decay=0.9 if rates.slanted else 0.0)
            tuning = LmFinetuneConfig(rates, train, LM_EPOCHS[bench.task], SEQ_LEN[bench.trunk], ROWS, ROWS)
            base = language_model(bench, f"general{turned}")
            finetune_language_model(out, base, [shards_of(bench, "target", turned)], tuning, resume=resume)
    return out


def shards_of(bench: Bench, text: str, turned: str) -> Path:
    """Return the shards of a text, turned round or as it is; those turned round are made at first need."""
    shards = bench.folder / f"{text}{turned}"
    if not shards.exists():
        pack_corpus(bench.folder / f"{text}-corpus", Tokenizer.load(bench.folder / "tokenizer"), shards, backwards=True)
    return shards


def from_scratch(bench: Bench, out: Path, text: str, resume: bool, turned: str) -> None:
    """Train a language model from fresh weights on the general or the target text."""
    shards, tokenizer, seq_len = shards_of(bench, text, turned), bench.folder / "tokenizer", SEQ_LEN[bench.trunk]
    epochs = GENERAL_EPOCHS if text == "general" else LM_EPOCHS[bench.task]
    steps = round(epochs * read_manifest(shards)["tokens_train"] / (ROWS * seq_len))
    if bench.trunk == "decoder":
        train = TrainConfig(steps, num_threads=1, keep_pre_decay=False, compile=False)
        pretrain(out, [shards], tokenizer, PretrainConfig(SHAPES[bench.trunk], train, seq_len, ROWS, ROWS), resume=resume)
    else:
        train = TrainConfig(steps, num_threads=1, keep_pre_decay=False, optimizer=OptimizerConfig(name="adamw", lr=0.01))
        config = AwdLstmPretrainConfig(SHAPES[bench.trunk], train, sequences_per_step=ROWS, micro_batch_size=ROWS)
        pretrain_awd_lstm(out, [shards], tokenizer, config, resume=resume)


def learn(bench: Bench, arm: Arm, labels: int, seed: int, part: str) -> dict[str, Any]:
    """Learn labels, and return what is told right of a part of the passages: `test`, or `tuning`."""
    chosen, examples = draw(bench.folder, labels, seed), bench.read(part)
    began, texts = time.process_time(), [example["text"] for example in examples]
    if arm.language_model == "words":
        return told_right(naive_bayes(chosen, texts, SMOOTHING), examples)
    ways = [classified(bench, arm, labels, seed, chosen, texts, turned) for turned in (["", BACKWARDS] if arm.both else [""])]
    told = averaged([found for found, _ in ways], ["forwards", "backwards"])
    spent = {"steps": sum(steps for _, steps in ways), "cpu_s": round(time.process_time() - began, 1)}
    return told_right([label.label for label in told], examples) | spent


def classified(
    bench: Bench, arm: Arm, labels: int, seed: int, chosen: Sequence[dict[str, str]], texts: Sequence[str], turned: str
) -> tuple[list[Label], int]:
    """Learn the labels of the chosen passages in one direction; return what it says of texts, and its updates."""
    is_fresh = arm.language_model == "fresh"
    base = language_model(bench, ("general" if is_fresh else arm.language_model) + turned)
    config = TransferClassifyConfig(
        PooledHeadConfig(arm.pooling, arm.hidden, backwards=bool(turned)), arm.rates, arm.unfreeze,
        train=settings(arm.lr, seed, decay=0.9 if arm.rates.slanted else 0.0),
        epochs=arm.epochs * EPOCHS[labels], micro_batch_size=32, fresh=is_fresh,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in chosen))
        run = train_classifier(Path(scratch) / "run", base, Path(scratch) / "train.jsonl", config)
        return LoadedClassifier.load(run.path).classify([TextExample(text) for text in texts]), (run.summary or {})["steps"]


Plan = list[tuple[str, Arm, int, int, str]]


def runs(counts: list[int], ablated: list[int], seeds: int) -> Plan:
    """Return (arm, its settings, labels, seed, what it is told on) of everything that is reported."""
    arms = [(labels, CURVE | BOTH | (AGAIN if labels == 500 else {})) for labels in counts] + [(labels, ABLATIONS) for labels in ablated]
    arms.sort(key=lambda pair: pair[0])  # the cheap ones first
    return [(name, arm, labels, seed, "test") for labels, group in arms for seed in range(seeds) for name, arm in group.items()]


def tuning_runs() -> Plan:
    return [(name, arm, labels, TUNING_SEED, "tuning") for labels, arms in TUNING.items() for name, arm in arms.items()]


def run_missing(bench: Bench, plan: Plan, seconds: float | None) -> None:
    """Do the runs that no process has done or does, until `seconds` are over."""
    began = time.monotonic()
    (bench.folder / bench.trunk / "rows").mkdir(parents=True, exist_ok=True)
    for name, arm, labels, seed, part in plan:
        out = bench.row(name, labels, seed)
        if seconds is not None and time.monotonic() - began > seconds:
            return
        with out.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if out.exists():
                continue
            row = {"name": name, "labels": labels, "seed": seed} | learn(bench, arm, labels, seed, part)
            write_atomic(out, json.dumps(row) + "\n")
            print(f"{out.stem}: {row['accuracy']:.3f}", flush=True)


def report(bench: Bench, plan: Plan) -> Path:
    """Write the record of the runs that are there."""
    files = [bench.row(name, labels, seed) for name, _, labels, seed, _ in plan]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    models = {}
    for name in LANGUAGE_MODELS:
        run = Run(bench.model(name))
        if run.is_done:
            kept = ("steps", "tokens", "loss_nats", "heldout_loss_nats_before", "heldout_loss_nats")
            models[name] = {key: value for key, value in (run.summary or {}).items() if key in kept}
    tuned = [
        json.loads(file.read_text())
        for file in (bench.row(name, labels, seed) for name, _, labels, seed, _ in tuning_runs())
        if file.exists()
    ]
    test = bench.read("test")
    path = write_record(
        RECORDS[bench.task], __doc__.splitlines()[0], rows, missing=[file.stem for file in files if not file.exists()], models=models,
        tuning=[{key: value for key, value in row.items() if key != "right"} for row in tuned], tuned=len(bench.read("tuning")),
        classes=sorted({example["label"] for example in test}), tested=len(test), curve=list(CURVE | BOTH), ablations=list(ABLATIONS),
        tokens={name: read_manifest(bench.folder / name)["tokens_train"] for name in ("general", "target")},
        epochs=EPOCHS, arms={name: dataclasses.asdict(arm) for name, arm in (CURVE | BOTH | AGAIN | ABLATIONS).items() if name != WORDS},
        task=bench.task, unit=TASKS[bench.task].unit, trunk=bench.trunk, model=dataclasses.asdict(SHAPES[bench.trunk]),
    )  # fmt: skip
    if rows and bench.task == "languages":
        (path.parents[2] / PICTURE).write_text(ulmfit_picture(json.loads(path.read_text())))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts, models and results")
    parser.add_argument("--task", choices=TASKS, default="languages")
    parser.add_argument("--declarations", type=Path, help="NLTK's udhr2.zip (--task languages)")
    parser.add_argument("--trunk", choices=SHAPES, default="decoder", help="kind of language model")
    parser.add_argument("--seconds", type=float, help="begin no further run after so many seconds (default: do all)")
    parser.add_argument("--tune", action="store_true", help="try settings on the tuning set instead")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 200, 500, 1000], choices=EPOCHS)
    parser.add_argument("--ablated", type=int, nargs="*", default=[100], choices=EPOCHS, help="labels at which ingredients are left out")
    options = parser.parse_args()
    bench = Bench(options.data, options.trunk, options.task)
    options.data.mkdir(parents=True, exist_ok=True)
    with (options.data / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (options.data / "pool.json").exists():
            prepare(options.data, options.task, options.declarations)
    plan = runs(options.labels, options.ablated, options.seeds)
    run_missing(bench, tuning_runs() if options.tune else plan, options.seconds)
    print(report(bench, plan))


if __name__ == "__main__":
    main()
