"""Curation: documents through exact deduplication, quality rules, near deduplication and the held-out split, with an account.

A corpus is a folder: train.parquet and heldout.parquet (the columns of documents.SCHEMA and `doc_id`) and manifest.json.
Each gate takes the indices that are left and gives back those it keeps and why it drops the others; no gate moves text.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plinth.config import UserError, nearest, save_json, to_dict
from plinth.data import dedup, quality
from plinth.data.documents import Document, TableBuilder, conform, document_id, excerpt
from plinth.data.sources import Intake
from plinth.run import Progress, file_sha256, publish_dir

NUM_EXAMPLES = 3
MIN_PART_BYTES = 4096
FEW_DOCUMENTS = 200  # with fewer, none makes up more than a 200th of the text, so that a corpus of one long file can be split too
MIN_HELDOUT_GROUPS = 8  # where there are four times as many: an interval over fewer documents says little
ROW_GROUP_DOCUMENTS = 1024
WARN_DROPPED_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    """What is dropped from a corpus and what is held out of it."""

    heldout_fraction: float = 0.05
    """Share of the documents (0 to 0.5) held out for evaluation, chosen by hash."""
    near_duplicate_threshold: float | None = 0.8
    """Jaccard similarity over 5-word runs (0.5 to 1) from which two documents are near duplicates; None keeps them."""
    max_document_bytes: int = 1_000_000
    """Longer documents are cut at blank lines into parts of at most this many bytes; nothing is lost."""
    skip_rules: tuple[str, ...] = ()
    """Quality rules not applied, by name."""
    seed: int = 0
    """Changes which documents are held out."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout_fraction <= 0.5:
            raise UserError(f"heldout_fraction={self.heldout_fraction} is not above 0 and at most 0.5. Use 0.05, or 0.1 for little text.")
        threshold = self.near_duplicate_threshold
        if threshold is not None and not 0.5 <= threshold <= 1:
            raise UserError(f"near_duplicate_threshold={threshold} is not between 0.5 and 1. Use 0.8, or None to keep near duplicates.")
        if self.max_document_bytes < MIN_PART_BYTES:
            raise UserError(f"max_document_bytes={self.max_document_bytes} is under {MIN_PART_BYTES}. Use {MIN_PART_BYTES} or more.")
        for name in self.skip_rules:
            if name not in quality.RULES:
                raise UserError(f"skip_rules names {name}, which is none of {', '.join(quality.RULES)}.{nearest(name, quality.RULES)}")


class Funnel:
    """The indices of the documents still in, and the account of those dropped."""

    def __init__(self, texts: list[str], sources: list[str]):
        self.texts, self.sources = texts, sources
        self.left = np.arange(len(texts))
        self.rules: list[dict[str, Any]] = []

    def gate(self, rule: str, reasons: dict[int, str]) -> None:
        """Drop the documents in `reasons` and record the rule with its first examples."""
        self.left = np.array([index for index in self.left.tolist() if index not in reasons], dtype=np.int64)
        examples = [
            {"source": self.sources[index], "excerpt": excerpt(self.texts[index]), "reason": reasons[index]}
            for index in sorted(reasons)[:NUM_EXAMPLES]
        ]
        dropped_bytes = sum(len(self.texts[index].encode("utf-8")) for index in reasons)
        self.rules.append(
            {"rule": rule, "kept": len(self.left), "dropped": len(reasons), "bytes_dropped": dropped_bytes, "examples": examples}
        )


def curate(documents: pa.Table | Intake, out: Path, config: CurateConfig | None = None) -> dict[str, Any]:
    """Write the corpus folder `out` and return its manifest.

    The manifest has documents_in, documents_train, documents_heldout, bytes_*, rules (kept, dropped, bytes_dropped, examples each),
    rejected_files, malformed, sources, composition, licences, warnings, sha256 of the files, and the config; it is a function of the text
    and the config alone. Raises UserError when `out` holds files already or when fewer than two documents are left; on any
    error, a full disk too, nothing is left behind.
    """
    config = config or CurateConfig()
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already. Pass --out with a new name, or remove it.")
    table = conform(documents.table if isinstance(documents, Intake) else documents)
    documents_in, bytes_in = len(table), _num_bytes(table)
    table, num_cut = cut_long(table, config.max_document_bytes)
    funnel = run_gates(table, config)
    kept = table.take(pa.array(funnel.left))
    ids = [document_id(text) for text in kept["text"].to_pylist()]
    kept = kept.append_column("doc_id", pa.array(ids, type=pa.string()))
    heldout = split_heldout(ids, kept["group"].to_pylist(), config)
    parts = {"train": kept.filter(pa.array(~heldout)), "heldout": kept.filter(pa.array(heldout))}
    manifest = {
        "documents_in": documents_in,
        "bytes_in": bytes_in,
        "documents_cut": num_cut,
        "documents_after_cutting": len(table),
        **{f"documents_{split}": len(part) for split, part in parts.items()},
        **{f"bytes_{split}": _num_bytes(part) for split, part in parts.items()},
        "rules": funnel.rules,
        "warnings": _warnings(funnel.rules, len(table)),
        "composition": _amounts(kept, "kind"),
        "composition_heldout": _amounts(parts["heldout"], "kind"),
        "licences": _amounts(kept, "licence"),
        **_account_of_intake(documents),
        "config": to_dict(config),
    }
    _write(out, parts, manifest)
    return manifest


def run_gates(table: pa.Table, config: CurateConfig) -> Funnel:
    """Return the funnel after exact duplicates, each quality rule and near duplicates.

    Of duplicates the longest is kept, then the one whose source, then whose text comes first in the alphabet.
    Raises UserError when fewer than two documents are left.
    """
    texts, kinds, sources = (table[name].to_pylist() for name in ("text", "kind", "source"))
    preferences = [(-len(text), source, text) for text, source in zip(texts, sources)]
    funnel = Funnel(texts, sources)

    def kept_instead(keepers: np.ndarray) -> dict[int, str]:
        left = funnel.left
        return {int(left[i]): f"the same as {sources[left[keeper]]}" for i, keeper in enumerate(keepers) if i != keeper}

    funnel.gate("exact_duplicate", kept_instead(dedup.exact_duplicates(texts, preferences)))
    skip = frozenset(config.skip_rules)
    verdicts: dict[str, dict[int, str]] = {name: {} for name in quality.RULES if name not in skip}
    with Progress(len(funnel.left), "quality rules", "document") as progress:
        for index in funnel.left.tolist():
            if verdict := quality.judge(texts[index], kinds[index], skip):
                verdicts[verdict[0]][index] = verdict[1]
            progress.update(1)
    for name, reasons in verdicts.items():
        funnel.gate(name, reasons)
    if config.near_duplicate_threshold is not None:
        left = funnel.left.tolist()
        keepers = dedup.near_duplicates(
            [spread_residues(texts[index], kinds[index]) for index in left],
            [preferences[index] for index in left],
            config.near_duplicate_threshold,
        )
        funnel.gate("near_duplicate", {index: f"nearly {why}" for index, why in kept_instead(keepers).items()})
    if len(funnel.left) < 2:
        raise UserError(_too_little(funnel, len(texts)))
    return funnel


def spread_residues(text: str, kind: str) -> str:
    """Return a protein with a space between residues, so that near duplicates are found by its runs of five; other text as it is.

    Nucleic acids have too few different runs of five to tell long ones apart: of them only equal ones are found.
    """
    return " ".join(text) if kind == "protein" else text


def cut_long(table: pa.Table, max_document_bytes: int) -> tuple[pa.Table, int]:
    """Return the table with long documents cut at blank lines (else at line ends), and how many were cut.

    The limit is `max_document_bytes`; in a table of fewer than 200 documents it is at most a 200th of all text (never under
    4 KiB), so that a corpus that is one book has parts to hold out. The parts joined give back the document; part k of a source
    is "source#k".
    """
    limit = max_document_bytes
    if len(table) < FEW_DOCUMENTS:
        limit = max(MIN_PART_BYTES, min(limit, _num_bytes(table) // FEW_DOCUMENTS))
    lengths = [len(text.encode("utf-8")) for text in table["text"].to_pylist()]
    long = {index for index, length in enumerate(lengths) if length > limit}
    if not long:
        return table, 0
    builder = TableBuilder()
    for index, row in enumerate(table.to_pylist()):
        parts = cut_text(row["text"], limit) if index in long else [row["text"]]
        for number, part in enumerate(parts, 1):
            source = f"{row['source']}#{number}" if len(parts) > 1 else row["source"]
            builder.add(Document(**{**row, "text": part, "source": source}))
    return builder.finish(), len(long)


def cut_text(text: str, limit: int) -> list[str]:
    """Return pieces of at most `limit` bytes that joined give `text`, cut behind a blank line, a line, a space, or anywhere."""
    data = text.encode("utf-8")
    pieces, start = [], 0
    while len(data) - start > limit:
        middle, end = start + limit // 2, start + limit
        found = ((data.rfind(mark, middle, end), len(mark)) for mark in (b"\n\n", b"\n", b" "))
        at = next((place + length for place, length in found if place >= 0), end)
        while data[at] & 0xC0 == 0x80:  # never inside a character
            at -= 1
        pieces.append(data[start:at].decode("utf-8"))
        start = at
    return [*pieces, data[start:].decode("utf-8")] if start < len(data) else pieces


def split_heldout(ids: list[str], groups: list[str | None], config: CurateConfig) -> np.ndarray:
    """Return which documents are held out: bool, shape (documents,).

    A document is held out when the hash of the seed and its group (its own id where it has none) lies below the fraction, so
    adding documents moves none from one side to the other. Where that gives fewer than 8 groups, or a quarter of them if that is
    less, those of the smallest hashes make up the number. Raises UserError when there is one group only.
    """
    hashes = np.array([_unit_hash(f"{config.seed}:{group or doc_id}") for group, doc_id in zip(groups, ids)])
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise UserError("all text is one document, so none can be held out. Add more text, or save it as several files.")
    at_least = max(1, min(MIN_HELDOUT_GROUPS, len(distinct) // 4))
    num_heldout = max(at_least, int(np.searchsorted(distinct, config.heldout_fraction)))
    return hashes <= distinct[min(num_heldout, len(distinct) - 1) - 1]


def _unit_hash(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:7], "big") / 2**56


def _num_bytes(table: pa.Table) -> int:
    return pc.sum(pc.binary_length(table["text"])).as_py() or 0


def _amounts(table: pa.Table, column: str) -> dict[str, dict[str, int]]:
    """Return {value of the column: {documents, bytes}}, in alphabetical order; null is "not stated"."""
    result: dict[str, dict[str, int]] = {}
    for value, size in zip(table[column].to_pylist(), pc.binary_length(table["text"]).to_pylist()):
        entry = result.setdefault(value or "not stated", {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += size
    return dict(sorted(result.items()))


def _account_of_intake(documents: pa.Table | Intake) -> dict[str, Any]:
    if not isinstance(documents, Intake):
        return {"rejected_files": [], "malformed": [], "sources": [], "intake": None}
    return {
        "rejected_files": [dataclasses.asdict(reject) for reject in documents.rejected],
        "malformed": [dataclasses.asdict(bad) for bad in documents.malformed],
        "sources": documents.sources,
        "intake": {**documents.counts, "examples": documents.examples},
    }


def _warnings(rules: list[dict[str, Any]], num_documents: int) -> list[str]:
    return [
        f"{rule['rule']} dropped {rule['dropped']} of {num_documents} documents; look at its examples"
        + (f", and pass --skip-rules {rule['rule']} if it is wrong for this text." if rule["rule"] in quality.RULES else ".")
        for rule in rules
        if rule["dropped"] > WARN_DROPPED_SHARE * num_documents
    ]


def _too_little(funnel: Funnel, num_documents: int) -> str:
    dropped = ", ".join(f"{rule['rule']} {rule['dropped']}" for rule in funnel.rules if rule["dropped"])
    example = next((f" ({e['source']}: {e['reason']})" for rule in funnel.rules for e in rule["examples"]), "")
    return f"{len(funnel.left)} of {num_documents} documents are left after curation, and at least 2 are needed, one to hold out. " + (
        f"Dropped: {dropped}{example}. Add text, or pass --skip-rules." if dropped else "Add more text."
    )


def _write(out: Path, parts: dict[str, pa.Table], manifest: dict[str, Any]) -> None:
    try:
        with publish_dir(out) as folder:
            manifest["sha256"] = {}
            for split, part in parts.items():
                path = folder / f"{split}.parquet"
                pq.write_table(part, path, row_group_size=ROW_GROUP_DOCUMENTS, compression="zstd")
                manifest["sha256"][path.name] = file_sha256(path)
            save_json(folder / "manifest.json", manifest)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        needed = sum(part.nbytes for part in parts.values()) >> 20
        raise UserError(
            f"the disk of {out} is full; the corpus needs up to {needed + 1} MiB. Nothing was left behind; free some space."
        ) from None
