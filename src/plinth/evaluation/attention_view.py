"""What the page of a model's attention shows: where it looks in a text, and what a longer context would cost it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plinth.config import UserError, read_json
from plinth.evaluation.attention_maps import AttentionMap, Question, attention_maps
from plinth.models.counts.families import COUNTED, count
from plinth.run import find_model

CACHE_BYTES = 2  # a number of the cache in bf16
CONTEXTS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class AttentionView:
    """All that the page shows."""

    model: str
    """what was asked for: a run or a folder"""
    model_type: str
    """as config.json names it"""
    num_params: int
    """parameters"""
    text: str
    """the text, the source, or the caption"""
    target: str | None
    """the target, given or written by the model, where there is one"""
    num_cut: int
    """tokens left out at the end, over max_tokens"""
    maps: tuple[AttentionMap, ...]
    """one or more"""
    costs: tuple[dict[str, Any], ...]
    """contexts with their tokens, pairs of positions that are weighed, and bytes of keys and values; none where they are not counted"""


def view_attention(source: Path, text: str, target: str | None = None, *, image: Path | None = None, max_tokens: int = 96) -> AttentionView:
    """Read a model and return where it looks in `text`, cut after `max_tokens` tokens.

    Raises UserError when the text has no tokens, when the model does not attend, and when a target or an image is given to a model that
    has no place for one, or lacks for one that needs it.
    """
    if max_tokens < 4:
        raise UserError(f"max_tokens={max_tokens} must be at least 4: two marks and two tokens.")
    folder = find_model(Path(source))
    found = attention_maps(folder, Question(text, target, image, max_tokens))
    values = read_json(folder / "config.json")
    costs = tuple(context_costs(values, max(len(each.columns) for each in found.maps)))
    return AttentionView(str(source), values["model_type"], found.num_params, text, found.target, found.num_cut, found.maps, costs)


def context_costs(values: dict[str, Any], here: int) -> list[dict[str, Any]]:
    """Return what contexts cost, that of the text and some longer ones: bytes of keys and values in bf16, and pairs that are weighed.

    Contexts beyond what the model was made for are marked. None where the architecture is not counted.
    """
    if values.get("model_type") not in COUNTED:
        return []
    ledger = count(values)
    rows = []
    for context in sorted({here, *CONTEXTS, *([ledger.max_seq_len] if ledger.max_seq_len else [])}):
        lengths = ledger.lengths(context)
        pairs = sum(
            group.layers * group.heads * group.scores(lengths[group.stream], lengths[group.keys or group.stream], causal=True)
            for group in ledger.attending
        )
        beyond = ledger.max_seq_len is not None and context > ledger.max_seq_len
        rows.append({"tokens": context, "kv_bytes": CACHE_BYTES * ledger.kv_numbers(context), "pairs": pairs, "beyond": beyond})
    return rows
