"""A trained model as a folder for other programs: Hugging Face's format for vLLM, GGUF for llama.cpp; compared with them at once."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from plinth import __version__
from plinth.config import UserError, save_json
from plinth.models.gguf import WeightFormat, check_gguf, gguf_library, write_gguf
from plinth.models.hub import SIDECAR, WEIGHTS, format_of, load_decoder, load_model, save_model
from plinth.models.transformer import Transformer
from plinth.recipes.parity import compare
from plinth.run import file_sha256, find_model, publish_dir
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.gguf import gguf_vocabulary

Format = Literal["hf", "gguf"]
HF_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # how images become inputs
READERS = {"hf": "transformers", "gguf": "llama_cpp"}


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

    hf takes every family, gguf decoders. `weights`: f32, f16, bf16, q8_0 or q4_0; None = f32 for hf, f16 for gguf. The reader
    (transformers, llama-cpp-python) runs in a process of its own, of the interpreter `python`, None = this one.
    Raises UserError when `out` holds anything, for what the format cannot hold, and when the reader's tokens differ from ours.
    """
    out, weights = Path(out), weights or {"hf": "f32", "gguf": "f16"}[format]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already. Name a new folder with --out.")
    source = find_model(run)
    model: Any = load_model(source) if format == "hf" else load_decoder(source)
    tokenizer = Tokenizer.load(source) if format == "gguf" or (source / "tokenizer.json").is_file() else None
    write: Any = {"hf": _write_hf, "gguf": _write_gguf}[format]
    report: dict[str, Any] = {"skipped": "not asked for"}
    with publish_dir(out) as folder:
        name, notes = write(model, tokenizer, source, folder, weights)
        if check:
            report = compare(model, tokenizer, folder / name if format == "gguf" else folder, READERS[format], python)
            if report.get("other_texts") and (tokenizer is None or tokenizer.is_ours or format == "gguf"):
                raise UserError(
                    f"{READERS[format]} cuts {report['other_texts'][0]!r} into other tokens than ours. Nothing was written; "
                    "--no-check writes it all the same."
                )
    return Exported(out, out / name, (out / name).stat().st_size, notes, {"program": READERS[format], **report})


def _write_hf(model: nn.Module, tokenizer: Tokenizer | None, source: Path, folder: Path, weights: str) -> tuple[str, tuple[str, ...]]:
    if weights not in HF_DTYPES:
        raise UserError(
            f"quantise={weights!r} is no dtype of --format hf. Use one of {', '.join(HF_DTYPES)}: vLLM quantises them itself when it loads "
            "(--quantization fp8), or --format gguf."
        )
    kind = format_of(model.config).write_config(model.config)["model_type"]
    if kind.startswith("plinth"):
        options = ", ".join(getattr(model.config, "extras", ())) or f"model_type {kind}"
        raise UserError(f"{options}: no other program knows this. Only Plinth reads this model.")
    save_model(model, tokenizer, folder, HF_DTYPES[weights])
    for name in PROCESSOR_FILES:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
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
