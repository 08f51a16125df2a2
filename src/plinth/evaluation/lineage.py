"""The chain of a build from the served model back to the source files, each link with its hash, checked where it can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plinth.evaluation.build_files import NAMES, STAGES, BuildFiles, rows, table
from plinth.run import file_sha256, tree_sha256


def lineage(files: BuildFiles, stages: Mapping[str, Mapping[str, Any]], corpus: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Links from the served model down to the sources.

    Each link is {label, path, sha256 or None, detail, recorded: [{by, sha256, same}]}: `sha256` is computed now, `recorded` is what
    later stages wrote down when they read it, and `same` whether the two agree (None where nothing is left to compare).
    """
    recorded = _recorded_parents(stages)
    chain = []
    for name in [stage for stage in reversed(STAGES) if stages[stage]["state"] != "not run"]:
        state = stages[name]["state"]
        chain.append(_link(files.path, f"{NAMES[name]} model", f"{name}/model", "" if state == "done" else state, recorded, name))
    facts = files.json("facts/manifest.json", "instruction data", quiet=True)
    if (files.path / "facts").is_dir():
        chain.append(_link(files.path, "Instruction data", "facts", _counts(facts), recorded))
    shards = files.json("shards/manifest.json", "token shards", quiet=True)
    for label, folder, detail in (
        ("Token shards", "shards", f"packed with tokenizer {str(shards['tokenizer_sha256'])[:12]}" if "tokenizer_sha256" in shards else ""),
        ("Tokenizer", "tokenizer", ""),
        ("Corpus", "corpus", f"{corpus['documents_train']:,} documents" if isinstance(corpus.get("documents_train"), int) else ""),
    ):
        chain.append(_link(files.path, label, folder, detail, recorded))
    if chain and stages[_first(stages)]["state"] == "done":
        chain[0]["label"] += " (served)"
    return [*chain, *_sources(corpus)]


def _first(stages: Mapping[str, Mapping[str, Any]]) -> str:
    return next((stage for stage in reversed(STAGES) if stages[stage]["state"] != "not run"), "pretrain")


def _recorded_parents(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Folder name -> what each run wrote down as the hash of that parent."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, stage in stages.items():
        for parent in map(table, rows(table(stage["provenance"]).get("parents"))):
            path = Path(str(parent.get("path", "")))
            if parent.get("sha256"):
                entry = {"by": NAMES[name], "file": path.name, "sha256": str(parent["sha256"])}
                found.setdefault(path.name, []).append(entry)
                if path.suffix:  # a file of a folder, such as facts/sft.jsonl
                    found.setdefault(path.parent.name, []).append(entry)
    return found


def _link(build: Path, label: str, folder: str, detail: str, recorded: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    path = build / folder
    there = path.is_dir() and any(path.iterdir())
    digest = tree_sha256(path) if there else None
    entries = []
    for entry in recorded.get(name or folder, []):
        member = path / entry["file"]
        now = digest
        if entry["file"] != (name or folder):
            now = file_sha256(member) if member.is_file() else None
        entries.append({**entry, "same": now == entry["sha256"] if now else None})
    detail = detail if there else "not there"
    return {"label": label, "path": folder, "sha256": digest, "detail": detail, "recorded": entries}


def _counts(manifest: Mapping[str, Any]) -> str:
    """The top-level counts of a manifest in words: 'facts 1000, questions 2400'."""
    return ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in manifest.items() if type(value) is int)[:200]


def _sources(corpus: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One link a source, as the corpus manifest names them, else one for all of its files."""
    config = table(corpus.get("config"))
    named = rows(corpus.get("sources")) or rows(config.get("paths")) or rows(config.get("sources"))
    found = []
    for source in named:
        entry = source if isinstance(source, dict) else {"path": str(source)}
        detail = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("path", "source", "sha256"))
        path = str(entry.get("path", entry.get("source", "?")))
        found.append({"label": "Source", "path": path, "sha256": entry.get("sha256"), "detail": detail, "recorded": []})
    return found
