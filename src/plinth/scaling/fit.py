"""Fit a Chinchilla law to runs: Huber on the logarithm of the loss, by variable projection and one polish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plinth.config import UserError
from plinth.scaling.laws import ChinchillaLaw

HUBER_DELTA = 1e-3
EXPONENT_GRID = np.linspace(0.05, 1.2, 33)


@dataclass(frozen=True)
class LawPoint:
    """One finished run: what was trained, for how long, and the loss that it reached."""

    params: float
    """parameters of the blocks: neither embedding nor output head"""
    tokens: float
    """tokens (or bytes, for a law in bytes) seen; effective ones if the text was repeated"""
    loss_nats: float
    """loss on held-out text, nats a token (or a byte)"""


@dataclass(frozen=True)
class FittedLaw:
    """A law with how well it fits the points that it was made from."""

    law: ChinchillaLaw
    """the law"""
    huber: float
    """sum of Huber losses of the log residuals"""
    relative_rmse: float
    """root mean square of predicted / observed - 1"""
    num_points: int
    """runs used"""


def fit_chinchilla(
    points: Sequence[LawPoint],
    *,
    name: str = "local",
    source: str = "fitted on this project's own runs",
    param_exponent: float | None = None,
    token_exponent: float | None = None,
    bytes_per_token: float = 1.0,
) -> FittedLaw:
    """Fit E, A, B, alpha and beta to runs.

    An exponent that is given stays fixed: with fewer than some ten runs, or sizes within a factor of three, the
    exponents are not identified. For every pair of exponents on a grid the three coefficients follow by
    non-negative least squares on relative residuals; the best pair is polished on the true objective, the sum over
    runs of Huber_0.001(log predicted - log observed). Summed, not averaged: an averaged objective makes L-BFGS stop
    early, which is how the first published constants went wrong.

    Raises UserError when the runs cannot determine the free constants.
    Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 3; Besiroglu et al. 2024, arXiv:2404.10102.
    Differs: variable projection in place of a grid of L-BFGS starts.
    """
    params, tokens, losses = _columns(points)
    free = 3 + (param_exponent is None) + (token_exponent is None)
    _check_points(params, tokens, losses, free)
    alphas = EXPONENT_GRID if param_exponent is None else np.array([param_exponent])
    betas = EXPONENT_GRID if token_exponent is None else np.array([token_exponent])
    start = _project(params, tokens, losses, alphas, betas)
    theta, huber = _polish(start, params, tokens, losses, param_exponent is None, token_exponent is None)
    law = ChinchillaLaw(
        name=name,
        source=f"{source} ({len(points)} runs)",
        irreducible=float(math.exp(theta[0])),
        param_coefficient=float(math.exp(theta[1])),
        token_coefficient=float(math.exp(theta[2])),
        param_exponent=float(theta[3]),
        token_exponent=float(theta[4]),
        bytes_per_token=bytes_per_token,
        bytes_per_token_note="measured on the text of the runs",
        min_params=float(params.min()),
        max_params=float(params.max()),
        min_tokens=float(tokens.min()),
        max_tokens=float(tokens.max()),
    )
    predicted = np.array([law.loss(p, t) for p, t in zip(params, tokens, strict=True)])
    relative = predicted / losses - 1.0
    return FittedLaw(law, huber, float(np.sqrt(np.mean(relative**2))), len(points))


def _columns(points: Sequence[LawPoint]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.array([(p.params, p.tokens, p.loss_nats) for p in points], dtype=np.float64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _check_points(params: np.ndarray, tokens: np.ndarray, losses: np.ndarray, free: int) -> None:
    if len(params) < free:
        raise UserError(
            f"points={len(params)} runs cannot determine {free} constants; give at least {free} runs or fix "
            "param_exponent and token_exponent."
        )
    for label, column in (("params", params), ("tokens", tokens), ("loss_nats", losses)):
        if not np.all(np.isfinite(column) & (column > 0)):
            raise UserError(f"{label} holds a value that is not a positive finite number; drop that run.")
    for label, column in (("params", params), ("tokens", tokens)):
        if len(np.unique(column)) < 2:
            raise UserError(f"{label} is the same in all runs; vary it, or its term of the law is not determined.")


def _project(params: np.ndarray, tokens: np.ndarray, losses: np.ndarray, alphas: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """Return log E, log A, log B, alpha, beta of the best pair of exponents on the grid."""
    from scipy.optimize import nnls

    best: tuple[float, np.ndarray] | None = None
    for alpha in alphas:
        for beta in betas:
            design = np.stack([np.ones_like(params), params**-alpha, tokens**-beta], axis=1)
            scale = np.abs(design).max(axis=0)
            solution, residual = nnls(design / scale / losses[:, None], np.ones_like(losses))
            if best is None or residual < best[0]:
                coefficients = np.maximum(solution / scale, 1e-9)
                best = (residual, np.concatenate([np.log(coefficients), [alpha, beta]]))
    assert best is not None
    return best[1]


def _polish(
    start: np.ndarray,
    params: np.ndarray,
    tokens: np.ndarray,
    losses: np.ndarray,
    alpha_is_free: bool,
    beta_is_free: bool,
) -> tuple[np.ndarray, float]:
    """Minimise the Huber objective from `start` with its analytic gradient; return (constants, objective)."""
    from scipy.optimize import minimize

    log_params, log_tokens, log_losses = np.log(params), np.log(tokens), np.log(losses)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        terms = np.stack(
            [
                np.full_like(log_params, theta[0]),
                theta[1] - theta[3] * log_params,
                theta[2] - theta[4] * log_tokens,
            ]
        )
        log_predicted = np.logaddexp.reduce(terms, axis=0)
        weights = np.exp(terms - log_predicted)
        residual = log_predicted - log_losses
        size = np.abs(residual)
        value = np.where(size <= HUBER_DELTA, 0.5 * residual**2, HUBER_DELTA * (size - 0.5 * HUBER_DELTA)).sum()
        slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
        gradient = np.array(
            [
                (slope * weights[0]).sum(),
                (slope * weights[1]).sum(),
                (slope * weights[2]).sum(),
                -(slope * weights[1] * log_params).sum() if alpha_is_free else 0.0,
                -(slope * weights[2] * log_tokens).sum() if beta_is_free else 0.0,
            ]
        )
        # The objective is of the order of 1e-3; scaled up, the stopping tolerances of L-BFGS mean something.
        return float(value) * 1e4, gradient * 1e4

    options: dict[str, Any] = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 50}
    theta, value = start, objective(start)[0]
    for _ in range(3):  # a restart clears the curvature memory, which a flat valley spoils
        result = minimize(objective, theta, jac=True, method="L-BFGS-B", options=options)
        if result.fun >= value:
            break
        theta, value = result.x, float(result.fun)
    return theta, value / 1e4
