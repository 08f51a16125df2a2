"""Dropout along sequences: what is dropped stays dropped at all positions, or at all places of a word."""

from __future__ import annotations

import torch

from plinth.ops.dropout import dropout_mask


def locked_dropout(x_BTD: torch.Tensor, rate: float, generator: torch.Generator | None) -> torch.Tensor:
    """Drop channels of a sequence, the same ones at each of its positions; without a generator, or at rate 0, return x itself.

    Source: Gal and Ghahramani 2016, arXiv:1512.05287 (variational dropout).
    """
    if generator is None or not rate:
        return x_BTD
    return x_BTD * dropout_mask((x_BTD.shape[0], 1, x_BTD.shape[2]), rate, generator, x_BTD)


def word_dropout(
    x_BTD: torch.Tensor, tokens_BT: torch.Tensor, vocab_size: int, rate: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Drop whole tokens of the vocabulary from embedded text, each at all of its places in the batch.

    Same as dropping rows of the embedding matrix, without a copy of it.
    Source: Gal and Ghahramani 2016, arXiv:1512.05287; Merity et al. 2017, arXiv:1708.02182, section 4.3.
    """
    if generator is None or not rate:
        return x_BTD
    return x_BTD * dropout_mask((vocab_size,), rate, generator, x_BTD)[tokens_BT][..., None]
