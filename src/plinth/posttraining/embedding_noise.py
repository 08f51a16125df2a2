"""Noise on the embeddings while a model is finetuned (NEFTune)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from plinth.data.buckets import padded_width
from plinth.models.transformer import Transformer
from plinth.ops.dropout import seeded
from plinth.tokenizer.chat import Rendered
from plinth.training.objectives import causal_lm_loss


def noisy_lm_loss(model: Transformer, batch: tuple[torch.Tensor, ...], dynamic: bool = False):
    """Return what `causal_lm_loss` returns of a batch, but for noise on its embeddings.

    Two tensors more end the batch: `noise_scales` (B, T), and a seed a row (B,).
    """
    *plain, scales_BT, seeds_B = batch
    return causal_lm_loss(model, tuple(plain), dynamic, noisy_embeddings(model.embed(batch[0]), scales_BT, seeds_B))


def noise_scales(rows: Sequence[Sequence[Rendered]], noise: float, hidden_size: int) -> torch.Tensor:
    """Return the width of each token's noise, noise / sqrt(L D), L the tokens of its conversation; 0 for padding, shape (B, T).

    `rows` hold a conversation each, or several end to end, as in `batches`.
    """
    lengths = [[len(each.tokens) - 1 for each in row] for row in rows]
    scales_BT = torch.zeros(len(rows), padded_width(max(sum(row) for row in lengths)))
    for i, row in enumerate(lengths):
        filled = [torch.full((length,), noise / (length * hidden_size) ** 0.5) for length in row]
        scales_BT[i, : sum(row)] = torch.cat(filled)
    return scales_BT


def noisy_embeddings(embedded_BTD: torch.Tensor, scales_BT: torch.Tensor, seeds_B: torch.Tensor) -> torch.Tensor:
    """Return embeddings with noise drawn evenly from [−scale, scale] for each number, by the batch's own seed.

    Source: Jain et al. 2023 (NEFTune), arXiv:2310.05914, algorithm 1.  Differs: L is the conversation's length, not the padded row's as in
    transformers, so that its noise does not depend on its company.
    """
    draws = torch.rand(embedded_BTD.shape, generator=seeded(seeds_B), device=embedded_BTD.device)
    return embedded_BTD + ((2 * draws - 1) * scales_BT[..., None]).to(embedded_BTD.dtype)
