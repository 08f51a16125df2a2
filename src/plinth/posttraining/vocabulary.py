"""A language model with another tokenizer: what both vocabularies spell alike keeps its weights, the rest begins at their mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from plinth.tokenizer.encode import Tokenizer


def shared_rows(old: Tokenizer, new: Tokenizer) -> torch.Tensor:
    """Return, for each id of `new`, the id that `old` spells the same way, -1 where there is none; int64 (entries of new,)."""
    ids = {piece: i for i, piece in enumerate(old.pieces()) if piece is not None}
    return torch.tensor([ids.get(piece, -1) if piece is not None else -1 for piece in new.pieces()])


@torch.no_grad()
def with_vocabulary(model: Any, old: Tokenizer, new: Tokenizer) -> Any:
    """Return the model for texts of `new`: rows of embeddings, head and its bias of tokens that it knows, and for others their mean.

    Source: Howard and Ruder 2018, arXiv:1801.06146, whose program starts new words at the mean embedding.
    """
    rows = shared_rows(old, new)
    known = rows >= 0
    changed = type(model)(replace(model.config, vocab_size=len(rows)))
    before = dict(model.named_parameters())
    for name, parameter in changed.named_parameters():
        source = before[name].detach()
        if source.shape == parameter.shape and source.shape[0] != model.config.vocab_size:
            parameter.copy_(source)
            continue
        parameter.copy_(source[: old.vocab_size].mean(0, keepdim=True).expand_as(parameter))
        parameter[known] = source[rows[known]]
    return changed
