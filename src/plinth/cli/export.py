"""`plinth export`: a model for vLLM (Hugging Face's format) or llama.cpp (GGUF)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.recipes.exporting import Exported, export_model
from plinth.recipes.parity import describe_parity


@dataclass(frozen=True)
class ExportOptions:
    """Write a model as a folder that vLLM and transformers (hf) or llama.cpp (gguf) serve, and compare logits and tokens with theirs."""

    run: Annotated[Path, tyro.conf.Positional]
    """a build, a run, or a model folder in Hugging Face's format"""
    out: Path
    """folder to write; must not hold anything yet"""
    format: Literal["hf", "gguf"] = "hf"
    """hf: safetensors, config.json, tokenizer; gguf: one file (extra `export`)"""
    quantise: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None
    """format of the matrices; None = f32 for hf, f16 for gguf; q8_0 and q4_0 are gguf's 8.5 and 4.5 bits a weight"""
    check: bool = True
    """compare with transformers (hf) or llama-cpp-python (gguf), where it is installed"""
    check_python: Path | None = None
    """interpreter that has the program to compare with; None = this one"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when the folder is taken or the format cannot hold the model."""
    options = read_options(ExportOptions, args=argv, prog="plinth export")
    done = export_model(
        options.run, options.out, format=options.format, weights=options.quantise, check=options.check, python=options.check_python
    )

    def render(console: Console) -> None:
        for line in describe(done):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    emit(dataclasses.asdict(done), options.json, render)
    return 0


def describe(done: Exported) -> list[str]:
    """Return what was written, how it compares, and the commands that serve it."""
    lines = [f"{done.file}: {done.size_bytes / 1e6:,.1f} MB", *done.notes]
    lines.append(describe_parity(done.check))
    is_gguf = done.file.suffix == ".gguf"
    lines.append(f"Serve it: llama-server -m {done.file} --jinja" if is_gguf else f"Serve it: vllm serve {done.path} --dtype bfloat16")
    return lines
