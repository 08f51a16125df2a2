"""Rotary positions as a decoder's configuration asks for: scaled for longer texts, or with a base of their own in blocks with a window."""

from __future__ import annotations

import math

import torch

from plinth.models.config import DecoderConfig, RopeScaling
from plinth.ops.rope import rope_frequencies, rotation_table


def rotation(config: DecoderConfig, positions: torch.Tensor, *, local: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and signed sines, fp32, shape (*positions.shape, head_dim); `local` gives those of blocks with a window."""
    own = local and config.local_rope_theta is not None
    theta = config.local_rope_theta if own else config.rope_theta
    assert theta is not None
    scaling = None if own else config.rope_scaling
    frequency = rope_frequencies(config.head_dim, theta, positions.device)
    scale = config.attention_multiplier**0.5
    if scaling is not None:
        frequency, scale = scaled_frequencies(frequency, scaling, theta), scale * attention_factor(scaling)
    return rotation_table(positions, frequency, scale)


def has_own_rotation(config: DecoderConfig) -> bool:
    """Return whether blocks with a window rotate in another way than those without."""
    return config.local_rope_theta is not None


def scaled_frequencies(frequency: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """Return the frequencies for longer texts: each divided by the factor, kept, or between the two."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    kept = _kept_by_turns(frequency, scaling) if scaling.kind == "llama3" else _kept_by_channel(frequency, scaling, theta)
    return frequency / scaling.factor * (1.0 - kept) + frequency * kept


def attention_factor(scaling: RopeScaling) -> float:
    """Return the factor on rotated queries and keys.  Source: YaRN, arXiv:2309.00071, eq. 22."""
    if scaling.kind != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.attention_factor is None else scaling.attention_factor


def _kept_by_turns(frequency: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Return how much of each frequency stays, 0 to 1, by how often it turns within the original length.  Source: Llama 3.1."""
    assert scaling.original_max_seq_len is not None
    turns = scaling.original_max_seq_len * frequency / (2.0 * math.pi)
    return ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)


def _kept_by_channel(frequency: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """Return how much of each frequency stays, falling linearly with the channel between two bounds.

    Source: YaRN, arXiv:2309.00071, section 3.2.  Differs: linear in the channel, as its authors' code has it, not in the frequency.
    """

    def channel(turns: float) -> float:
        """Return the channel whose frequency turns so often within the original length."""
        assert scaling.original_max_seq_len is not None
        return head_dim * math.log(scaling.original_max_seq_len / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    head_dim = 2 * len(frequency)
    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    return 1.0 - ((torch.arange(len(frequency), dtype=torch.float32, device=frequency.device) - first) / width).clamp(0.0, 1.0)
