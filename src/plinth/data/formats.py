"""Files into documents: detect a file's format by name and content, then parse it, tolerantly and with counts.

Readers yield documents; what they cannot use they count: a whole file by raising Rejected, a line or a row in Malformed.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from plinth.data.documents import Document
from plinth.data.extract import html_to_text
from plinth.data.fasta import SUFFIXES as FASTA_SUFFIXES
from plinth.data.fasta import looks_like_fasta, read_fasta

MAX_FILE_BYTES = 1 << 30  # of one file held in memory whole; .jsonl, .parquet and FASTA are streamed and may be longer
HEAD_BYTES = 1 << 16
TEXT_FIELDS = ("text", "content", "body", "document", "raw_content", "article", "passage")
CODE_SUFFIXES = frozenset(
    ".py .pyi .c .h .cc .cpp .hpp .cs .go .java .js .jsx .ts .tsx .rs .rb .php .pl .lua .r .jl .kt .swift .scala .sh .sql".split()
)
SUFFIXES = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys(CODE_SUFFIXES, "code"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys(FASTA_SUFFIXES, "fasta"),
    ".json": "json",
    ".parquet": "parquet",
    ".gz": "gzip",
}
MAGIC = {
    b"%PDF": "a PDF; extract its text first",
    b"PK\x03\x04": "a zip archive (or an office document); unpack it or save it as text",
    b"\x28\xb5\x2f\xfd": "zstandard compressed; decompress it first",
    b"BZh": "bzip2 compressed; decompress it first",
    b"\xfd7zXZ\x00": "xz compressed; decompress it first",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x7fELF": "a program",
}
_CONTROL = bytes(set(range(32)) - {8, 9, 10, 12, 13, 27}) + b"\x7f"
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_DECLARED = re.compile(rb"""(?:coding[:=][ \t]*|charset=["']?|encoding=["'])([-\w.]+)""")


class Rejected(Exception):
    """A file that cannot be used; the text says why and, where there is one, the way out."""


@dataclasses.dataclass
class Malformed:
    """Lines or rows of one file that could not be used."""

    path: str
    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one; the first three are kept with their place and reason."""
        self.count += 1
        if len(self.first) < 3:
            self.first.append(f"{place}: {reason}")


def read_file(path: Path, name: str, text_fields: tuple[str, ...], malformed: Malformed) -> Iterator[Document]:
    """Yield the documents of one file; `name` is how sources call it.

    Raises Rejected when the file as a whole cannot be used.
    """
    try:
        with open(path, "rb") as raw:
            head = raw.read(HEAD_BYTES)
            raw.seek(0)
            file_format = detect(path.name, head)
            if file_format == "gzip":
                with gzip.open(raw) as stream:
                    head = stream.read(HEAD_BYTES)
                    stream.seek(0)
                    inner = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
                    inner_format = detect(inner, head)
                    if inner_format in ("gzip", "parquet"):
                        raise Rejected(f"{inner_format} inside gzip; decompress it first")
                    yield from _parse(inner_format, stream, head, inner, name, text_fields, malformed)
            else:
                yield from _parse(file_format, raw, head, path.name, name, text_fields, malformed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Rejected(f"damaged gzip file ({error})") from None
    except OSError as error:
        raise Rejected(f"cannot be read ({error.strerror or error})") from None


def detect(name: str, head: bytes) -> str:
    """Return text, code, html, jsonl, json, csv, fasta, parquet or gzip for a file's name and first bytes.

    Raises Rejected for an empty file, a binary file and a known format that holds no plain text.
    """
    if not head:
        raise Rejected("empty file")
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise Rejected(f"binary file: {what}")
    if head[257:262] == b"ustar":
        raise Rejected("binary file: a tar archive; unpack it first")
    if not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        control = len(head) - len(head.translate(None, _CONTROL))
        if b"\0" in head or control > 0.02 * len(head):
            raise Rejected("binary file")
    named = SUFFIXES.get(os.path.splitext(name)[1].lower())
    if named in ("gzip", "parquet"):
        raise Rejected(f"named like {named}, but its content is not")
    return named or _sniff(head)


def _sniff(head: bytes) -> str:
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb"(?i)<!doctype html|<html[\s>]", start):
        return "html"
    if looks_like_fasta(start):
        return "fasta"
    first_line = start.split(b"\n", 1)[0].strip()
    if first_line.startswith(b"{"):
        try:
            json.loads(first_line)
        except (ValueError, RecursionError):
            return "text"
        return "jsonl"
    return "text"


def _parse(
    file_format: str, stream: BinaryIO, head: bytes, filename: str, name: str, text_fields: tuple[str, ...], malformed: Malformed
) -> Iterator[Document]:
    if file_format == "jsonl":
        yield from _records(_jsonl_objects(stream, malformed), name, text_fields, malformed, "line")
    elif file_format == "parquet":
        yield from _records(_parquet_rows(stream), name, text_fields, malformed, "row")
    elif file_format == "fasta":
        yield from _sequences(read_fasta(stream, name, os.path.splitext(filename)[1], head, malformed), malformed)
    elif file_format == "json":
        yield from _parse_json(stream, name, text_fields, malformed)
    elif file_format == "csv":
        text = decode(_read_whole(stream))
        yield from _records(_csv_rows(text, filename, malformed), name, text_fields, malformed, "line")
    else:
        text = decode(_read_whole(stream))
        text = html_to_text(text) if file_format == "html" else text
        if not text.strip():
            raise Rejected("no text in it")
        yield Document(text, name, "code" if file_format == "code" else "text")


def _sequences(documents: Iterator[Document], malformed: Malformed) -> Iterator[Document]:
    """Pass sequences on; raises Rejected when a file has none that can be used."""
    number = 0
    for document in documents:
        number += 1
        yield document
    if number == 0:
        raise Rejected(f"no usable sequence; {malformed.first[0]}" if malformed.first else "no record, which begins with >")


def _read_whole(stream: BinaryIO) -> bytes:
    data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise Rejected(f"longer than {MAX_FILE_BYTES >> 20} MiB in one piece; split it, or save it as .jsonl with a document a line")
    return data


def decode(data: bytes) -> str:
    """Return a file's text with universal newlines, by its byte order mark, as UTF-8, or as the encoding that it declares.

    Nothing is guessed: raises Rejected with the way out when the bytes are none of these.
    """
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        text = _decode_declared(data, error)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode_declared(data: bytes, failure: UnicodeDecodeError) -> str:
    declared = _DECLARED.search(data[:2048])
    if declared:
        try:
            return data.decode(declared[1].decode("ascii"))
        except (LookupError, UnicodeError):
            pass
    byte = data[failure.start]
    raise Rejected(
        f"not {failure.encoding.upper()} text (byte 0x{byte:02x} at offset {failure.start}); "
        "convert it with: iconv -f ITS_ENCODING -t UTF-8"
    ) from None


def _jsonl_objects(stream: BinaryIO, malformed: Malformed) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            malformed.add(f"line {number}", f"not UTF-8 (byte 0x{line[error.start]:02x})")
        except json.JSONDecodeError as error:
            malformed.add(f"line {number}", f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            malformed.add(f"line {number}", f"not valid JSON: {error}")


def _parse_json(stream: BinaryIO, name: str, text_fields: tuple[str, ...], malformed: Malformed) -> Iterator[Document]:
    text = decode(_read_whole(stream))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n", 2)[:2] if line.strip()]
        if not all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines):
            raise Rejected(f"not valid JSON: {error}") from None
        objects = _jsonl_objects(io.BytesIO(text.encode("utf-8")), malformed)
        yield from _records(objects, name, text_fields, malformed, "line")
        return
    items = value if isinstance(value, list) else [value]
    yield from _records(enumerate(items, 1), name, text_fields, malformed, "entry")


def _csv_rows(text: str, filename: str, malformed: Malformed) -> Iterator[tuple[int, Any]]:
    delimiter = "\t" if filename.lower().endswith(".tsv") else _delimiter(text)
    previous_limit = csv.field_size_limit(MAX_FILE_BYTES)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = next(reader, None) or []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                malformed.add(f"line {reader.line_num}", f"{len(row)} fields where the header has {len(header)}")
                continue
            yield reader.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise Rejected(f"not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(previous_limit)


def _delimiter(text: str) -> str:
    header = text.split("\n", 1)[0]
    return max(",;\t|", key=header.count)


def _parquet_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    try:
        number = 0
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowException as error:
        raise Rejected(f"damaged parquet file ({str(error).splitlines()[0]})") from None


def _records(
    objects: Iterator[tuple[int, Any]], name: str, text_fields: tuple[str, ...], malformed: Malformed, place: str
) -> Iterator[Document]:
    """Turn records into documents; a file none of whose records has a text field is rejected with the fields it has."""
    num_good, fields = 0, None
    for number, record in objects:
        if not isinstance(record, dict):
            malformed.add(f"{place} {number}", f"not an object but {type(record).__name__}")
            continue
        fields = fields or list(record)
        text = _text_of(record, text_fields)
        if isinstance(text, str) and text.strip():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                malformed.add(f"{place} {number}", "a lone surrogate (\\ud800-\\udfff), which is no Unicode text")
                continue
            num_good += 1
            yield _document(record, text, f"{name}:{number}")
        elif text is None:
            malformed.add(f"{place} {number}", f"no text field (it has {', '.join(map(str, record)) or 'no field'})")
        else:
            malformed.add(f"{place} {number}", "the text field is empty" if isinstance(text, str) else "the text field is not a string")
    if num_good == 0:
        raise Rejected(_no_records(fields, malformed, text_fields, place))


def _text_of(record: dict[str, Any], text_fields: tuple[str, ...]) -> Any:
    if text_fields:
        parts = [record.get(field) for field in text_fields]
        return "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    by_name = {str(field).lower(): value for field, value in record.items()}
    for field in TEXT_FIELDS:
        if by_name.get(field) is not None:
            return by_name[field]
    return next(iter(record.values())) if len(record) == 1 and "messages" not in record else None


def _no_records(fields: list[str] | None, malformed: Malformed, text_fields: tuple[str, ...], place: str) -> str:
    if fields is None:
        return f"no usable {place}; {malformed.first[0]}" if malformed.first else "no records in it"
    if "messages" in fields and not text_fields:
        return "chat messages, not text; pass it as instruction data (--sft)"
    wanted = ", ".join(text_fields) if text_fields else "one of " + ", ".join(TEXT_FIELDS)
    return f"no text under {wanted}; its fields are {', '.join(map(str, fields))}. Name those that hold the text with --text-field"


def _document(record: dict[str, Any], text: str, source: str) -> Document:
    def optional(*names: str) -> str | None:
        return next((record[name] for name in names if isinstance(record.get(name), str) and record[name].isprintable()), None)

    text = text.replace("\r\n", "\n").replace("\r", "\n")
    kind = optional("kind") or ""
    return Document(text, source, kind if _KIND.fullmatch(kind) else "text", optional("licence", "license"), optional("url"))
