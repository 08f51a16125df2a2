"""The document table: what every stage of data reads and writes, column by column."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # path, with :line or :row where a file holds many documents
        pa.field("kind", pa.string(), nullable=False),  # code, docs, reference, text, protein, nucleotide, or the user's own word
        pa.field("licence", pa.string()),
        pa.field("url", pa.string()),
        pa.field("group", pa.string()),  # documents cut from one original; they are held out together or not at all
    ]
)
BATCH_BYTES = 32 << 20  # text gathered before it becomes one Arrow batch


class Document(NamedTuple):
    """One row of the table."""

    text: str
    source: str
    kind: str = "text"
    licence: str | None = None
    url: str | None = None
    group: str | None = None


class TableBuilder:
    """Gathers documents into a pyarrow.Table of SCHEMA, batch by batch."""

    def __init__(self) -> None:
        self.num_documents = 0
        self.num_bytes = 0
        self._rows: list[Document] = []
        self._pending_bytes = 0
        self._batches: list[pa.RecordBatch] = []

    def add(self, document: Document) -> None:
        """Append one row. Raises UnicodeEncodeError when the text holds a lone surrogate and so is not Unicode text."""
        size = len(document.text.encode("utf-8"))
        self._rows.append(document)
        self.num_documents += 1
        self.num_bytes += size
        self._pending_bytes += size
        if self._pending_bytes >= BATCH_BYTES:
            self._flush()

    def finish(self) -> pa.Table:
        """Return the table of all rows added."""
        self._flush()
        return pa.Table.from_batches(self._batches, schema=SCHEMA)

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(column, type=field.type) for column, field in zip(zip(*self._rows), SCHEMA, strict=True)]
            self._batches.append(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        self._rows, self._pending_bytes = [], 0


def table_of(documents: list[Document]) -> pa.Table:
    """Return the table of a list of documents."""
    builder = TableBuilder()
    for document in documents:
        builder.add(document)
    return builder.finish()


def conform(table: pa.Table) -> pa.Table:
    """Return `table` with exactly the columns of SCHEMA; absent optional ones become null.

    Raises ValueError when `text` is missing.
    """
    if "text" not in table.column_names:
        raise ValueError(f"a document table needs a column text; this one has {', '.join(table.column_names)}.")
    defaults = {"source": "unknown", "kind": "text"}
    columns = []
    for field in SCHEMA:
        if field.name in table.column_names:
            column = table[field.name].cast(field.type)
        else:
            column = pa.array([defaults.get(field.name)] * len(table), type=field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def document_id(text: str) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def excerpt(text: str, length: int = 120) -> str:
    """Return the beginning of a text on one line, for examples in manifests."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"
