"""FASTA files of proteins and nucleic acids into documents: a record is a document, its text the sequence in upper case.

Read line by line, so a file may be longer than memory. Lines may be wrapped or not, end as on any system, and be blank; lower case (how
repeats are marked) becomes upper case; ambiguous residues stay; gaps of an alignment are left out, and so is a stop at the end.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from plinth.data.documents import Document
from plinth.tokenizer.residues import ALPHABETS

SUFFIX_KINDS = {".faa": "protein", ".fna": "nucleotide", ".ffn": "nucleotide", ".frn": "nucleotide"}
SUFFIXES = (".fasta", ".fas", ".fa", ".fsa", *SUFFIX_KINDS)
NUCLEOTIDE_SHARE = 0.9  # of the letters of a file's beginning in ACGTUN: DNA and RNA reach it, no protein comes near
GAPS = str.maketrans("", "", "-.")
_FIRST_RECORD = re.compile(rb"(?:;[^\n\r]*[\r\n]+)*>[^\n\r]*[\r\n]+[ \t]*[A-Za-z*.-]+[ \t]*(?:[\r\n]|$)")


class Faults(Protocol):
    """Where records that cannot be used are counted; `formats.Malformed` is one."""

    def add(self, place: str, reason: str) -> None: ...


def looks_like_fasta(head: bytes) -> bool:
    """Return whether a file's beginning is a header line and a line of letters, after comments that begin with a semicolon."""
    return _FIRST_RECORD.match(head.removeprefix(codecs.BOM_UTF8).lstrip()) is not None


def is_fasta(path: Path) -> bool:
    """Return whether a file is FASTA, by its name, gzip or not, or by how it begins."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            return looks_like_fasta(file.read(4096))
    except OSError:
        return False


def residue_kind(head: str) -> str:
    """Return "nucleotide" or "protein" for the beginning of a file, by which letters its sequences have."""
    lines = [line for line in head.splitlines() if line and line[0] not in ">;"]
    letters = [letter for letter in "".join(lines).upper() if letter.isalpha()]
    bases = sum(letter in "ACGTUN" for letter in letters)
    return "nucleotide" if letters and bases >= NUCLEOTIDE_SHARE * len(letters) else "protein"


def read_fasta(stream: BinaryIO, name: str, suffix: str, head: bytes, faults: Faults) -> Iterator[Document]:
    """Yield a document a record: its source is "file:identifier", its kind protein or nucleotide.

    The kind is that of the file's suffix where it says one (.faa, .fna, .ffn, .frn), else by its letters. A record without residues, or
    with a character that is no code of its kind, is counted with its line; lines before the first header too.
    """
    kind = SUFFIX_KINDS.get(suffix.lower()) or residue_kind(head.decode("utf-8-sig", "replace"))
    for number, header, lines in _records(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=None), faults):
        identifier = header.split(maxsplit=1)[0] if header else f"line {number}"
        sequence = "".join(lines).upper().translate(GAPS)
        sequence = sequence.removesuffix("*") if kind == "protein" else sequence
        if reason := _fault(sequence, kind):
            faults.add(f"{identifier} (line {number})", reason)
        else:
            yield Document(sequence, f"{name}:{identifier}", kind)


def _records(lines: Iterator[str], faults: Faults) -> Iterator[tuple[int, str, list[str]]]:
    """Yield (line of the header, header, lines of the sequence) of each record."""
    header, start, parts, strays = None, 0, [], 0
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line.startswith(">"):
            if header is not None:
                yield start, header, parts
            header, start, parts = line[1:].strip(), number, []
        elif not line or line.startswith(";"):
            continue
        elif header is None:
            strays += 1
            if strays == 1:
                faults.add(f"line {number}", "a sequence before the first header, which begins with >")
        else:
            parts.append("".join(line.split()))
    if header is not None:
        yield start, header, parts


def _fault(sequence: str, kind: str) -> str | None:
    """Return why a sequence cannot be used, or None."""
    if not sequence.strip("*"):
        return "no residues"
    strange = set(sequence) - set(ALPHABETS[kind])
    if not strange:
        return None
    place = next(i for i, letter in enumerate(sequence) if letter in strange)
    what = "an amino acid" if kind == "protein" else "a nucleotide"
    return f"{sequence[place]!r} at residue {place + 1} is no code of {what}"
