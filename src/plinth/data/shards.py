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
import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plinth.config import UserError, read_json, save_json
from plinth.run import Progress, file_sha256, physical_memory_bytes, publish_dir, tree_sha256
from plinth.tokenizer.encode import Tokenizer

SPLITS = ("train", "heldout")
CHUNK_BYTES = 4 << 20  # text encoded at a time
BLOCK = 2048  # neighbouring documents that the loader puts in order together
READ_DOCUMENTS = 1 << 20  # documents whose columns are read at a time
SMALL_BYTES = 1 << 20  # a column up to this size is read, a larger one mapped


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which ids are stored: little-endian uint16 where they fit, else uint32."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a shards folder; large arrays are memory maps, so that opening costs nothing whatever their size."""

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

    @cached_property
    def block_tokens(self) -> np.ndarray:
        """Return the tokens of each block of BLOCK documents; int64, shape (blocks,)."""
        starts = read_every(self.offsets, BLOCK)[: -(-self.num_documents // BLOCK)]
        return np.diff(np.append(starts, self.num_tokens))

    @cached_property
    def kind_tokens(self) -> np.ndarray:
        """Return the tokens of each kind in each block; int64, shape (blocks, kinds). Reads two columns through, once."""
        num_blocks, num_kinds = len(self.block_tokens), len(self.kind_names)
        table = np.zeros(num_blocks * num_kinds, dtype=np.int64)
        for start in range(0, self.num_documents, READ_DOCUMENTS):
            stop = min(start + READ_DOCUMENTS, self.num_documents)
            kinds = read_part(self.kinds, start, stop)
            cell = np.arange(start, stop) // BLOCK * num_kinds + kinds
            table += np.bincount(cell, np.diff(read_part(self.offsets, start, stop + 1)), len(table)).astype(np.int64)
        return table.reshape(num_blocks, num_kinds)

    def document(self, index: int) -> np.ndarray:
        """Return the ids of one document, its <|endoftext|> last."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class _Column:
    """A .npy file of one dimension that is written a piece at a time; its bytes are those of np.save."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._file, self._dtype, self.length = path.open("wb"), np.dtype(dtype), 0
        self._write_header()

    def append(self, values: list[int] | np.ndarray) -> None:
        self._file.write(np.asarray(values, dtype=self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        start = self._file.tell() - self.length * self._dtype.itemsize
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == start, "a header's size does not depend on the length"
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class SplitWriter:
    """Writes the files of one split into `folder`, a list of documents at a time; holds none of them."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, end_of_text_id: int, kinds: dict[str, int]):
        self._dtype, self._end = dtype, end_of_text_id
        self._kind_numbers = kinds  # {name: number}, shared between the splits; grows as kinds turn up
        self._file = (folder / f"{name}.bin").open("wb")
        self._columns = {
            column: _Column(folder / f"{name}.{column}.npy", np.dtype(np.uint16 if column == "kinds" else np.int64))
            for column in ("offsets", "bytes", "chars", "kinds")
        }
        self._columns["offsets"].append([0])
        self._num_tokens = 0
        self._amounts: dict[str, dict[str, int]] = {}

    def add(self, documents_ids: list[list[int]], texts: list[str], kinds: list[str]) -> None:
        """Append documents, each followed by the end-of-text id."""
        joined: list[int] = []
        sizes = [len(text.encode("utf-8")) for text in texts]
        for ids, size, kind in zip(documents_ids, sizes, kinds, strict=True):
            joined += ids
            joined.append(self._end)
            self._count(kind, len(ids) + 1, size)
        self._file.write(np.asarray(joined, dtype=self._dtype).tobytes())
        self._columns["offsets"].append(self._num_tokens + np.cumsum([len(ids) + 1 for ids in documents_ids], dtype=np.int64))
        self._columns["bytes"].append(sizes)
        self._columns["chars"].append([len(text) for text in texts])
        self._columns["kinds"].append([self._kind_numbers.setdefault(kind, len(self._kind_numbers)) for kind in kinds])
        self._num_tokens += len(joined)

    def _count(self, kind: str, num_tokens: int, num_bytes: int) -> None:
        entry = self._amounts.setdefault(kind, {"documents": 0, "tokens": 0, "bytes": 0})
        entry["documents"] += 1
        entry["tokens"] += num_tokens
        entry["bytes"] += num_bytes

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        for column in self._columns.values():
            column.close()

    def amounts(self) -> dict[str, dict[str, int]]:
        """Return {kind: {documents, tokens, bytes}} of what was written."""
        return dict(sorted(self._amounts.items()))


def pack_corpus(corpus: Path, tokenizer: Tokenizer, out: Path, *, backwards: bool = False) -> dict[str, Any]:
    """Encode both splits of a corpus folder into the shards folder `out` and return its manifest.

    The manifest has vocab_size, tokenizer_sha256, corpus_sha256, dtype, end_of_text_id, tokens_*, documents_*, bytes_*,
    mixture {split: {kind: {documents, tokens, bytes}}}, kinds and sha256 of the files. Token counts include one <|endoftext|> a document.
    `backwards` turns each document's tokens round, for a language model that reads from the end; the manifest says so.
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
            manifest = _pack_into(folder, corpus, tokenizer, backwards)
            save_json(folder / "manifest.json", manifest)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"the disk of {out} is full. No half-written shards were left behind; free some space and pack again.") from None
    return manifest


def _pack_into(folder: Path, corpus: Path, tokenizer: Tokenizer, backwards: bool) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    kinds_seen: dict[str, int] = {}
    writers: dict[str, SplitWriter] = {}
    num_documents = sum(_open_table(corpus / f"{split}.parquet").metadata.num_rows for split in SPLITS)
    with Progress(num_documents, "packing", "document") as progress:
        for split in SPLITS:
            writers[split] = SplitWriter(folder, split, dtype, tokenizer.end_of_text_id, kinds_seen)
            for texts, kinds in _chunks(corpus / f"{split}.parquet"):
                ids = tokenizer.encode_batch(texts)
                writers[split].add([each[::-1] for each in ids] if backwards else ids, texts, kinds)
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
        **({"backwards": True} if backwards else {}),
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
            _map_column(shards / f"{split}.{name}.npy") for name in ("offsets", "bytes", "chars", "kinds")
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
    tokens = _map_tokens(shards / f"{split}.bin", dtype) if expected else np.empty(0, dtype=dtype)
    return Split(tokens, offsets, num_bytes, num_chars, kinds, manifest["kinds"])


def _map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    """Map a file of ids. One that memory cannot keep is read a page at a time: what the system reads around it would be thrown away."""
    with path.open("rb") as file:
        tokens = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    memory_bytes = physical_memory_bytes()
    if memory_bytes and len(tokens) > memory_bytes / 2 and hasattr(mmap, "MADV_RANDOM"):
        tokens.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(tokens, dtype)


def _map_column(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False, mmap_mode="r" if path.stat().st_size > SMALL_BYTES else None)


def read_part(column: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return column[start:stop] in memory of its own.

    A memory map is read as a file, since each page that a map touches stays with the process until memory runs short.
    """
    if not isinstance(column, np.memmap):
        return column[start:stop]
    stop = max(start, min(stop, len(column)))
    return np.fromfile(column.filename, column.dtype, stop - start, offset=column.offset + start * column.itemsize)


def read_every(column: np.ndarray, step: int) -> np.ndarray:
    """Return column[::step] in memory of its own, likewise."""
    if not isinstance(column, np.memmap):
        return column[::step]
    with open(column.filename, "rb", buffering=0) as file:
        picked = bytearray()
        for index in range(0, len(column), step):
            file.seek(column.offset + index * column.itemsize)
            picked += file.read(column.itemsize)
    return np.frombuffer(picked, column.dtype)
