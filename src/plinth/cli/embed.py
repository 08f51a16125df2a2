"""`plinth embed`: a vector for each text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from plinth.cli.output import emit
from plinth.config import UserError, write_atomic
from plinth.data.parallel import read_lines
from plinth.inference.encoding import Pool, embed_texts


@dataclass(frozen=True)
class Options:
    """Embed texts: a vector each, from an encoder, or from a decoder's hidden states."""

    run: Annotated[Path, tyro.conf.Positional]
    """run or model folder"""
    text: tuple[str, ...] = ()
    """texts"""
    file: Path | None = None
    """texts, one a line"""
    pool: Pool = "mean"
    """mean of the last hidden states of the text's tokens, or that of the first position, [CLS]"""
    normalise: bool = False
    """scale each vector to length one, so that products are cosines"""
    out: Path | None = None
    """write .npy (float32, texts x width) or .jsonl ({"text", "embedding"} a line)"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="plinth embed", args=argv)
    texts = [*options.text, *([] if options.file is None else read_lines(options.file))]
    if not texts:
        raise UserError("there is no text. Pass --text, or --file.")
    if options.out is not None and options.out.suffix not in (".npy", ".jsonl"):
        raise UserError(f"out={options.out} must end in .npy or .jsonl.")
    vectors = embed_texts(options.run, texts, options.pool)
    if options.normalise:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if options.out is not None:
        save_vectors(options.out, texts, vectors)
    result = {"texts": len(texts), "width": vectors.shape[1]}
    result |= {"embeddings": vectors.tolist()} if options.out is None else {"out": str(options.out)}

    def render(console) -> None:
        if options.out is not None:
            console.print(f"{options.out}: {len(texts)} vectors of width {vectors.shape[1]}", markup=False)
        for vector in vectors if options.out is None else []:
            console.print(" ".join(f"{value:.4f}" for value in vector), markup=False, soft_wrap=True)

    emit(result, options.json, render)
    return 0


def save_vectors(path: Path, texts: list[str], vectors: np.ndarray) -> None:
    """Write vectors as .npy, or with their texts as .jsonl."""
    if path.suffix == ".npy":
        np.save(path, vectors)
    else:
        lines = (json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False) for text, vector in zip(texts, vectors))
        write_atomic(path, "".join(line + "\n" for line in lines))
