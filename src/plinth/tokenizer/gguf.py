"""A tokenizer as GGUF holds it: tokens by id, merges, and the name of the cut before merging, which llama.cpp must know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from plinth.config import UserError
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import SPLIT_PATTERN

# Kinds of tokens. Source: enum llama_token_type of llama.cpp.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# A pattern as tokenizer.json spells it → the name of llama.cpp's code that cuts the same way.
CUTS = {
    SPLIT_PATTERN: "qwen35",
    _CLITICS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
    _CLITICS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}


@dataclass(frozen=True)
class GgufVocabulary:
    """What GGUF's `tokenizer.*` fields hold."""

    tokens: list[str]
    """token by id, in the byte-level alphabet; special ones as they are spelled"""
    kinds: list[int]
    """llama.cpp's kind of each token"""
    merges: list[str]
    """pairs with a space between, best first"""
    cut: str
    """`tokenizer.ggml.pre`"""
    special: dict[str, int]
    """bos, eos, eot, padding → id, of those that there are"""
    chat_template: str | None
    """Jinja template of the chat"""
    notes: tuple[str, ...] = ()
    """what the file cannot hold and a reader should know"""


def gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GgufVocabulary:
    """Return the tokenizer for a model of `vocab_size` entries; ids that no token has are filled with unused ones.

    Raises UserError for a tokenizer that llama.cpp would cut, normalise or merge otherwise.
    """
    backend = json.loads(tokenizer.backend_json())
    cut = _cut(backend)
    notes = _check_parts(backend)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, the model vocab_size={vocab_size}. Export them as trained.")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, i in backend["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for added in backend["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
    return GgufVocabulary(tokens, kinds, merges, cut, _special(tokenizer), tokenizer.config.get("chat_template"), notes)


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids that readers look for; a tokenizer of others names its ends in tokenizer_config.json."""

    def named(field: str) -> int | None:
        value = tokenizer.config.get(field)
        name = value.get("content") if isinstance(value, dict) else value
        return tokenizer.special_id(name) if name else None

    ids = {
        "bos": tokenizer.end_of_text_id if tokenizer.end_of_text_id is not None else named("bos_token"),
        "eos": tokenizer.end_of_text_id if tokenizer.end_of_text_id is not None else named("eos_token"),
        "eot": tokenizer.end_id if tokenizer.end_id is not None else named("eos_token"),
        "pad": tokenizer.pad_id if tokenizer.pad_id is not None else named("pad_token"),
    }
    return {name: i for name, i in ids.items() if i is not None}


def _cut(backend: dict[str, Any]) -> str:
    """Return llama.cpp's name of the pattern that cuts a text before merging."""
    first, *rest = (backend.get("pre_tokenizer") or {}).get("pretokenizers") or [backend.get("pre_tokenizer") or {}]
    pattern = (first.get("pattern") or {}).get("Regex") if first.get("type") == "Split" else None
    is_plain = all(part["type"] == "ByteLevel" and not part["use_regex"] and not part["add_prefix_space"] for part in rest)
    if pattern in CUTS and rest and is_plain and first["behavior"] == "Isolated" and not first["invert"]:
        return CUTS[pattern]
    found = pattern or first.get("type") or "none"
    raise UserError(
        f"the tokenizer cuts texts by {found!r}, which llama.cpp has no name for: it would give other tokens. "
        "Export with --format hf, or train with a tokenizer of this version of `plinth tokenizer train`."
    )


def _check_parts(backend: dict[str, Any]) -> tuple[str, ...]:
    """Raise UserError for a part that GGUF's "gpt2" tokenizer lacks; return what differs harmlessly."""
    model, normalizer, after = backend["model"], backend.get("normalizer"), backend.get("post_processor")
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        raise UserError("the tokenizer is not plain byte-level BPE; GGUF export knows no other. Export with --format hf.")
    if after is not None and after["type"] != "ByteLevel":
        raise UserError(f"the tokenizer's post_processor={after['type']!r} adds tokens, which GGUF cannot hold. Export with --format hf.")
    if normalizer is None:
        return ()
    if normalizer["type"] != "NFC":
        raise UserError(f"the tokenizer's normalizer={normalizer['type']!r} has no place in GGUF. Export with --format hf.")
    return ("llama.cpp does not bring texts into Unicode's normal form C first, as this tokenizer does.",)
