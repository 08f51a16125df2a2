"""How long a training step takes: a linear model of FLOPs, bytes moved and layers, fitted to measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plinth.models import cost
from plinth.models.config import DecoderConfig

OPTIMIZER_BYTES_PER_PARAM = 30  # fp32 weight, two moments and gradient read, three written, bf16 copy written
MUON_STEPS = 5
PRIOR_WEIGHT = 0.01
PRIOR_COMPUTE_SHARE = 0.25
PRIOR_SECONDS_PER_LAYER = 1e-3


@dataclass(frozen=True)
class StepCost:
    """What one optimizer update has to do."""

    flops: float
    """floating-point operations of matrix products, forward and backward, and of Muon where it is used"""
    traffic_bytes: float
    """bytes of activations that pass through memory around the matrix products"""
    state_bytes: float
    """bytes of weights, gradients and moments that the optimizer touches"""
    layers: int
    """blocks: each launches its operators"""


@dataclass(frozen=True)
class StepTiming:
    """One measured step."""

    cost: StepCost
    """what it did"""
    step_s: float
    """how long it took, seconds"""


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a step as a sum of non-negative terms."""

    seconds_per_flop: float
    """inverse of the rate that training reaches in matrix products"""
    seconds_per_traffic_byte: float
    """inverse of the rate at which activations move"""
    seconds_per_state_byte: float
    """inverse of the rate at which the optimizer passes over its state"""
    seconds_per_layer: float
    """fixed time of a block"""
    relative_rmse: float = 0.0
    """root mean square of predicted / measured - 1 over the points of the fit"""
    num_points: int = 0
    """measured steps in the fit"""

    def step_s(self, step: StepCost) -> float:
        """Return the predicted seconds of a step."""
        return (
            self.seconds_per_flop * step.flops
            + self.seconds_per_traffic_byte * step.traffic_bytes
            + self.seconds_per_state_byte * step.state_bytes
            + self.seconds_per_layer * step.layers
        )


def body_params(config: DecoderConfig) -> int:
    """Return the parameters of the blocks: neither the embedding nor the output head."""
    return cost.count_params(config)["non_embedding"]


def step_cost(config: DecoderConfig, tokens: int, seq_len: int, optimizer: str) -> StepCost:
    """Return what one update on `tokens` tokens in sequences of `seq_len` has to do."""
    flops = float(cost.train_flops_per_token(config, seq_len)) * tokens
    if optimizer == "muon":
        flops += muon_flops(config)
    width, feed_forward = config.hidden_size, config.intermediate_size
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    per_layer = 2 * (12 * width + 6 * heads + 10 * feed_forward)
    traffic = tokens * (config.num_layers * per_layer + 12 * config.vocab_size)
    state = OPTIMIZER_BYTES_PER_PARAM * cost.count_params(config)["total"]
    return StepCost(flops, float(traffic), float(state), config.num_layers)


def muon_flops(config: DecoderConfig) -> float:
    """Return the FLOPs of five Newton-Schulz iterations on every matrix of the blocks.

    Each iteration of an m x n matrix, m <= n, takes two products with its n columns and one of m x m.
    """
    width, query = config.hidden_size, config.num_heads * config.head_dim
    key_value = config.num_kv_heads * config.head_dim
    matrices = [(query, width), (width, query)] + 2 * [(key_value, width)] + config.num_mlp_matrices * [(config.intermediate_size, width)]
    small_large = [(min(shape), max(shape)) for shape in matrices]
    return float(config.num_layers * MUON_STEPS * sum(4 * m * m * n + 2 * m**3 for m, n in small_large))


def fit_time_model(points: Sequence[StepTiming], matmul_flops_per_s: float, bandwidth_bytes_per_s: float) -> TimeModel:
    """Fit the four rates to measured steps by non-negative least squares on relative errors.

    Two or three points cannot settle four rates, so each is also pulled, weakly, to what the machine's measured
    matrix rate and bandwidth suggest. With no point at all the result is that suggestion.
    """
    from scipy.optimize import nnls

    prior = np.array(
        [
            1.0 / (PRIOR_COMPUTE_SHARE * matmul_flops_per_s),
            1.0 / bandwidth_bytes_per_s,
            1.0 / bandwidth_bytes_per_s,
            PRIOR_SECONDS_PER_LAYER,
        ]
    )
    rows = [_features(point.cost) * prior / point.step_s for point in points]
    design = np.concatenate([np.array(rows).reshape(-1, 4), PRIOR_WEIGHT * np.eye(4)])
    target = np.concatenate([np.ones(len(points)), PRIOR_WEIGHT * np.ones(4)])
    rates = nnls(design, target)[0] * prior
    errors = [float(_features(point.cost) @ rates) / point.step_s - 1.0 for point in points]
    return TimeModel(
        seconds_per_flop=float(rates[0]),
        seconds_per_traffic_byte=float(rates[1]),
        seconds_per_state_byte=float(rates[2]),
        seconds_per_layer=float(rates[3]),
        relative_rmse=float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0,
        num_points=len(points),
    )


def _features(step: StepCost) -> np.ndarray:
    return np.array([step.flops, step.traffic_bytes, step.state_bytes, step.layers], dtype=np.float64)
