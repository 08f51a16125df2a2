"""Token shards: a corpus encoded once, document after document, to be read by memory map.

A shards folder holds for each split (train, heldout)
    SPLIT.bin           token ids, little-endian uint16, or uint32 when the vocabulary has more than 65,536 entries;
                        every document ends with <|endoftext|>
    SPLIT.offsets.npy   int64, documents + 1: where each document starts
    SPLIT.bytes.npy     int64, documents: bytes of its text in UTF-8
    SPLIT.chars.npy     int64, documents: characters of its text
    SPLIT.kinds.npy     uint16, documents: index into the manifest's list of kinds
and manifest.json.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plinth.config import UserError, read_json, save_json
from plinth.run import Progress, file_sha256, publish_dir, tree_sha256
from plinth.tokenizer.encode import Tokenizer

SPLITS = ("train", "heldout")
CHUNK_BYTES = 4 << 20  # text encoded at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which ids are stored: little-endian uint16 where they fit, else uint32."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a shards folder; the tokens are a memory map, the rest is in memory."""

    tokens: np.ndarray
    """ids, shape (tokens,)"""
    offsets: np.ndarray
    """int64, shape (documents + 1,)"""
    num_bytes: np.ndarray
    """int64, shape (documents,)"""
    num_chars: np.ndarray
    """int64, shape (documents,)"""
    kinds: np.ndarray
    """uint16, shape (documents,)"""
    kind_names: list[str]
    """what the numbers in `kinds` stand for"""

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def document(self, index: int) -> np.ndarray:
        """Return the ids of one document, its <|endoftext|> last."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class SplitWriter:
    """Writes the files of one split into `folder`, a list of documents at a time."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, end_of_text_id: int, kinds: dict[str, int]):
        self._folder, self._name, self._dtype, self._end = folder, name, dtype, end_of_text_id
        self._kind_numbers = kinds  # {name: number}, shared between the splits; grows as kinds turn up
        self._file = (folder / f"{name}.bin").open("wb")
        self._lengths: list[int] = []
        self._bytes: list[int] = []
        self._chars: list[int] = []
        self._kinds: list[int] = []

    def add(self, documents_ids: list[list[int]], texts: list[str], kinds: list[str]) -> None:
        """Append documents, each followed by the end-of-text id."""
        joined: list[int] = []
        for ids, text, kind in zip(documents_ids, texts, kinds, strict=True):
            joined += ids
            joined.append(self._end)
            self._lengths.append(len(ids) + 1)
            self._bytes.append(len(text.encode("utf-8")))
            self._chars.append(len(text))
            self._kinds.append(self._kind_numbers.setdefault(kind, len(self._kind_numbers)))
        self._file.write(np.asarray(joined, dtype=self._dtype).tobytes())

    def close(self) -> None:
        """Write what goes with the tokens."""
        self._file.close()
        offsets = np.zeros(len(self._lengths) + 1, dtype=np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        np.save(self._folder / f"{self._name}.offsets.npy", offsets)
        np.save(self._folder / f"{self._name}.bytes.npy", np.asarray(self._bytes, dtype=np.int64))
        np.save(self._folder / f"{self._name}.chars.npy", np.asarray(self._chars, dtype=np.int64))
        np.save(self._folder / f"{self._name}.kinds.npy", np.asarray(self._kinds, dtype=np.uint16))

    def amounts(self) -> dict[str, dict[str, int]]:
        """Return {kind: {documents, tokens, bytes}} of what was written."""
        result: dict[str, dict[str, int]] = {}
        names = list(self._kind_numbers)
        for kind, length, size in zip(self._kinds, self._lengths, self._bytes):
            entry = result.setdefault(names[kind], {"documents": 0, "tokens": 0, "bytes": 0})
            entry["documents"] += 1
            entry["tokens"] += length
            entry["bytes"] += size
        return dict(sorted(result.items()))


def pack_corpus(corpus: Path, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Encode both splits of a corpus folder into the shards folder `out` and return its manifest.

    The manifest has vocab_size, tokenizer_sha256, corpus_sha256, dtype, end_of_text_id, tokens_*, documents_*, bytes_*,
    mixture {split: {kind: {documents, tokens, bytes}}}, kinds and sha256 of the files. Token counts include one <|endoftext|> a document.
    Raises UserError when `corpus` is none, the tokenizer lacks <|endoftext|>, `out` holds files, or the disk is full; nothing is
    left behind then.
    """
    corpus, out = Path(corpus), Path(out)
    if not (corpus / "train.parquet").is_file():
        raise UserError(f"{corpus} holds no corpus (no train.parquet). Name a folder that `plinth data curate` wrote.")
    if tokenizer.end_of_text_id is None:
        raise UserError("the tokenizer has no <|endoftext|>, which separates documents. Train one with `plinth tokenizer train`.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already. Pass --out with a new name, or remove it.")
    try:
        with publish_dir(out) as folder:
            manifest = _pack_into(folder, corpus, tokenizer)
            save_json(folder / "manifest.json", manifest)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"the disk of {out} is full. No half-written shards were left behind; free some space and pack again.") from None
    return manifest


def _pack_into(folder: Path, corpus: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    kinds_seen: dict[str, int] = {}
    writers: dict[str, SplitWriter] = {}
    num_documents = sum(_open_table(corpus / f"{split}.parquet").metadata.num_rows for split in SPLITS)
    with Progress(num_documents, "packing", "document") as progress:
        for split in SPLITS:
            writers[split] = SplitWriter(folder, split, dtype, tokenizer.end_of_text_id, kinds_seen)
            for texts, kinds in _chunks(corpus / f"{split}.parquet"):
                writers[split].add(tokenizer.encode_batch(texts), texts, kinds)
                progress.update(len(texts))
            writers[split].close()
    mixture = {split: writers[split].amounts() for split in SPLITS}
    totals = {
        f"{unit}_{split}": sum(entry[unit] for entry in mixture[split].values())
        for unit in ("tokens", "documents", "bytes")
        for split in SPLITS
    }
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "corpus_sha256": tree_sha256(corpus),
        "dtype": dtype.str,
        "end_of_text_id": tokenizer.end_of_text_id,
        **totals,
        "mixture": mixture,
        "kinds": list(kinds_seen),
        "sha256": {f"{split}.bin": file_sha256(folder / f"{split}.bin") for split in SPLITS},
    }


def _open_table(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the corpus is not whole. Write it again with `plinth data curate`.") from None
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}). Write the corpus again with `plinth data curate`.") from None


def _chunks(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (texts, kinds) of some CHUNK_BYTES of text each."""
    texts: list[str] = []
    kinds: list[str] = []
    size = 0
    for batch in _open_table(path).iter_batches(batch_size=256, columns=["text", "kind"]):
        for text, kind in zip(batch["text"].to_pylist(), batch["kind"].to_pylist()):
            texts.append(text)
            kinds.append(kind)
            size += len(text)
            if size >= CHUNK_BYTES:
                yield texts, kinds
                texts, kinds, size = [], [], 0
    if texts:
        yield texts, kinds


def read_manifest(shards: Path) -> dict[str, Any]:
    """Return the manifest of a shards folder. Raises UserError when there is none."""
    if not (Path(shards) / "manifest.json").is_file():
        raise UserError(f"{shards} holds no token shards (no manifest.json). Name a folder that `plinth data pack` wrote.")
    return read_json(Path(shards) / "manifest.json")


def open_split(shards: Path, split: str = "train") -> Split:
    """Open one split by memory map.

    Raises UserError when the folder holds no shards, or a file is absent or shorter or longer than its manifest and offsets say.
    """
    shards = Path(shards)
    manifest = read_manifest(shards)
    if split not in SPLITS:
        raise UserError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    try:
        offsets, num_bytes, num_chars, kinds = (
            np.load(shards / f"{split}.{name}.npy", allow_pickle=False) for name in ("offsets", "bytes", "chars", "kinds")
        )
        size = (shards / f"{split}.bin").stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist; the shards are not whole. Pack the corpus again.") from None
    except ValueError as error:
        raise UserError(f"a file of {shards} is damaged ({error}). Pack the corpus again.") from None
    dtype = np.dtype(manifest["dtype"])
    expected = manifest[f"tokens_{split}"]
    if size != expected * dtype.itemsize or offsets[-1] != expected:
        raise UserError(
            f"{shards}/{split}.bin has {size} bytes where {expected} tokens of {dtype.itemsize} bytes belong. Pack the corpus again."
        )
    tokens = np.memmap(shards / f"{split}.bin", dtype=dtype, mode="r") if expected else np.empty(0, dtype=dtype)
    return Split(np.asarray(tokens), offsets, num_bytes, num_chars, kinds, manifest["kinds"])
