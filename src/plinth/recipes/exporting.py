"""A trained model as a folder for other programs: Hugging Face's format for vLLM, GGUF for llama.cpp; compared with them at once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from plinth import __version__
from plinth.config import UserError, save_json
from plinth.models.gguf import WeightFormat, check_gguf, gguf_library, write_gguf
from plinth.models.hub import SIDECAR, WEIGHTS, load_decoder, save_model
from plinth.models.transformer import Transformer
from plinth.run import file_sha256, find_model, publish_dir
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.gguf import gguf_vocabulary

Format = Literal["hf", "gguf"]
HF_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
READERS = {"hf": "transformers", "gguf": "llama_cpp"}
ORACLES = Path(__file__).with_name("export_oracles.py")
CHECK_TOKENS, CHECK_ROWS = 128, 2

# Texts on which programs that cut or merge otherwise disagree: clitics, digits, indentation, line ends, scripts, marks, half-known spaces.
CHECK_TEXTS = (
    "The cat doesn't know that I'LL be there at 12:45 on 2026-11-21; we'Ve 3 1415926535 reasons.",
    "def f(x):\n    if x >= 10_000:\n\t\treturn {'a': [1, 2, 3]}  # note\r\n\r\n   \n    return None\n\n\n",
    "naïve café Ångström ſ ǅ ʰ Ⅷ ½ ² ١٢٣ हिन्दी में ภาษาไทย עִבְרִית العَرَبِيَّة 東京へ行く 한국어 😀👩‍👩‍👧 e\u0301\u0308 \ufeff",
    "  two  three   \u00a0\u2003\u3000x\u0085y\u2028z\t\t\x0b\x0c tail   ",
    "x'Dx ''s '’t !!!\n???\r\n+= -> <<>> «q» _under_score__ $5.00 100% a/b\\c",
)


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how far its reader's numbers lie from ours."""

    path: Path
    """folder"""
    file: Path
    """the weights' file"""
    size_bytes: int
    """size of that file"""
    notes: tuple[str, ...]
    """what the format does not hold"""
    check: dict[str, Any]
    """{"program", ...}: differences of logits and tokens, or "skipped" with the reason"""


def export_model(
    run: Path, out: Path, *, format: Format, weights: str | None = None, check: bool = True, python: Path | None = None
) -> Exported:
    """Write the model of a run, a build or a model folder to `out`, by one rename, and compare it with its reader where that is installed.

    `weights`: f32, f16, bf16, q8_0 or q4_0; None = f32 for hf, f16 for gguf. The reader (transformers, llama-cpp-python) runs in a
    process of its own, of the interpreter `python`, None = this one.
    Raises UserError when `out` holds anything, for what the format cannot hold, and when the reader's tokens differ from ours.
    """
    out, weights = Path(out), weights or {"hf": "f32", "gguf": "f16"}[format]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already. Name a new folder with --out.")
    source = find_model(run)
    model, tokenizer = load_decoder(source), Tokenizer.load(source)
    write = {"hf": _write_hf, "gguf": _write_gguf}[format]
    report: dict[str, Any] = {"skipped": "not asked for"}
    with publish_dir(out) as folder:
        name, notes = write(model, tokenizer, source, folder, weights)
        if check:
            report = _compare(model, tokenizer, READERS[format], folder / name if format == "gguf" else folder, python)
    return Exported(out, out / name, (out / name).stat().st_size, notes, {"program": READERS[format], **report})


def _write_hf(model: Transformer, tokenizer: Tokenizer, source: Path, folder: Path, weights: str) -> tuple[str, tuple[str, ...]]:
    if weights not in HF_DTYPES:
        raise UserError(
            f"quantise={weights!r} is no dtype of --format hf. Use one of {', '.join(HF_DTYPES)}: vLLM quantises them itself when it loads "
            "(--quantization fp8), or --format gguf."
        )
    if model.config.extras:
        raise UserError(f"{', '.join(model.config.extras)}: no other program knows these options. Only Plinth reads this model.")
    save_model(model, tokenizer, folder, HF_DTYPES[weights])
    return WEIGHTS, ()


def _write_gguf(model: Transformer, tokenizer: Tokenizer, source: Path, folder: Path, weights: WeightFormat) -> tuple[str, tuple[str, ...]]:
    gguf_library()
    check_gguf(model.config, weights)
    vocabulary, name = gguf_vocabulary(tokenizer, model.config.vocab_size), _name(source)
    file = folder / f"{name}-{weights.upper()}.gguf"
    write_gguf(model, vocabulary, file, weights=weights, name=name)
    save_json(folder / SIDECAR, {"plinth": __version__, "weights": weights, "sha256": {file.name: file_sha256(file)}})
    return file.name, vocabulary.notes


def _name(source: Path) -> str:
    source = source.resolve()
    return source.parent.name if source.name == "model" else source.name


def _compare(model: Transformer, tokenizer: Tokenizer, program: str, path: Path, python: Path | None) -> dict[str, Any]:
    """Ask the reader for logits and tokens; return the differences, or why there are none.

    Raises UserError when it cuts texts otherwise.
    """
    rows = check_rows(tokenizer, model.config.max_seq_len)
    with tempfile.TemporaryDirectory(prefix="plinth-export-") as scratch:
        logits = str(Path(scratch) / "logits.npy")
        answer = ask(program, {"path": str(path), "rows": rows, "texts": CHECK_TEXTS, "logits": logits}, python)
        if "missing" in answer:
            return {"skipped": f"{program} is not installed ({answer['missing']})"}
        theirs = torch.from_numpy(np.load(logits))
    for text, ids in zip(CHECK_TEXTS, answer["ids"]):
        if ids != tokenizer.encode(text):
            raise UserError(f"{program} cuts {text!r} into other tokens than ours. Nothing was written; --no-check writes it all the same.")
    return {"version": answer["version"], **logit_differences(model, rows, theirs)}


def ask(program: str, question: dict[str, Any], python: Path | None) -> dict[str, Any]:
    """Run the script of oracles in a process of the interpreter `python`, None = this one."""
    command = [str(python or sys.executable), str(ORACLES)]
    done = subprocess.run(command, input=json.dumps({"program": program, **question}), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{program} fails on the exported model: {reason}. Pass --no-check to write it all the same.")
    return json.loads(done.stdout.splitlines()[-1])


def check_rows(tokenizer: Tokenizer, max_seq_len: int) -> list[list[int]]:
    """Return token rows of equal length to compare logits on."""
    ids = [i for text in CHECK_TEXTS for i in tokenizer.encode(text)]
    length = min(CHECK_TOKENS, max_seq_len, len(ids) // CHECK_ROWS)
    return [ids[row * length : (row + 1) * length] for row in range(CHECK_ROWS)]


@torch.no_grad()
def logit_differences(model: Transformer, rows: list[list[int]], theirs: torch.Tensor) -> dict[str, float]:
    """Compare logits (rows, T, V) with the model's in fp32.

    Returns the largest difference, KL(ours || theirs) in nats a token, its largest, and the share of equal best tokens.
    """
    ours, theirs = model.logits(model(torch.tensor(rows))).double(), theirs.double()
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = (log_ours.exp() * (log_ours - log_theirs)).sum(-1)
    return {
        "max_logit_difference": float((ours - theirs).abs().max()),
        "kl_nats": float(kl.mean()),
        "kl_nats_max": float(kl.max()),
        "same_best_token": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "tokens": int(kl.numel()),
    }
