"""`plinth tokenizer train`: a byte-level BPE tokenizer from a corpus, or the one of residues, which needs none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.config import UserError, save_json
from plinth.run import Progress, publish_dir, tree_sha256
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.residues import num_unknown, residue_tokenizer
from plinth.tokenizer.train import TokenizerConfig, train_tokenizer

MEASURED_BYTES = 2_000_000  # of text, on which bytes per token is measured


@dataclass(frozen=True)
class Options:
    """Train a byte-level BPE tokenizer, or make one of residues, and save it in Hugging Face's format."""

    source: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """a corpus folder that `plinth data curate` wrote, or text files and folders; with --residues what is measured, if anything"""
    out: Path
    """folder to write"""
    residues: Literal["protein", "nucleotide"] | None = None
    """a token a residue instead of merges; the vocabulary is the alphabet"""
    vocab_size: int = TokenizerConfig.vocab_size
    """number of entries: 6 special tokens, 256 bytes, the rest merges"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth tokenizer train", args=argv)
    TokenizerConfig(options.vocab_size)
    if not options.source and options.residues is None:
        raise UserError("no text named. Pass a corpus folder, or text files and folders.")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"{options.out} already exists. Pass --out with the name of a new folder.")
    started = time.monotonic()
    texts, measured, parents = read_texts(options.source) if options.source else ([], [], [])
    if options.residues is not None:
        tokenizer = residue_tokenizer(options.residues)
    else:
        with Progress(len(texts), "reading for merges", "document") as progress:
            tokenizer = train_tokenizer(_watched(texts, progress), options.vocab_size)
    sample = _head(measured, MEASURED_BYTES)
    result = {
        "path": str(options.out),
        "vocab_size": tokenizer.vocab_size,
        "vocab_size_asked": options.vocab_size if options.residues is None else tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "documents": len(texts),
        "text_bytes": _num_bytes(texts),
        "bytes_per_token": round(_num_bytes(sample) / max(1, sum(map(len, tokenizer.encode_batch(sample)))), 4),
        "measured_on": "held-out documents" if measured is not texts else "training documents",
        "parents": parents,
        **({} if options.residues is None else {"residues": options.residues, "unknown": num_unknown(tokenizer, sample)}),
        "time_s": round(time.monotonic() - started, 3),
    }
    with publish_dir(options.out) as folder:
        tokenizer.save(folder)
        save_json(folder / "manifest.json", result)
    emit(result, options.json, lambda console: show(console, result, tokenizer, sample))
    return 0


def read_texts(source: tuple[Path, ...]) -> tuple[list[str], list[str], list[dict[str, str]]]:
    """Return the texts to train on, those to measure on, and the record of where they came from."""
    if len(source) == 1 and (source[0] / "train.parquet").is_file():
        train, heldout = (_column(source[0] / f"{split}.parquet") for split in ("train", "heldout"))
        return train, heldout or train, [{"path": str(source[0]), "sha256": tree_sha256(source[0])}]
    from plinth.data.sources import read_documents

    texts = read_documents([str(path) for path in source]).table["text"].to_pylist()
    return texts, texts, [{"path": str(path)} for path in source]


def _column(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        return []
    try:
        return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a corpus table: {error}. Write it again with `plinth data curate`.") from None


def _watched(texts: list[str], progress: Progress) -> Iterator[str]:
    for text in texts:
        yield text
        progress.update()


def _head(texts: list[str], size_bytes: int) -> list[str]:
    taken = 0
    for i, text in enumerate(texts):
        taken += len(text.encode("utf-8"))
        if taken >= size_bytes:
            return texts[: i + 1]
    return texts


def _num_bytes(texts: list[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def show(console: Console, result: dict, tokenizer: Tokenizer, sample: list[str]) -> None:
    """Draw what was trained, and how the first line of the text falls into tokens."""
    console.print(f"{result['path']}: {result['vocab_size']:,} entries from {result['documents']:,} documents in {result['time_s']:.1f} s")
    if result["vocab_size"] < result["vocab_size_asked"]:
        console.print(f"The text holds no more merges; {result['vocab_size_asked']:,} were asked for.")
    if not sample:
        return
    console.print(f"{result['bytes_per_token']:.2f} bytes a token on {result['measured_on']}")
    if result.get("unknown"):
        console.print(f"{result['unknown']:,} characters of it are no {result['residues']} codes")
    line = next((line.strip() for text in sample for line in text.splitlines() if line.strip()), "")[:72]
    pieces = [tokenizer.token_bytes(i).decode("utf-8", errors="replace") for i in tokenizer.encode(line)]
    console.print("for instance: " + "|".join(pieces), markup=False, highlight=False)
