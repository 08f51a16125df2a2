"""What a tokenizer does to text, for people to see: its first merges and a passage cut into tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plinth.config import UserError, read_json
from plinth.evaluation.build_files import BuildFiles, number, rows, table
from plinth.tokenizer.encode import Tokenizer, byte_alphabet

CODE = 'def copy(src, dst, *, follow_symlinks=True):\n    """Return the file\'s destination: 1234 naïve cafés."""'
PASSAGE_CHARACTERS = 240


def describe_tokenizer(files: BuildFiles) -> dict[str, Any]:
    """Vocabulary size, bytes a token, the first and last merges, and two passages as lists of tokens.

    Returns {} after saying why when the build has no readable tokenizer. Bytes a token come from the shards' manifest, so they
    count each document's end as a token.
    """
    folder = files.path / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        files.say("tokenizer", "tokenizer/tokenizer.json is not there.")
        return {}
    try:
        tokenizer = Tokenizer.load(folder)
    except (UserError, OSError) as error:
        files.say("tokenizer", str(error))
        return {}
    shards = files.json("shards/manifest.json", "token counts")
    ratios = {}
    for split in ("train", "heldout"):
        size, tokens = number(shards.get(f"bytes_{split}")), number(shards.get(f"tokens_{split}"))
        ratios[split] = size / tokens if size and tokens else None
    passages = [{"title": "A line of code", "tokens": segment(tokenizer, CODE)}]
    heldout = first_passage(files.path / "corpus" / "heldout.parquet")
    if heldout:
        passages.insert(0, {"title": f"Held-out text ({heldout[1]})", "tokens": segment(tokenizer, heldout[0])})
    merges = merge_list(folder)
    return {
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "bytes_per_token": ratios,
        "num_merges": len(merges),
        "first_merges": merges[:12],
        "last_merges": merges[-6:] if len(merges) > 18 else [],
        "passages": passages,
    }


def segment(tokenizer: Tokenizer, text: str) -> list[dict[str, Any]]:
    """The tokens of a text as [{id, text}]; bytes that are only part of a character are written as ⟨e2 80⟩."""
    return [{"id": int(token), "text": visible(tokenizer.token_bytes(token))} for token in tokenizer.encode(text)]


def visible(data: bytes) -> str:
    """Bytes as text in which a space is ·, a line end ⏎ and a tab ⇥."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{data.hex(' ')}⟩"
    shown = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"⟨{c.encode().hex(' ')}⟩" for c in shown)


def merge_list(folder: Path) -> list[list[str]]:
    """The merges of tokenizer.json in order, each as two readable halves; [] for a tokenizer without merges."""
    model = table(table(read_json(folder / "tokenizer.json")).get("model"))
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in rows(model.get("merges"))]
    byte_of = byte_alphabet()

    def readable(half: str) -> str:
        return visible(bytes(byte_of[c] for c in half) if all(c in byte_of for c in half) else half.encode())

    return [[readable(half) for half in pair] for pair in pairs if len(pair) == 2]


def first_passage(parquet: Path) -> tuple[str, str] | None:
    """The beginning of the first held-out document that has some length, and its source; None when there is none to read."""
    if not parquet.exists():
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(parquet).iter_batches(batch_size=64, columns=["text", "source"])
        documents = next(batches, None)
    except (pyarrow.ArrowException, OSError):
        return None
    for row in documents.to_pylist() if documents is not None else []:
        if row["text"] and len(row["text"].strip()) >= 40:
            return row["text"].strip()[:PASSAGE_CHARACTERS], str(row["source"])
    return None
