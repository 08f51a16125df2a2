"""The special tokens of encoders: what begins a text, what ends a stretch of it, what stands for a hidden token, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import processors

from plinth.config import UserError
from plinth.tokenizer.encode import PAD, Tokenizer

NAMES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}


@dataclass(frozen=True)
class EncoderTokens:
    """Ids of a tokenizer's special tokens as encoders use them."""

    cls: int
    """first of every row"""
    sep: int
    """after a text, and after the second one of a pair"""
    mask: int | None
    """in the place of a hidden token; None where the tokenizer lacks it"""
    pad: int
    """behind a row that is shorter than others of its batch"""

    def single(self, ids: Sequence[int]) -> list[int]:
        """Return the row of one text: [CLS] text [SEP]."""
        return [self.cls, *ids, self.sep]

    def pair(self, first: Sequence[int], second: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the row of two texts, [CLS] first [SEP] second [SEP], and its segments: 0 up to the first [SEP], then 1."""
        row = [self.cls, *first, self.sep, *second, self.sep]
        return row, [0] * (len(first) + 2) + [1] * (len(second) + 1)


def encoder_tokens(tokenizer: Tokenizer) -> EncoderTokens:
    """Return a tokenizer's special tokens, as tokenizer_config.json names them, else under BERT's names.

    Raises UserError when it lacks the first three kinds: a tokenizer of a decoder does.
    """
    ids = {field: tokenizer.special_id(name) for field, name in special_names(tokenizer).items()}
    if ids["pad_token"] is None:
        ids["pad_token"] = tokenizer.pad_id
    missing = [NAMES[field] for field in ("cls_token", "sep_token", "pad_token") if ids[field] is None]
    if missing:
        raise UserError(f"the tokenizer lacks {', '.join(missing)}: it is none of an encoder. Name a model of --family bert or electra.")
    return EncoderTokens(ids["cls_token"], ids["sep_token"], ids["mask_token"], ids["pad_token"])


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Return how the tokenizer spells each of the four; tokenizer_config.json may hold a name or a table with its content."""
    names = {}
    for field, usual in NAMES.items():
        value = tokenizer.config.get(field) or usual
        names[field] = value["content"] if isinstance(value, dict) else value
    return names


def with_encoder_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with [CLS], [SEP], [MASK] and padding added where it lacks them; ids that were there stay as they are.

    Text gives the same ids as before, so shards that were packed without the new tokens still fit. A space before [MASK] belongs to
    it, as the space before a word belongs to the word. Other programs that read tokenizer.json put [CLS] and [SEP] by themselves.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_json())
    names = special_names(tokenizer)
    if tokenizer.special_id(names["pad_token"]) is None and tokenizer.pad_id is not None:
        names["pad_token"] = PAD
    added = [
        tokenizers.AddedToken(name, special=True, normalized=False, lstrip=field == "mask_token")
        for field, name in names.items()
        if tokenizer.special_id(name) is None
    ]
    backend.add_special_tokens(added)
    cls, sep = names["cls_token"], names["sep_token"]
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(name, backend.token_to_id(name)) for name in (cls, sep)],
    )
    config = {name: value for name, value in tokenizer.config.items() if name != "chat_template"}
    return Tokenizer(backend, config | names | {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]})


def encode_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which the mask token's name stands for hidden tokens. Raises UserError when there is no such token."""
    tokens, name = encoder_tokens(tokenizer), special_names(tokenizer)["mask_token"]
    if tokens.mask is None:
        raise UserError(f"the tokenizer lacks {name}. Name a model of --family bert, or an ELECTRA generator.")
    parts = text.split(name)
    ids: list[int] = []
    for i, part in enumerate(parts):
        ids += tokenizer.encode(part.rstrip(" ") if i < len(parts) - 1 else part)
        ids += [tokens.mask] if i < len(parts) - 1 else []
    return ids
