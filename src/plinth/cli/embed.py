"""`plinth embed`: a vector for each text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError, write_atomic
from plinth.data.fasta import is_fasta
from plinth.data.parallel import read_lines
from plinth.data.sources import read_documents
from plinth.inference.encoding import Pool, embed_texts


@dataclass(frozen=True)
class Options:
    """Embed texts: a vector each, from an encoder, or from a decoder's hidden states."""

    run: Annotated[Path, tyro.conf.Positional]
    """run or model folder"""
    text: tuple[str, ...] = ()
    """texts"""
    file: Path | None = None
    """texts, one a line; or sequences, FASTA"""
    pool: Pool = "mean"
    """mean of the last hidden states of the text's tokens, or that of the first position, [CLS]"""
    normalise: bool = False
    """scale each vector to length one, so that products are cosines"""
    out: Path | None = None
    """write .npy (float32, texts x width) or .jsonl ({"text", "embedding"} a line, of FASTA "id" too)"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth embed", args=argv)
    names, texts = read_texts(options)
    if not texts:
        raise UserError("there is no text. Pass --text, or --file.")
    if options.out is not None and options.out.suffix not in (".npy", ".jsonl"):
        raise UserError(f"out={options.out} must end in .npy or .jsonl.")
    vectors = embed_texts(options.run, texts, options.pool)
    if options.normalise:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if options.out is not None:
        save_vectors(options.out, names, texts, vectors)
    result = {"texts": len(texts), "width": vectors.shape[1]} | ({} if names is None else {"ids": names})
    result |= {"embeddings": vectors.tolist()} if options.out is None else {"out": str(options.out)}

    def render(console) -> None:
        if options.out is not None:
            console.print(f"{options.out}: {len(texts)} vectors of width {vectors.shape[1]}", markup=False)
        for vector in vectors if options.out is None else []:
            console.print(" ".join(f"{value:.4f}" for value in vector), markup=False, soft_wrap=True)

    emit(result, options.json, render)
    return 0


def read_texts(options: Options) -> tuple[list[str] | None, list[str]]:
    """Return the texts, and of FASTA the identifier of each. What of a FASTA file cannot be used is told, and refused if it is all."""
    if options.file is None or not is_fasta(options.file):
        return None, [*options.text, *([] if options.file is None else read_lines(options.file))]
    if options.text:
        raise UserError("--text and sequences from FASTA do not go together. Name the one or the other.")
    intake = read_documents([options.file])
    for bad in intake.malformed:
        say(f"{bad.path}: {bad.count} records not used: {'; '.join(bad.first)}")
    start = len(str(options.file)) + 1
    return [source[start:] for source in intake.table["source"].to_pylist()], intake.table["text"].to_pylist()


def save_vectors(path: Path, names: list[str] | None, texts: list[str], vectors: np.ndarray) -> None:
    """Write vectors as .npy, or with their texts, and names where there are some, as .jsonl."""
    if path.suffix == ".npy":
        np.save(path, vectors)
    else:
        rows = [{"text": text, "embedding": vector.tolist()} for text, vector in zip(texts, vectors)]
        rows = rows if names is None else [{"id": name} | row for name, row in zip(names, rows)]
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        write_atomic(path, "".join(line + "\n" for line in lines))
