"""Sequences that begin alike, computed with what they share standing once: answers to one prompt, for instance.

Everything but attention works a token at a time, so it runs on a row that holds the common beginning and then each sequence's own end.
Attention runs on the whole sequences, taken out of that row and put back: it stays causal, without a mask, and its kernels are the same.
Source: the idea is that of prefix sharing, Wang and Hegde 2024, arXiv:2410.20305.  Differs: they mask one sequence's attention instead,
which needs an attention that takes masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedRows:
    """How R sequences of fewer than T tokens lie in a row of fewer than L tokens, for each of B examples.

    The last place of a row and of a sequence is padding, whose gradient is 0: what has no counterpart reads and writes there.
    """

    places_BRT: Tensor
    """of each token of each sequence its place in the row; of padding the last"""
    homes_BL: Tensor
    """of each token of the row, r T + t for the first sequence r that has it, as its token t; of padding T − 1"""
    shared_B: Tensor
    """tokens that all R sequences begin with"""

    @property
    def width(self) -> int:
        """The width T of the sequences."""
        return self.places_BRT.shape[2]

    @property
    def positions_BL(self) -> Tensor:
        """Each token's position in its sequence; 0 for padding."""
        positions_BL = self.homes_BL % self.width
        return positions_BL.masked_fill(positions_BL == self.width - 1, 0)

    @property
    def owners_BL(self) -> Tensor:
        """The first sequence that has each token, counted through the batch: b R + r."""
        B, R, T = self.places_BRT.shape
        return self.homes_BL // T + torch.arange(0, B * R, R, device=self.homes_BL.device)[:, None]

    def expand(self, x: Tensor) -> Tensor:
        """Return the sequences (B R, T, ...) of rows (B, L, ...)."""
        return _Expand.apply(x, self.places_BRT, self.homes_BL, self.shared_B)

    def collapse(self, y: Tensor) -> Tensor:
        """Return the rows (B, L, ...) of sequences (B R, T, ...), a shared token's from the first sequence."""
        return _Collapse.apply(y, self.places_BRT, self.homes_BL, self.shared_B)


def _take(x: Tensor, index_BN: Tensor) -> Tensor:
    """Return x (B, M, ...) at places index_BN of its second dimension, (B, N, ...): a copy of whole rows."""
    B, M = x.shape[:2]
    starts_B1 = torch.arange(0, B * M, M, device=x.device)[:, None]
    return x.reshape(B * M, -1).index_select(0, (index_BN + starts_B1).flatten()).view(B, -1, *x.shape[2:])


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, places_BRT, homes_BL, shared_B):
        ctx.save_for_backward(homes_BL, shared_B)
        ctx.shape = B, R, T = places_BRT.shape
        return _take(x, places_BRT.flatten(1)).view(B * R, T, *x.shape[2:])

    @staticmethod
    def backward(ctx, grad):
        """Give each token its first sequence's gradient, and a shared one the others' too."""
        homes_BL, shared_B = ctx.saved_tensors
        B, R, T = ctx.shape
        grad_BNX = grad.reshape(B, R * T, *grad.shape[2:])
        result = _take(grad_BNX, homes_BL)
        width = min(T, homes_BL.shape[1])
        width = int(shared_B.max()) if grad.device.type == "cpu" else width  # asking a GPU would make it idle
        places_W = torch.arange(width, device=grad.device)
        for r in range(1, R):
            result[:, :width] += _take(grad_BNX, torch.where(places_W < shared_B[:, None], places_W + r * T, T - 1))
        return result, None, None, None


class _Collapse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, places_BRT, homes_BL, shared_B):
        ctx.save_for_backward(places_BRT, shared_B)
        ctx.length = homes_BL.shape[1]
        B, R, T = places_BRT.shape
        return _take(y.reshape(B, R * T, *y.shape[2:]), homes_BL)

    @staticmethod
    def backward(ctx, grad):
        """Give the first sequence what its tokens' readers ask, the others only their own tokens' share."""
        places_BRT, shared_B = ctx.saved_tensors
        B, R, T = places_BRT.shape
        ahead_B1T = torch.arange(T, device=grad.device) < shared_B[:, None, None]
        later_R1 = torch.arange(R, device=grad.device)[:, None] > 0
        read_BRT = torch.where(ahead_B1T & later_R1, ctx.length - 1, places_BRT)
        return _take(grad, read_BRT.flatten(1)).view(B * R, T, *grad.shape[2:]), None, None, None


def share_rows(
    sequences: Sequence[Sequence[Sequence[int]]], shared: Sequence[int], length: int, width: int, pad_id: int = 0
) -> tuple[SharedRows, Tensor]:
    """Return how each example's sequences of token ids lie in a row, and the rows' tokens (B, L).

    The first `shared` tokens of an example's sequences are the same. `length` L and `width` T exceed the longest row and sequence.
    """
    B, R = len(sequences), len(sequences[0])
    places, homes = torch.full((B, R, width), length - 1), torch.full((B, length), width - 1)
    tokens = torch.full((B, length), pad_id)
    for b, (example, common) in enumerate(zip(sequences, shared)):
        end = common
        homes[b, :common] = places[b, :, :common] = torch.arange(common)
        tokens[b, :common] = torch.as_tensor(example[0][:common])
        for r, sequence in enumerate(example):
            after = end + len(sequence) - common
            places[b, r, common : len(sequence)] = torch.arange(end, after)
            homes[b, end:after] = torch.arange(r * width + common, r * width + len(sequence))
            tokens[b, end:after] = torch.as_tensor(sequence[common:])
            end = after
        assert end < length and max(map(len, example)) < width, "the last place is for padding"
    return SharedRows(places, homes, torch.as_tensor(list(shared))), tokens
