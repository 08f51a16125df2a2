"""The chain of a build from the served model back to the source files, each link with its hash, checked where it can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plinth.evaluation.build_files import NAMES, STAGES, BuildFiles, number, rows, table
from plinth.evaluation.formats import size
from plinth.run import file_sha256, tree_sha256

FOLDERS = ("facts", "shards", "tokenizer", "corpus")


def lineage(files: BuildFiles, stages: Mapping[str, Mapping[str, Any]], corpus: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Links from the served model down to the sources.

    Each link is {label, path, sha256 or None, detail, recorded: [{by, file, sha256, same}]}: `sha256` is computed now, `recorded` is
    what later stages wrote down when they read it, and `same` whether the two agree (None where nothing is left to compare).
    """
    shards = files.json("shards/manifest.json", "token shards", quiet=True)
    recorded = _recorded_parents(stages)
    _add_recorded(recorded, "corpus", "token shards", "corpus", shards.get("corpus_sha256"))
    _add_recorded(recorded, "tokenizer", "token shards", "tokenizer.json", shards.get("tokenizer_sha256"))
    for name in STAGES:
        protocol = table(files.json(f"evals/{name}.json", "", quiet=True).get("protocol"))
        _add_recorded(recorded, name, f"evaluation of {NAMES[name]}", name, protocol.get("model_sha256"))
    chain = []
    for name in [stage for stage in reversed(STAGES) if stages[stage]["state"] != "not run"]:
        state = stages[name]["state"]
        chain.append(_link(files.path, f"{NAMES[name]} model", f"{name}/model", "" if state == "done" else state, recorded, name))
    facts = files.json("facts/manifest.json", "instruction data", quiet=True)
    if (files.path / "facts").is_dir():
        chain.append(_link(files.path, "Instruction data", "facts", _counts(facts), recorded))
    documents = corpus.get("documents_train")
    chain += [
        _link(files.path, "Token shards", "shards", "", recorded),
        _link(files.path, "Tokenizer", "tokenizer", "", recorded),
        _link(files.path, "Corpus", "corpus", f"{documents:,} documents" if isinstance(documents, int) else "", recorded),
    ]
    if stages[_first(stages)]["state"] == "done":
        chain[0]["label"] += " (served)"
    return [*chain, *_others(stages), *_sources(corpus)]


def _first(stages: Mapping[str, Mapping[str, Any]]) -> str:
    return next((stage for stage in reversed(STAGES) if stages[stage]["state"] != "not run"), "pretrain")


def _recorded_parents(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Folder name -> what each run wrote down as the hash of that parent."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, stage in stages.items():
        for parent in map(table, rows(table(stage["provenance"]).get("parents"))):
            path = _parent_path(parent)
            if parent.get("sha256"):
                entry = {"by": NAMES[name], "file": path.name, "sha256": str(parent["sha256"])}
                found.setdefault(path.name, []).append(entry)
                if path.suffix:  # a file of a folder, such as facts/sft.jsonl
                    found.setdefault(path.parent.name, []).append(entry)
    return found


def _parent_path(parent: Mapping[str, Any]) -> Path:
    path = Path(str(parent.get("path", "")))
    return path.parent if path.name == "model" else path


def _others(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Links for what a stage read from outside of the build, such as a file of messages."""
    found = {}
    for name, stage in stages.items():
        for parent in map(table, rows(table(stage["provenance"]).get("parents"))):
            path = _parent_path(parent)
            if not {path.name, path.parent.name} & {*STAGES, *FOLDERS}:
                detail = f"read by {NAMES[name]}; the hash is the one recorded then"
                found[str(path)] = {
                    "label": "Other input",
                    "path": str(path),
                    "sha256": parent.get("sha256"),
                    "detail": detail,
                    "recorded": [],
                }
    return list(found.values())


def _add_recorded(recorded: dict[str, list[dict[str, str]]], folder: str, by: str, file: str, digest: Any) -> None:
    if digest:
        recorded.setdefault(folder, []).append({"by": by, "file": file, "sha256": str(digest)})


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
    """How much instruction data there is, in words: '4,800 sft lines, 1,200 pairs, 2,400 questions'."""
    totals = {key: _total(manifest.get(key)) for key in ("sft_lines", "pairs", "questions")}
    return ", ".join(f"{total:,} {key.replace('_', ' ')}" for key, total in totals.items() if total)


def _total(value: Any) -> int:
    return sum(map(_total, value.values())) if isinstance(value, dict) else value if type(value) is int else 0


def _sources(corpus: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One link for each path that was read, with the hash over its documents, as the corpus manifest has them."""
    found = []
    for source in rows(corpus.get("sources")):
        entry = source if isinstance(source, dict) else {"path": str(source)}
        detail = f"{entry['documents']:,} documents, {size(number(entry.get('bytes')))}" if isinstance(entry.get("documents"), int) else ""
        path = str(entry.get("path", entry.get("source", "?")))
        found.append({"label": "Source", "path": path, "sha256": entry.get("sha256"), "detail": detail, "recorded": []})
    return found
