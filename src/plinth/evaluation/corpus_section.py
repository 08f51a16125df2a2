"""The data's part of a report: how many documents each gate let through, and what is left by kind and licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plinth.evaluation.build_files import number, rows, table

SHOWN_FILES = 20


def funnel(corpus: Mapping[str, Any]) -> dict[str, Any]:
    """Documents that were left after each gate, from the corpus manifest; {} without one.

    Returns {gates: [{label, documents, dropped, examples}], idle: labels of rules that dropped nothing, splits, rejected, malformed,
    parsed, warnings}; the gates begin with the documents read.
    """
    if not corpus:
        return {}
    gates, idle = [], []
    for label, key in (("Documents read", "documents_in"), ("Long documents cut in parts", "documents_after_cutting")):
        if number(corpus.get(key)) is not None and (key == "documents_in" or corpus.get("documents_cut")):
            gates.append({"label": label, "documents": number(corpus[key]), "dropped": None, "examples": []})
    for rule in map(table, rows(corpus.get("rules"))):
        label = str(rule.get("rule", "?")).replace("_", " ")
        examples = [_example(table(example)) for example in rows(rule.get("examples"))][:5]
        if number(rule.get("dropped")) == 0:
            idle.append(label)
        else:
            gates.append(
                {"label": label, "documents": number(rule.get("kept")), "dropped": number(rule.get("dropped")), "examples": examples}
            )
    splits = [
        {"label": label, "documents": number(corpus.get(f"documents_{split}")), "bytes": number(corpus.get(f"bytes_{split}"))}
        for split, label in (("train", "Training"), ("heldout", "Held out, never trained on"))
    ]
    rejected = [
        {"path": str(table(entry).get("path", "?")), "reason": str(table(entry).get("reason", entry))}
        for entry in rows(corpus.get("rejected_files"))
    ]
    return {
        "gates": gates,
        "idle": idle,
        "splits": splits,
        "rejected": rejected[:SHOWN_FILES],
        "num_rejected": len(rejected),
        "malformed": [_malformed(table(entry)) for entry in rows(corpus.get("malformed"))][:SHOWN_FILES],
        "parsed": [_example(table(entry)) for entry in rows(table(corpus.get("intake")).get("examples"))][:3],
        "warnings": [str(warning) for warning in rows(corpus.get("warnings"))],
    }


def _example(entry: Mapping[str, Any]) -> dict[str, str]:
    return {
        "source": str(entry.get("source") or "source unknown"),
        "reason": str(entry.get("reason") or ""),
        "excerpt": str(entry.get("excerpt") or "")[:600],
    }


def _malformed(entry: Mapping[str, Any]) -> dict[str, Any]:
    first = [str(line) for line in rows(entry.get("first"))]
    return {"path": str(entry.get("path", "?")), "count": number(entry.get("count")), "first": first}


def composition(corpus: Mapping[str, Any], shards: Mapping[str, Any]) -> dict[str, Any]:
    """Shares by kind (documents, bytes) and by licence, and the token counts of the shards; {} when none of them is known."""
    kinds, licences = _shares(table(corpus.get("composition"))), _shares(table(corpus.get("licences")))
    tokens = {split: number(shards.get(f"tokens_{split}")) for split in ("train", "heldout")}
    return {"kinds": kinds, "licences": licences, "tokens": tokens} if kinds or licences or any(tokens.values()) else {}


def _shares(amounts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries {name, documents, bytes, share}, the largest share (of bytes, else of documents) first."""
    entries = [{"name": str(name) or "not stated", **_amount(value)} for name, value in amounts.items()]
    unit = "bytes" if any(entry["bytes"] for entry in entries) else "documents"
    total = sum(entry[unit] or 0 for entry in entries)
    for entry in entries:
        entry["share"] = (entry[unit] or 0) / total if total else 0.0
    return sorted(entries, key=lambda entry: -entry["share"])


def _amount(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"documents": number(value.get("documents")), "bytes": number(value.get("bytes"))}
    return {"documents": number(value), "bytes": None}
