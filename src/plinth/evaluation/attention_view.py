"""What a model attends to in one text, or between a source and its target, and what a longer context would cost it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from plinth.config import UserError, read_json
from plinth.data.parallel import Marks
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.step_space import sample_sequences
from plinth.models.counts.families import COUNTED, count
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_decoder import EncoderDecoder
from plinth.models.hub import load_model
from plinth.models.recurrent_seq2seq import RecurrentSeq2Seq
from plinth.models.transformer import Transformer
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.encoder_tokens import encoder_tokens

TARGET_TOKENIZER = "target_tokenizer"  # folder in a model folder, where the target has a vocabulary of its own
CACHE_BYTES = 2  # a number of the cache in bf16
CONTEXTS = (1024, 4096, 16384, 65536)
TITLES = {
    "self": "self-attention: the text over itself",
    "encoder": "encoder: the source over itself",
    "decoder": "decoder: the target over what stands before",
    "cross": "cross-attention: the target over the source",
}


@dataclass(frozen=True)
class AttentionMap:
    """Weights of one kind of attention."""

    name: str
    """self, encoder, decoder, cross"""
    title: str
    """what looks at what"""
    rows: tuple[str, ...]
    """tokens that look; in cross-attention the token that is being written"""
    columns: tuple[str, ...]
    """tokens that are looked at"""
    weights_LHTS: np.ndarray
    """fp32 (layers, heads, rows, columns); each row sums to 1"""


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
    """the text, or the source"""
    target: str | None
    """the target, given or written by the model, where there is one"""
    num_cut: int
    """tokens left out at the end of the text, over max_tokens"""
    maps: tuple[AttentionMap, ...]
    """one or more"""
    costs: tuple[dict[str, Any], ...]
    """contexts with their tokens, pairs of positions that are weighed, and bytes of keys and values; none where they are not counted"""


def view_attention(source: Path, text: str, target: str | None = None, *, max_tokens: int = 96) -> AttentionView:
    """Read a model and return where it looks in `text`, cut after `max_tokens` tokens.

    Raises UserError when the text has no tokens, when the model does not attend, and when `target` is given to a model that has no place
    for one, or lacks for one that needs it.
    """
    if max_tokens < 2:
        raise UserError(f"max_tokens={max_tokens} must be at least 2.")
    folder = find_model(Path(source))
    model = load_model(folder).eval()
    limit = min(max_tokens, getattr(model.config, "max_seq_len", None) or max_tokens)
    maps, num_cut, target = _maps(model, folder, text, target, limit)
    values = read_json(folder / "config.json")
    return AttentionView(
        str(source),
        values["model_type"],
        sum(parameter.numel() for parameter in model.parameters()),
        text,
        target,
        num_cut,
        maps,
        tuple(context_costs(values, max(len(each.columns) for each in maps))),
    )


Found = tuple[tuple[AttentionMap, ...], int, str | None]


def _maps(model: nn.Module, folder: Path, text: str, target: str | None, limit: int) -> Found:
    """Return the maps, how many tokens were left out, and the target."""
    if isinstance(model, (Transformer, EncoderModel)):
        if target is not None:
            raise UserError("--target goes with an encoder-decoder; this model reads one text. Leave it out.")
        return _self_maps(model, Tokenizer.load(folder), text, limit)
    if isinstance(model, (EncoderDecoder, RecurrentSeq2Seq)):
        return _pair_maps(model, folder, text, target, limit)
    raise UserError(f"{folder} holds a {type(model).__name__}, which does not attend. Name a Transformer, or an LSTM with attention.")


def _self_maps(model: nn.Module, tokenizer: Tokenizer, text: str, limit: int) -> Found:
    """Return the self-attention of a decoder, or of an encoder with its marks around the text."""
    ids, marks = tokenizer.encode(text), 0
    if isinstance(model, EncoderModel):
        tokens, marks = encoder_tokens(tokenizer), 2
        row = tokens.single(ids[: limit - marks])
    else:
        row = (tokenizer.prefix_ids + ids)[:limit]
    if not ids:
        raise UserError("the text has no tokens. Pass --text with some words.")
    num_cut = max(0, len(ids) + (marks or len(tokenizer.prefix_ids)) - limit)
    labels = token_labels(tokenizer, row)
    weights = model.attention_weights(torch.tensor(row))
    return tuple(AttentionMap(name, TITLES[name], labels, labels, part.numpy()) for name, part in weights.items()), num_cut, None


def _pair_maps(model: nn.Module, folder: Path, text: str, target: str | None, limit: int) -> Found:
    """Return the attention of an encoder-decoder between a source and a target, which is its own greedy one where none is given."""
    tokenizer, own = Tokenizer.load(folder), folder / TARGET_TOKENIZER
    target_tokenizer = Tokenizer.load(own) if own.is_dir() else tokenizer
    config = model.config
    marks = Marks(config.pad_id, config.start_id, config.end_id) if isinstance(model, EncoderDecoder) else Marks.of(target_tokenizer)
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("the text has no tokens. Pass --text with some words.")
    source = [*ids[: limit - 1], marks.end_id]
    written = target_tokenizer.encode(target) if target is not None else _greedy(model, source, marks, limit - 1)
    num_cut = max(0, len(ids) - limit + 1) + max(0, len(written) - limit + 1)
    outputs = [*written[: limit - 1], marks.end_id]
    inputs = [marks.start_id, *outputs[:-1]]
    weights = model.attention_weights(torch.tensor(source), torch.tensor(inputs))
    if not weights:
        raise UserError(
            f"{folder} holds an encoder-decoder without attention (attention=none): all that it keeps of the source is one state."
        )
    sources, outs, ins = token_labels(tokenizer, source), token_labels(target_tokenizer, outputs), token_labels(target_tokenizer, inputs)
    sides = {"encoder": (sources, sources), "decoder": (ins, ins), "cross": (outs, sources)}
    maps = tuple(AttentionMap(name, TITLES[name], *sides[name], part.numpy()) for name, part in weights.items())
    return maps, num_cut, target_tokenizer.decode(written) if target is None else target


def _greedy(model: nn.Module, source: list[int], marks: Marks, max_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    (done,) = sample_sequences(model, [source], params, (marks.end_id,), start_id=marks.start_id, pad_id=marks.pad_id)
    return [token for token in done.tokens if token != marks.end_id]


def token_labels(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """Return how tokens are shown: a space as an open box, line ends as arrows, bytes that are no text in hexadecimal, marks by name."""
    labels = []
    for token_id in ids:
        data = tokenizer.token_bytes(token_id, skip_special=False)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = "⟨" + data.hex(" ") + "⟩"
        labels.append(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅")
    return tuple(labels)


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
