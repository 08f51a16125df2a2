"""What low-rank adapters are told, without PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from plinth.config import UserError

Init = Literal["uniform", "gaussian", "pissa"]


@dataclass(frozen=True)
class LoraConfig:
    """Adapters: what is trained in place of the weights."""

    rank: int | None = None
    """rank of each projection's adapter (default: no adapters, all weights are trained)"""
    alpha: float = 32.0
    """what adapters add is multiplied by alpha / rank"""
    rank_stabilised: bool = False
    """rsLoRA: multiply by alpha / sqrt(rank) instead, so that a higher rank does not learn slower"""
    dora: bool = False
    """DoRA: learn the norm of each row of the adapted matrices too"""
    targets: tuple[str, ...] | None = None
    """published names of the projections adapted, such as q_proj v_proj, or all-linear (default: all-linear, all of attention and of the
    feed-forward layers)"""
    quantise: Literal["nf4"] | None = None
    """hold the matrices under the adapters in 4 bits (QLoRA); what is learnt fits the rounded matrices (default: as they are)"""
    pattern: str | None = None
    """in place of targets: regular expression that the whole published name matches, such as '.*self_attn.*'"""
    layers: tuple[int, ...] | None = None
    """blocks adapted, counted from 0 (default: all)"""
    dropout: float = 0.0
    """share of the numbers that enter A which is set to 0 while training, the others divided by what is left"""
    lr_ratio: float = 1.0
    """LoRA+: learning rate of B over that of A, which is the optimizer's; its authors take 16"""
    init: Init = "uniform"
    """how A begins, B being 0: uniform within 1 / sqrt(in), or gaussian of deviation 1 / rank; pissa: B A are the largest singular values
    and vectors of W, which loses them, so that these are trained first"""
    whole: tuple[str, ...] | None = None
    """modules trained whole beside the adapters, by their published names: embed_tokens, lm_head (default: none)"""

    def __post_init__(self) -> None:
        if self.rank is None and any(getattr(self, one.name) != one.default for one in fields(self)):
            raise UserError("adapter.rank is not given, but other options of adapters are. Add --adapter.rank 16.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"adapter.rank={self.rank} must be at least 1. Leave it out to train all weights.")
        for name in ("alpha", "lr_ratio"):
            if not getattr(self, name) > 0:
                raise UserError(f"adapter.{name}={getattr(self, name)} must be positive.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout={self.dropout} must lie in [0, 1).")
        if self.targets is not None and self.pattern is not None:
            raise UserError("adapter.targets and adapter.pattern both say which projections are adapted. Give one.")
        if self.init == "pissa" and self.quantise:
            raise UserError(
                f"adapter.init=pissa with adapter.quantise={self.quantise} would round what is left of the weights: what is learnt would "
                "fit no base that others have. Give one."
            )

    @property
    def scaling(self) -> float:
        """Return what B A is multiplied by.

        Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; with rank_stabilised Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
        """
        assert self.rank is not None
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def published(self) -> LoraConfig:
        """Return the configuration of adapters that add to the weights as they came: those of pissa have twice the rank, scaled alike."""
        if self.init != "pissa" or self.rank is None:
            return self
        return replace(self, rank=2 * self.rank, alpha=self.alpha * (math.sqrt(2) if self.rank_stabilised else 2), init="uniform")


def refuse_dropout(adapter: LoraConfig) -> None:
    """Raise UserError for dropout where the model that is updated must be the one that sampled."""
    if adapter.dropout:
        raise UserError(
            f"adapter.dropout={adapter.dropout} is not for methods that sample: the model that is updated must be the one that wrote the "
            "completions, or the ratio of the two says nothing. Leave it out."
        )
