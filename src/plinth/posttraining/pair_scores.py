"""Pairs of answers as log-probabilities: their ratios to the reference, other divergences, the weights of tokens and of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from plinth.config import UserError
from plinth.data.order import permutation

LARGEST = 80.0  # nats by which an exponential's answer may have fallen: beyond, its gradient is cut before fp32 overflows


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities in nats of chosen and rejected answers, each summed over the answer's tokens, shape (B,)."""

    chosen_B: Tensor
    """the policy's, of the chosen answers"""
    rejected_B: Tensor
    """the policy's, of the rejected answers"""
    reference_chosen_B: Tensor | None = None
    """the reference's, of the chosen answers; None for a loss without a reference"""
    reference_rejected_B: Tensor | None = None
    """the reference's, of the rejected answers"""
    chosen_tokens_B: Tensor | None = None
    """counted tokens of the chosen answers; needed by the losses that divide by the length"""
    rejected_tokens_B: Tensor | None = None
    """counted tokens of the rejected answers"""

    def __post_init__(self) -> None:
        shapes = {tuple(value.shape) for value in vars(self).values() if value is not None}
        if len(shapes) != 1:
            raise ValueError(f"the pairs' shapes differ: {sorted(shapes)}.")

    @property
    def chosen_ratio_B(self) -> Tensor:
        """log π/π_ref of the chosen answers."""
        return self.chosen_B - given(self.reference_chosen_B, "reference_chosen_B")

    @property
    def rejected_ratio_B(self) -> Tensor:
        """log π/π_ref of the rejected answers."""
        return self.rejected_B - given(self.reference_rejected_B, "reference_rejected_B")

    @property
    def difference_B(self) -> Tensor:
        """The chosen answers' ratio minus the rejected answers', Δ in the equations."""
        return self.chosen_ratio_B - self.rejected_ratio_B

    def per_token(self) -> Pairs:
        """The same pairs with every sum divided by its answer's tokens."""
        chosen, rejected = given(self.chosen_tokens_B, "chosen_tokens_B"), given(self.rejected_tokens_B, "rejected_tokens_B")
        if bool((chosen <= 0).any()) or bool((rejected <= 0).any()):
            raise ValueError("an answer without counted tokens has no mean log-probability. Leave its pair out.")
        return Pairs(
            self.chosen_B / chosen,
            self.rejected_B / rejected,
            None if self.reference_chosen_B is None else self.reference_chosen_B / chosen,
            None if self.reference_rejected_B is None else self.reference_rejected_B / rejected,
            chosen,
            rejected,
        )

    def under(self, divergence: str, alpha: float = 0.5) -> Pairs:
        """The same pairs with each ratio replaced by its score under another divergence, see `divergence_score`."""
        chosen_B, rejected_B = (divergence_score(ratio, divergence, alpha) for ratio in (self.chosen_ratio_B, self.rejected_ratio_B))
        return replace(
            self, chosen_B=chosen_B, rejected_B=rejected_B,
            reference_chosen_B=torch.zeros_like(chosen_B), reference_rejected_B=torch.zeros_like(rejected_B),
        )  # fmt: skip

    def lengthened(self, nats: float) -> Pairs:
        """The same pairs with so many nats more in each ratio for each counted token of its answer."""
        chosen, rejected = given(self.chosen_tokens_B, "chosen_tokens_B"), given(self.rejected_tokens_B, "rejected_tokens_B")
        dtype = self.chosen_B.dtype
        return replace(self, chosen_B=self.chosen_B + nats * chosen.to(dtype), rejected_B=self.rejected_B + nats * rejected.to(dtype))


def given(value: Tensor | None, name: str) -> Tensor:
    """Return the value; raise ValueError where there is none."""
    if value is None:
        raise ValueError(f"{name} is None, and this loss needs it.")
    return value


def divergence_score(ratio_B: Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """Return f′(u) for u = e^ratio, 0 at ratio 0, which takes the place of the ratio under another divergence than the reverse KL.

    `divergence` is reverse_kl, forward_kl, js or alpha; `alpha`, which only the last reads, is not 1. Left out is
    the partition function of the prompt, which cancels in the difference of two answers and nowhere else.
    Source: Wang et al. 2023 (f-DPO), arXiv:2309.16240.  Differs: our α is one minus theirs, as in TRL; exponents end at LARGEST, as those
    of TRL's alpha divergence do.
    """
    if divergence == "reverse_kl":
        return ratio_B
    if divergence == "forward_kl":
        return -torch.expm1((-ratio_B).clamp(max=LARGEST))
    if divergence == "js":
        return math.log(2) + F.logsigmoid(ratio_B)
    if divergence == "alpha":
        if alpha == 1:
            raise UserError("divergence_alpha=1 divides by zero. Use divergence=reverse_kl, its limit.")
        return torch.expm1(((alpha - 1) * ratio_B).clamp(max=LARGEST)) / (alpha - 1)
    raise UserError(f"divergence={divergence!r} is none of reverse_kl, forward_kl, js, alpha.")


def implicit_rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """Return β log π/π_ref of the chosen and of the rejected answers; without a reference, β times the mean log π of a token."""
    if pairs.reference_chosen_B is not None:
        return beta * pairs.chosen_ratio_B, beta * pairs.rejected_ratio_B
    plain = pairs if pairs.chosen_tokens_B is None else pairs.per_token()
    return beta * plain.chosen_B, beta * plain.rejected_B


def shared_length_log_probs(log_probs_BT: Tensor, mask_BT: Tensor, shared_tokens_B: Tensor, alpha: float) -> Tensor:
    """Return Σ log-probabilities of the first `shared_tokens_B` counted tokens + α Σ of the later ones, shape (B,).

    `shared_tokens_B` is the length of the shorter answer of the pair; α = 1 is the plain sum.
    Source: Liu et al. 2024 (LD-DPO), arXiv:2409.06411.
    """
    counted_BT = mask_BT != 0
    shared_BT = counted_BT.cumsum(1) <= shared_tokens_B[:, None]
    return (torch.where(shared_BT, log_probs_BT, alpha * log_probs_BT) * counted_BT).sum(1)


def down_sampled(tokens: Sequence[tuple[int, int]], keys: Sequence[tuple[int, ...]]) -> Tensor:
    """Return which tokens of both answers are read, bool (B, 2, W): as many of the longer as the shorter has, W the longest answer's.

    `tokens` are each pair's two lengths; what is drawn, without putting back, depends on the integers of the pair's key alone.
    Source: Lu et al. 2024 (SamPO), arXiv:2406.10957.
    """
    kept = torch.zeros(len(tokens), 2, max(map(max, tokens)), dtype=torch.bool)
    for row_2W, lengths, key in zip(kept, tokens, keys):
        for row_W, length in zip(row_2W, lengths):
            row_W[torch.from_numpy(permutation(length, *key)[: min(lengths)])] = True
    return kept


def wpo_weights(chosen_BT: Tensor, chosen_mask_BT: Tensor, rejected_BT: Tensor, rejected_mask_BT: Tensor) -> Tensor:
    """Return detached weights min(1, e^{mean chosen + mean rejected}), shape (B,), for `preference_loss`.

    Both hold log p(token) − log Σ_v p(v)², the second term being that of the policy's distribution at the token's position.
    Source: Zhou et al. 2024 (WPO), arXiv:2406.11827, eq. 2.
    """
    sides = ((chosen_BT, chosen_mask_BT), (rejected_BT, rejected_mask_BT))
    means = [(values * mask).sum(1) / mask.sum(1) for values, mask in sides]
    return torch.exp(means[0] + means[1]).clamp(max=1).detach()
