"""A tokenizer as GGUF holds it: tokens by id, and merges with the name of the cut before them, or scores (sentencepiece)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from plinth.config import UserError
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import SPLIT_PATTERN

# Kinds of tokens. Source: enum llama_token_type of llama.cpp.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BLANK = "\u2581"  # sentencepiece's space

_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# A pattern as tokenizer.json spells it → the name of llama.cpp's code that cuts the same way.
CUTS = {
    SPLIT_PATTERN: "qwen35",
    _CLITICS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
    _CLITICS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    _CLITICS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
WHOLE = ("llama-bpe",)  # of these, llama.cpp takes a piece that is a token as it is, without merging


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
    model: str = "gpt2"
    """`tokenizer.ggml.model`: gpt2 for byte-level BPE, llama for BPE converted from sentencepiece"""
    scores: list[float] = field(default_factory=list)
    """of sentencepiece's tokens, the higher the sooner merged"""
    blank_first: bool = False
    """whether a text gets a blank before it (sentencepiece)"""
    begins: bool = False
    """whether a text alone begins with the token bos"""
    notes: tuple[str, ...] = ()
    """what the file cannot hold and a reader should know"""


def gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GgufVocabulary:
    """Return the tokenizer for a model of `vocab_size` entries; ids that no token has are filled with unused ones.

    Raises UserError for a tokenizer that llama.cpp would cut, normalise or merge otherwise.
    """
    backend = json.loads(tokenizer.backend_json())
    _check_added(tokenizer)
    pieces = _is_sentencepiece(backend)
    cut, notes = ("default", ()) if pieces else (_cut(backend), _check_parts(backend))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, the model vocab_size={vocab_size}. Export them as trained.")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, i in backend["model"]["vocab"].items():
        tokens[i], kinds[i] = token, BYTE if pieces and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL
    for added in backend["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
    common = (tokens, kinds, merges, cut, _special(tokenizer), tokenizer.chat_template())
    if not pieces:
        return GgufVocabulary(*common, begins=bool(tokenizer.prefix_ids), notes=notes)
    unknown = backend["model"].get("unk_token")
    if unknown in tokens:
        kinds[tokens.index(unknown)] = UNKNOWN
    blank = any(part.get("type") == "Prepend" or part.get("prepend_scheme") in ("always", "first") for part in _parts(backend))
    scores = _scores(tokens, kinds, backend["model"]["merges"])
    return GgufVocabulary(*common, model="llama", scores=scores, blank_first=blank, begins=bool(tokenizer.prefix_ids))


def _parts(backend: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of the normaliser and of the cut before merging, sequences taken apart."""
    found = []
    for whole, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = backend.get(whole) or {}
        found += part.get(inner, [part] if part else [])
    return found


def _is_sentencepiece(backend: dict[str, Any]) -> bool:
    """Return whether it is BPE with byte fallback whose blanks are U+2581, as Llama 2, Mistral and Gemma have it."""
    if backend["model"].get("type") != "BPE" or not backend["model"].get("byte_fallback"):
        return False
    parts = _parts(backend)
    known = all(part["type"] in ("Prepend", "Metaspace") or (part["type"] == "Replace" and part.get("content") == BLANK) for part in parts)
    if not known or not any(BLANK in (part.get("content"), part.get("replacement")) for part in parts):
        raise UserError(
            f"the tokenizer prepares texts by {', '.join(part['type'] for part in parts) or 'nothing'}, which GGUF's sentencepiece "
            "does not. Export with --format hf."
        )
    return True


def _scores(tokens: list[str], kinds: list[int], merges: list[Any]) -> list[float]:
    """Return sentencepiece's scores: a token that an earlier merge makes has a higher one; tokens that none makes come last."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(left + right, i)
    last = len(merges)
    return [0.0 if kind != NORMAL else -float(rank.get(token, last + i)) for i, (token, kind) in enumerate(zip(tokens, kinds))]


def _check_added(tokenizer: Tokenizer) -> None:
    """Raise UserError for a tokenizer that puts more around a text than its token bos in front."""
    special = tokenizer.special_ids_around()
    bos = _special(tokenizer).get("bos")
    if special not in ([], [bos]) or special != tokenizer.prefix_ids:
        raise UserError(f"the tokenizer puts the tokens {special} around a text, which GGUF cannot hold. Export with --format hf.")


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids that readers look for; a tokenizer of others names its ends in tokenizer_config.json."""

    def named(name: str) -> int | None:
        token = tokenizer.named_tokens.get(name)
        return None if token is None else tokenizer.special_id(token)

    unknown = tokenizer.named_tokens.get("unk_token")
    ids = {
        "bos": tokenizer.start_id if tokenizer.start_id is not None else named("bos_token"),
        "eos": tokenizer.end_of_text_id,
        "eot": tokenizer.end_id if tokenizer.end_id is not None else named("eos_token"),
        "pad": tokenizer.pad_id,
        "unk": None if unknown is None or tokenizer.is_byte_level else tokenizer.token_id(unknown),
    }
    return {name: i for name, i in ids.items() if i is not None}


def _cut(backend: dict[str, Any]) -> str:
    """Return llama.cpp's name of the pattern that cuts a text before merging."""
    if _parts(backend) and (name := _plain_cut([p for p in _parts(backend) if p["type"] != "NFC"])):
        return name
    first, *rest = (backend.get("pre_tokenizer") or {}).get("pretokenizers") or [backend.get("pre_tokenizer") or {}]
    pattern = (first.get("pattern") or {}).get("Regex") if first.get("type") == "Split" else None
    is_plain = all(part["type"] == "ByteLevel" and not part["use_regex"] and not part["add_prefix_space"] for part in rest)
    if pattern in CUTS and rest and is_plain and first["behavior"] == "Isolated" and not first["invert"]:
        return CUTS[pattern]
    found: str = pattern or first.get("type") or "none"
    raise UserError(
        f"the tokenizer cuts texts by {found!r}, which llama.cpp has no name for: it would give other tokens. "
        "Export with --format hf, or train with a tokenizer of this version of `plinth tokenizer train`."
    )


def _plain_cut(parts: list[dict[str, Any]]) -> str | None:
    """Return the name where byte-level BPE cuts by its own pattern (GPT-2), behind single digits or not (SmolLM)."""
    *before, last = parts
    if last["type"] != "ByteLevel" or not last["use_regex"] or last["add_prefix_space"]:
        return None
    if before and [(part["type"], part.get("individual_digits")) for part in before] != [("Digits", True)]:
        return None
    return "smollm" if before else "gpt-2"


def _check_parts(backend: dict[str, Any]) -> tuple[str, ...]:
    """Raise UserError for a part that GGUF's "gpt2" tokenizer lacks; return what differs harmlessly."""
    model, normalizer = backend["model"], backend.get("normalizer")
    whole = bool(model.get("ignore_merges"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or whole != (_cut(backend) in WHOLE):
        raise UserError("the tokenizer is not plain byte-level BPE; GGUF export knows no other. Export with --format hf.")
    if normalizer is None:
        return ()
    if normalizer["type"] != "NFC":
        raise UserError(f"the tokenizer's normalizer={normalizer['type']!r} has no place in GGUF. Export with --format hf.")
    return ("llama.cpp does not bring texts into Unicode's normal form C first, as this tokenizer does.",)
