"""What do the encoder-decoders learn here? Each is trained on numerals in English and German and scored on numbers that it has not seen.

Every row has the parameters, the target tokens a second while training, the held-out loss beside that of the tokens' frequencies alone,
the share of numbers that come out letter for letter right, and BLEU and chrF, greedily and with four beams. Frequencies alone are the
trivial baseline. With --pairs and --held-out the same is done on files of yours, with the default shapes, and with --score an
existing run is scored on a source and its reference.

    python benchmarks/translation.py
    python benchmarks/translation.py --score runs/translator test.en test.de
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from plinth.cli.pretrain_t5 import SHAPE as T5_SHAPE
from plinth.data.parallel import read_pairs
from plinth.evaluation.translation import translation_scores
from plinth.inference.beam import BeamParams
from plinth.inference.translate import Translator
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.recipes.translation import TranslationConfig, pretrain_translation
from plinth.recipes.translation_data import PairsConfig
from plinth.run import Run
from plinth.tasks.numerals import numeral_pairs
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from record import RECORDS, write_record

QUESTION = "What do the encoder-decoders learn from parallel text here, against the frequencies of tokens alone?"
FAMILIES = ("transformer", "t5")
HELD_OUT = 200
SMALL = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "head_dim": 32, "intermediate_size": 256, "max_seq_len": 64}


def configuration(family: str, steps: int | None) -> TranslationConfig:
    """Return the small shape for numerals, or with no number of steps the verb's defaults."""
    shape = T5_SHAPE if family == "t5" else EncoderDecoderConfig()
    smoothing = 0.0 if family == "t5" else 0.1
    if steps is None:
        return TranslationConfig(model=shape, label_smoothing=smoothing)
    train = TrainConfig(steps=steps, warmup_steps=20, compile=False, optimizer=OptimizerConfig(name="muon", lr=0.004, muon_lr=0.02))
    data = PairsConfig(pairs_per_step=64, micro_batch_size=32, tokenizer_size=400, max_seq_len=64)
    return TranslationConfig(model=replace(shape, **SMALL, dropout=0.0), train=train, data=data, label_smoothing=0.0)


def write_numerals(folder: Path, count: int) -> tuple[list[Path], list[Path]]:
    """Write the numerals to train on and those held out; returns the files of each."""
    pairs, files = numeral_pairs(count + HELD_OUT), []
    for name, part in (("train", pairs[:count]), ("heldout", pairs[count:])):
        for i, side in enumerate(("en", "de")):
            files.append(folder / f"{name}.{side}")
            files[-1].write_text("".join(pair[i] + "\n" for pair in part), encoding="utf-8")
    return files[:2], files[2:]


def score(run: Path, held_out: list[Path]) -> dict[str, Any]:
    """Return what a run's translations of held-out text are worth."""
    translator, pairs = Translator.load(run), read_pairs(held_out)[0]
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    found: dict[str, Any] = {"sentences": len(pairs)}
    for name, params in (("greedy", None), ("beams", BeamParams(num_beams=4, max_tokens=256))):
        texts = [one.text for one in translator.translate(sources, params)]
        found[f"{name}_exact"] = sum(text == reference for text, reference in zip(texts, references)) / len(texts)
        for each in translation_scores(texts, references):
            found[f"{name}_{each.name}"], found[f"{name}_{each.name}_ci95"] = each.value, each.ci95
            found[f"{each.name}_signature"] = each.signature
    return found


def row(family: str, data: str, run: Run, held_out: list[Path]) -> dict[str, Any]:
    """Return one row of the record."""
    summary = run.summary or {}
    names = ("num_params", "pairs", "epochs", "steps", "time_s", "heldout_nats", "heldout_unigram_nats")
    kept = {name: summary.get(name) for name in names}
    return {
        "family": family,
        "data": data,
        **kept,
        "target_tokens_per_s": summary["tokens"] / summary["time_s"],
        **score(run.path, held_out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--count", type=int, default=4000, help="numerals to train on")
    parser.add_argument("--steps", type=int, default=600, help="updates on numerals")
    parser.add_argument("--pairs", type=Path, nargs=2, help="your own parallel text: source and target")
    parser.add_argument("--held-out", type=Path, nargs=2, help="with --pairs: what to score on")
    parser.add_argument("--score", nargs=3, metavar=("RUN", "SOURCE", "REFERENCE"), type=Path, help="score a run and add it to the record")
    parser.add_argument("--name", help="with --pairs or --score: what to call the data")
    arguments = parser.parse_args()
    if arguments.score:
        run, held_out = Run.open(arguments.score[0]), arguments.score[1:]
        family = run.provenance["stage"].removeprefix("pretrain-")
        rows = json.loads((RECORDS / "translation.json").read_text())["rows"] if (RECORDS / "translation.json").exists() else []
        write_record("translation", QUESTION, [*rows, row(family, arguments.name or arguments.score[1].name, run, held_out)])
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files, held_out = write_numerals(Path(folder), arguments.count)
        if arguments.pairs:
            files, held_out = arguments.pairs, arguments.held_out
        for family in arguments.families:
            config = configuration(family, None if arguments.pairs else arguments.steps)
            run = pretrain_translation(Path(folder) / family, files, config, held_out=held_out)
            rows.append(row(family, "numerals" if not arguments.pairs else arguments.name or arguments.pairs[0].name, run, held_out))
            print(json.dumps(rows[-1]), file=sys.stderr)
    write_record("translation", QUESTION, rows)


if __name__ == "__main__":
    main()
