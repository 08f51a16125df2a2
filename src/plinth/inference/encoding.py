"""Texts through an encoder: hidden words filled in, and vectors of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.features import Row, pad_rows
from plinth.models.encoder import EncoderModel
from plinth.models.hub import load_model
from plinth.models.transformer import Transformer
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.encoder_tokens import EncoderTokens, encode_with_masks, encoder_tokens, special_names

Pool = Literal["mean", "cls"]
ROWS_A_CALL = 32


@dataclass(frozen=True)
class TextEncoder:
    """An encoder with its tokenizer."""

    model: EncoderModel
    tokenizer: Tokenizer
    tokens: EncoderTokens

    @property
    def longest(self) -> int:
        return self.model.config.max_seq_len

    @classmethod
    def load(cls, path: Path) -> TextEncoder:
        """Open a run or model folder. Raises UserError when it holds no encoder."""
        folder = find_model(path)
        model = load_model(folder)
        if not isinstance(model, EncoderModel):
            raise UserError(f"{path} holds no encoder. Name a run of `plinth pretrain --family bert`, or of `plinth finetune`.")
        tokenizer = Tokenizer.load(folder)
        return cls(model.eval(), tokenizer, encoder_tokens(tokenizer))

    @classmethod
    def load_filler(cls, path: Path) -> TextEncoder:
        """Open a run whose model fills masks; of an ELECTRA run its generator. Raises UserError when there is none."""
        path = Path(path)
        found = cls.load(path / "generator" if (path / "generator" / "config.json").exists() else path)
        if found.model.config.head != "mlm":
            raise UserError(
                f"{path} fills no masks: its head is {found.model.config.head}. Name a run of --family bert, or an ELECTRA run."
            )
        return found


@torch.inference_mode()
def run_rows(encoder: TextEncoder, rows: Sequence[Row], use: Callable[[torch.Tensor, list[Row]], Sequence]) -> list:
    """Return `use(hidden states (B, T, D), rows)` of each row, in their order; like lengths go through the model together."""
    results: list = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for start in range(0, len(order), ROWS_A_CALL):
        part = order[start : start + ROWS_A_CALL]
        chosen = [rows[i] for i in part]
        tokens, mask, segments = pad_rows(chosen, encoder.tokens.pad, encoder.longest)
        hidden = encoder.model(tokens, None if mask.all() else mask, segments)
        for i, result in zip(part, use(hidden, chosen)):
            results[i] = result
    return results


@dataclass(frozen=True)
class Guess:
    """A token for a hidden place."""

    text: str
    token_id: int
    probability: float


@dataclass(frozen=True)
class Filled:
    """A text with its hidden places filled by the likeliest tokens, each place on its own."""

    text: str
    places: list[list[Guess]]
    """of each hidden place, the likeliest tokens first"""


def fill(encoder: TextEncoder, texts: Sequence[str], top: int = 5) -> list[Filled]:
    """Fill the places that the mask token's name stands for. Raises UserError for a text without one, or a longer one than the model."""
    rows = []
    for number, text in enumerate(texts):
        ids = encode_with_masks(encoder.tokenizer, text)
        if encoder.tokens.mask not in ids:
            name = special_names(encoder.tokenizer)["mask_token"]
            raise UserError(f"text {number + 1} ({text[:40]!r}) hides nothing. Write {name} where a word is to be filled in.")
        row = encoder.tokens.single(ids)
        if len(row) > encoder.longest:
            raise UserError(f"text {number + 1} has {len(row)} tokens, more than max_seq_len={encoder.longest}. Shorten it.")
        rows.append(Row(number, row, [0] * len(row)))

    def use(hidden: torch.Tensor, chosen: list[Row]) -> list[Filled]:
        return [_filled(encoder, row, hidden[i], top) for i, row in enumerate(chosen)]

    return run_rows(encoder, rows, use)


def _filled(encoder: TextEncoder, row: Row, hidden_TD: torch.Tensor, top: int) -> Filled:
    ids = torch.tensor(row.tokens)
    holes = torch.tensor([i for i, token_id in enumerate(row.tokens) if token_id == encoder.tokens.mask])
    scores_NV = encoder.model.scores(hidden_TD[holes]).float()
    size = encoder.tokenizer.vocab_size
    scores_NV[:, size:] = -torch.inf
    scores_NV[:, [i for i in encoder.tokenizer.special_ids if i < size]] = -torch.inf  # a special token is no word
    best = scores_NV.softmax(-1).topk(min(top, size), -1)
    places = [
        [Guess(encoder.tokenizer.decode([i]), i, p) for p, i in zip(probabilities, found)]
        for probabilities, found in zip(best.values.tolist(), best.indices.tolist())
    ]
    filled = ids.index_copy(0, holes, best.indices[:, 0]).tolist()
    return Filled(encoder.tokenizer.decode(filled[1:-1]), places)


def embed_texts(path: Path, texts: Sequence[str], pool: Pool = "mean") -> np.ndarray:
    """Return a vector for each text, fp32 (texts, D), by the model of a run: an encoder, or a decoder with pool="mean".

    mean: of the last hidden states of the text's tokens, the marks at its ends left out. cls: the first position's. A text that is
    longer than the model goes through in pieces, and its vector is the mean over all its tokens; with cls it is refused.
    """
    folder = find_model(path)
    model = load_model(folder)
    if isinstance(model, EncoderModel):
        return embed(TextEncoder.load(path), texts, pool)
    if not isinstance(model, Transformer):
        raise UserError(f"{path} holds neither an encoder nor a decoder. Name a run of one.")
    if pool != "mean":
        raise UserError(f"pool={pool} needs an encoder: a decoder's first position has seen nothing. Use mean.")
    return np.stack(list(_decoder_vectors(model, Tokenizer.load(folder), texts)))


def embed(encoder: TextEncoder, texts: Sequence[str], pool: Pool = "mean") -> np.ndarray:
    """Return what `embed_texts` does, for an encoder that is open already."""
    rows: list[Row] = []
    for number, ids in enumerate(encoder.tokenizer.encode_batch(texts)):
        pieces = _pieces(ids, encoder.longest - 2)
        if pool == "cls" and len(pieces) > 1:
            raise UserError(
                f"text {number + 1} has {len(ids) + 2} tokens, more than max_seq_len={encoder.longest}. Shorten it, or use mean."
            )
        rows += [Row(number, encoder.tokens.single(piece), [0] * (len(piece) + 2)) for piece in pieces]

    def use(hidden: torch.Tensor, chosen: list[Row]) -> list[torch.Tensor]:
        if pool == "cls":
            return list(hidden[:, 0].float())
        return [states[_inner(row)].float().sum(0) for states, row in zip(hidden, chosen)]

    sums = torch.zeros(len(texts), encoder.model.config.hidden_size)
    counts = torch.zeros(len(texts), 1)
    for row, vector in zip(rows, run_rows(encoder, rows, use)):
        sums[row.example] += vector
        counts[row.example] += 1 if pool == "cls" else len(row.tokens[_inner(row)])
    return (sums / counts).numpy()


def _inner(row: Row) -> slice:
    """Return where the row's text stands; of an empty text, the two marks."""
    return slice(1, len(row.tokens) - 1) if len(row.tokens) > 2 else slice(0, 2)


def _pieces(ids: list[int], longest: int) -> list[list[int]]:
    """Cut ids into pieces of at most `longest`; an empty text is one empty piece."""
    return [ids[i : i + longest] for i in range(0, max(1, len(ids)), longest)]


@torch.inference_mode()
def _decoder_vectors(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Give the mean of the hidden states of each text's tokens behind <|endoftext|>."""
    begin = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    for ids in tokenizer.encode_batch(texts):
        pieces = _pieces(ids, model.config.max_seq_len - len(begin))
        states = [model(torch.tensor([begin + piece]))[0, len(begin) if piece else 0 :] for piece in pieces if begin or piece]
        yield torch.cat(states).float().mean(0).numpy()
