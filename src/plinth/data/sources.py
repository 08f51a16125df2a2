"""The user's own text: files and folders into one document table, with every file that was not used counted and explained."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from plinth.config import UserError, nearest
from plinth.data.documents import Document, TableBuilder, excerpt
from plinth.data.formats import Malformed, Rejected, read_file
from plinth.data.stdlib import stdlib_documents
from plinth.run import Progress

STDLIB = "stdlib"
READABLE = ".txt .md .rst .html .py .jsonl .json .parquet .csv .tsv .fasta, each also as .gz"


@dataclasses.dataclass(frozen=True)
class Reject:
    """A file that was not used, and why."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Intake:
    """What was read: the table, and an account of what was not."""

    table: pa.Table
    """Documents, columns as in documents.SCHEMA."""
    rejected: list[Reject]
    """Files and folders that gave no document."""
    examples: list[dict[str, Any]]
    """Up to three parsed documents, of different files where there are several: source, kind, bytes, excerpt."""
    counts: dict[str, Any]
    """files, files_rejected, documents, bytes, malformed (lines or rows), documents_by_kind, stdlib (version of Python, or None)."""
    malformed: list[Malformed]
    """Files with lines or rows that could not be used: their count and the first three with line numbers."""
    sources: list[dict[str, Any]]
    """What each named path gave: path, documents, bytes, sha256."""


def read_documents(paths: Sequence[str | Path], text_fields: tuple[str, ...] = ()) -> Intake:
    """Read files, folders (with all below them) and the name "stdlib" into one table.

    `text_fields` names the fields of JSON, CSV and parquet records that hold the text, joined by a blank line; when empty, the
    first of formats.TEXT_FIELDS that a record has is taken. The order of documents depends on the paths only.
    Raises UserError when a path does not exist, a folder is empty, or no file could be used.
    """
    if not paths:
        raise UserError("no text was named. Name files or folders, or `stdlib` for the library of the running Python.")
    rejected: list[Reject] = []
    malformed: list[Malformed] = []
    first_documents: list[tuple[int, Document]] = []
    files = list(_walk_all([Path(path) for path in paths if str(path) != STDLIB], rejected))
    builders = {printable(path): TableBuilder() for path in paths}
    with Progress(len(files), "reading", "file") as progress:
        for named, path in files:
            _read_into(builders[printable(named)], path, text_fields, rejected, malformed, first_documents)
            progress.update(1)
    tables = {named: stdlib_documents() if named == STDLIB else builder.finish() for named, builder in builders.items()}
    table = pa.concat_tables(tables.values())
    if len(table) == 0:
        raise UserError(_nothing_read(rejected))
    first_documents.sort(key=lambda item: item[0])  # stable: the first of each file before the second of any
    examples = [_example(*document[:3]) for _, document in first_documents[:3]] or [
        _example(row["text"], row["source"], row["kind"]) for row in _spread(table, 3)
    ]
    counts = _counts(table, len(files), rejected, malformed, STDLIB in tables)
    return Intake(table, rejected, examples, counts, malformed, [_source_record(named, part) for named, part in tables.items()])


def _read_into(
    builder: TableBuilder,
    path: Path,
    text_fields: tuple[str, ...],
    rejected: list[Reject],
    malformed: list[Malformed],
    first_documents: list[tuple[int, Document]],
) -> None:
    """Add the documents of one file to the table, or the file to the rejected ones."""
    name = printable(path)
    bad, num_before = Malformed(name), builder.num_documents
    try:
        for index, document in enumerate(read_file(path, name, text_fields, bad)):
            builder.add(document)
            if index < 3 and len(first_documents) < 300:
                first_documents.append((index, document))
    except Rejected as error:
        num_kept = builder.num_documents - num_before
        rejected.append(Reject(name, f"{error}; the {num_kept} documents before that are kept" if num_kept else str(error)))
    if bad.count:
        malformed.append(bad)


def _source_record(named: str, table: pa.Table) -> dict[str, Any]:
    """Return what one named path gave, with a hash over the sources and texts of its documents."""
    digest = hashlib.sha256()
    for source, text in zip(table["source"].to_pylist(), table["text"].to_pylist()):
        data = text.encode("utf-8")
        digest.update(f"{source}\0{len(data)}\0".encode())
        digest.update(data)
    num_bytes = pc.sum(pc.binary_length(table["text"])).as_py() or 0
    return {"path": named, "documents": len(table), "bytes": num_bytes, "sha256": digest.hexdigest()}


def _example(text: str, source: str, kind: str) -> dict[str, Any]:
    return {"source": source, "kind": kind, "bytes": len(text.encode("utf-8")), "excerpt": excerpt(text, 200)}


def _spread(table: pa.Table, num: int) -> list[dict[str, Any]]:
    """Return rows of different kinds, the first of each."""
    kinds = table["kind"].to_pylist()
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    return table.take(sorted(first.values())[:num]).to_pylist()


def _counts(table: pa.Table, num_files: int, rejected: list[Reject], malformed: list[Malformed], uses_stdlib: bool) -> dict[str, Any]:
    return {
        "files": num_files,
        "files_rejected": len(rejected),
        "documents": len(table),
        "bytes": pc.sum(pc.binary_length(table["text"])).as_py(),
        "malformed": sum(bad.count for bad in malformed),
        "documents_by_kind": dict(sorted(Counter(table["kind"].to_pylist()).items())),
        "stdlib": f"{platform.python_implementation()} {platform.python_version()}" if uses_stdlib else None,
    }


def _nothing_read(rejected: list[Reject]) -> str:
    shown = "; ".join(f"{reject.path}: {reject.reason}" for reject in rejected[:3])
    more = f" (and {len(rejected) - 3} more)" if len(rejected) > 3 else ""
    return f"none of {len(rejected)} files could be used: {shown}{more}. Readable are {READABLE}."


def _walk_all(paths: list[Path], rejected: list[Reject]) -> Iterator[tuple[Path, Path]]:
    """Yield (named path, file) for each file once, in order. Raises UserError for a path that is absent and a folder that holds no file."""
    seen: set[str] = set()
    for path in paths:
        if path.is_dir():
            found = list(_walk(path, rejected))
            if not found:
                raise UserError(f"{path} holds no files to read. Put text there ({READABLE}), or name another folder.")
        elif path.exists():
            found = [path]
        else:
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = nearest(path.name, siblings) if siblings else ""
            raise UserError(f"{path} does not exist.{hint} Name files or folders, or `{STDLIB}` for Python's own library.")
        for file in found:
            identity = os.path.realpath(file)
            if identity not in seen:
                seen.add(identity)
                yield path, file


def _walk(folder: Path, rejected: list[Reject]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        rejected.append(Reject(printable(error.filename), f"cannot be read ({error.strerror})"))

    for parent, subfolders, names in os.walk(folder, onerror=unreadable):
        for name in [name for name in subfolders if name.startswith(".") or name == "__pycache__"]:
            rejected.append(Reject(printable(Path(parent, name)), "a hidden folder or a cache, not entered; name it to read it"))
            subfolders.remove(name)
        for name in [name for name in subfolders if Path(parent, name).is_symlink()]:
            rejected.append(Reject(printable(Path(parent, name)), "a symbolic link to a folder, not followed; name it to read it"))
        subfolders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                rejected.append(Reject(printable(path), "a hidden file; name it to read it"))
            elif not path.is_file():
                rejected.append(Reject(printable(path), "not a regular file, or a broken link"))
            else:
                yield path


def printable(path: str | Path) -> str:
    """Return a path as Unicode text, also when its bytes are none; such bytes become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")
