"""Scaling laws as values: loss from parameters and tokens, repeated data, learning rate and batch, each with its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

NATS_PER_BIT = math.log(2.0)


@dataclass(frozen=True)
class ChinchillaLaw:
    """Loss of a model of N parameters after D tokens: L = E + A / N^alpha + B / D^beta, in nats a token."""

    name: str
    """short name that plans and reports quote"""
    source: str
    """where the constants were published, or what they were fitted on"""
    irreducible: float
    """E, nats a token"""
    param_coefficient: float
    """A"""
    token_coefficient: float
    """B"""
    param_exponent: float
    """alpha"""
    token_exponent: float
    """beta"""
    bytes_per_token: float = 4.0
    """bytes of text in one token of the tokenizer that the law was fitted with; 1 for a law in nats a byte"""
    bytes_per_token_note: str = "assumed: English web text at a vocabulary of 32,000"
    """how bytes_per_token is known"""
    min_params: float = 4.4e7
    """smallest model of the fit, parameters"""
    max_params: float = 1.6e10
    """largest model of the fit, parameters"""
    min_tokens: float = 5.0e9
    """shortest run of the fit, tokens"""
    max_tokens: float = 5.0e11
    """longest run of the fit, tokens"""
    optimizer: str = "adamw"
    """optimizer of the runs of the fit"""

    def loss(self, params: float, tokens: float) -> float:
        """Return the predicted loss in nats a token of the law's own tokenizer."""
        return (
            self.irreducible + self.param_coefficient * params**-self.param_exponent + self.token_coefficient * tokens**-self.token_exponent
        )

    def bits_per_byte(self, params: float, text_bytes: float) -> float:
        """Return the predicted bits per byte after training on `text_bytes` bytes of text.

        Bytes, not tokens, are what two vocabularies have in common: the text is counted in tokens of the law's
        own tokenizer, and its loss is divided by the bytes of such a token.
        """
        return self.loss(params, text_bytes / self.bytes_per_token) / self.bytes_per_token / NATS_PER_BIT

    def compute_optimal(self, flops: float) -> tuple[float, float]:
        """Return (parameters, tokens) that minimise the loss at `flops` = 6 N D training FLOPs.

        Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 4.
        """
        total = self.param_exponent + self.token_exponent
        scale = (self.param_exponent * self.param_coefficient / (self.token_exponent * self.token_coefficient)) ** (1.0 / total)
        params = scale * (flops / 6.0) ** (self.token_exponent / total)
        return params, flops / 6.0 / params

    def optimal_params(self, tokens: float) -> float:
        """Return the parameters for which `tokens` is the compute-optimal number of tokens."""
        slope = self.token_exponent * self.token_coefficient * tokens**-self.token_exponent
        return (self.param_exponent * self.param_coefficient / slope) ** (1.0 / self.param_exponent)

    def optimal_tokens(self, params: float) -> float:
        """Return the tokens for which `params` is the compute-optimal number of parameters; the inverse of `optimal_params`."""
        slope = self.param_exponent * self.param_coefficient * params**-self.param_exponent
        return (self.token_exponent * self.token_coefficient / slope) ** (1.0 / self.token_exponent)

    def is_outside(self, params: float, text_bytes: float) -> bool:
        """Say whether a prediction extrapolates beyond the sizes or the run lengths of the fit."""
        tokens = text_bytes / self.bytes_per_token
        return not (self.min_params <= params <= self.max_params and self.min_tokens <= tokens <= self.max_tokens)


HOFFMANN = ChinchillaLaw(
    name="Chinchilla",
    source="Hoffmann et al. 2022, arXiv:2203.15556, approach 3, unrounded constants of the TeX source",
    irreducible=1.6934,
    param_coefficient=406.40,
    token_coefficient=410.72,
    param_exponent=0.33917,
    token_exponent=0.28491,
)
BESIROGLU = ChinchillaLaw(
    name="Chinchilla, corrected",
    source="Besiroglu et al. 2024, arXiv:2404.10102",
    irreducible=1.8172,
    param_coefficient=482.01,
    token_coefficient=2085.43,
    param_exponent=0.3478,
    token_exponent=0.3658,
)
MUENNIGHOFF = ChinchillaLaw(
    name="data-constrained",
    source="Muennighoff et al. 2023, arXiv:2305.16264",
    irreducible=math.exp(0.6254804),
    param_coefficient=math.exp(6.255414),
    token_coefficient=math.exp(7.3049974),
    param_exponent=0.3526596,
    token_exponent=0.3526596,
    min_params=7.0e6,
    max_params=8.7e9,
    min_tokens=1.0e8,
    max_tokens=9.0e11,
)
# Exponents are Besiroglu's: twelve runs over two decades of compute do not determine five constants.
SMALL_CODE = ChinchillaLaw(
    name="small code models",
    source="E, A and B fitted on 12 own runs on Python's standard library (benchmarks/scaling_law.py); exponents of Besiroglu et al. 2024",
    irreducible=0.55177,
    param_coefficient=12.792,
    token_coefficient=162.28,
    param_exponent=0.3478,
    token_exponent=0.3658,
    bytes_per_token=1.0,
    bytes_per_token_note="fitted in bytes",
    min_params=1.0e5,
    max_params=1.77e6,
    min_tokens=2.3e6,
    max_tokens=2.4e7,
)
LAWS: Mapping[str, ChinchillaLaw] = {
    "small-code": SMALL_CODE,
    "besiroglu": BESIROGLU,
    "hoffmann": HOFFMANN,
    "muennighoff": MUENNIGHOFF,
}


SMALL_RUN_FLOPS = 2.0e15  # halfway, in powers of ten, from the longest of the small runs to the shortest of Chinchilla's


def default_law(flops: float) -> ChinchillaLaw:
    """Return the law whose runs are nearest to one of `flops` FLOPs.

    The published laws say nothing useful of a minute on two cores: extrapolated there they predict a loss above that
    of a uniform guess.
    """
    return SMALL_CODE if flops < SMALL_RUN_FLOPS else BESIROGLU


@dataclass(frozen=True)
class RepetitionLaw:
    """What repeated text is still worth: each further epoch adds exponentially less."""

    name: str = "data-constrained law"
    """short name that plans and reports quote"""
    source: str = "Muennighoff et al. 2023, arXiv:2305.16264, eq. 5 and 6"
    """where the constants were published"""
    token_half_life: float = 15.387756
    """R*_D: repetitions after which the value of another one has fallen to 1/e"""
    param_half_life: float = 5.309743
    """R*_N: the same for parameters beyond those that the unique text supports"""

    def effective_tokens(self, unique: float, total: float) -> float:
        """Return how many fresh tokens (or bytes) `total` tokens are worth when only `unique` of them differ."""
        if total <= unique:
            return total
        repetitions = total / unique - 1.0
        return unique * (1.0 + self.token_half_life * -math.expm1(-repetitions / self.token_half_life))

    def effective_params(self, supported: float, total: float) -> float:
        """Return how many parameters `total` are worth when the unique text supports only `supported`."""
        if total <= supported:
            return total
        excess = total / supported - 1.0
        return supported * (1.0 + self.param_half_life * -math.expm1(-excess / self.param_half_life))


REPETITION = RepetitionLaw()


def data_constrained_bits_per_byte(
    law: ChinchillaLaw,
    params: float,
    unique_bytes: float,
    total_bytes: float,
    *,
    gain: float = 1.0,
    limit_params: bool = False,
    repetition: RepetitionLaw = REPETITION,
) -> float:
    """Return predicted bits per byte after `total_bytes` of training on a text of `unique_bytes`.

    `gain` is what a byte is worth with this run's optimizer against that of the law's runs. With `limit_params`,
    parameters beyond the optimum of `law` for the unique text are discounted too.
    Source: Muennighoff et al. 2023, arXiv:2305.16264.
    Differs: `law` gives E, A, B, alpha and beta; the discount of parameters is optional, since it bites at one epoch
    already, where the plain laws were fitted without it.
    """
    text_bytes = gain * repetition.effective_tokens(unique_bytes, total_bytes)
    if limit_params:
        unique_tokens = min(unique_bytes, total_bytes) / law.bytes_per_token
        params = repetition.effective_params(law.optimal_params(unique_tokens), params)
    return law.bits_per_byte(params, text_bytes)


@dataclass(frozen=True)
class StepLaw:
    """Peak learning rate of AdamW and batch in tokens as powers of parameters and tokens: a prior, not the truth."""

    name: str = "Step Law"
    """short name that plans and reports quote"""
    source: str = "Li et al. 2025, arXiv:2503.04715; fitted at 60 M to 1 B parameters and 2 B to 100 B tokens"
    """where the constants were published and on what scale"""
    lr_scale: float = 1.79
    """factor of the learning rate"""
    lr_param_exponent: float = -0.713
    """power of the non-embedding parameters in the learning rate"""
    lr_token_exponent: float = 0.307
    """power of the tokens in the learning rate"""
    batch_scale: float = 0.58
    """factor of the batch"""
    batch_token_exponent: float = 0.571
    """power of the tokens in the batch"""
    max_lr: float = 6.0e-3
    """ceiling: far below the fitted sizes the power law asks for rates at which AdamW is no longer stable"""

    def lr(self, params: float, tokens: float) -> float:
        """Return the peak learning rate for AdamW."""
        value = self.lr_scale * params**self.lr_param_exponent * tokens**self.lr_token_exponent
        return min(value, self.max_lr)

    def tokens_per_step(self, tokens: float) -> float:
        """Return the batch in tokens for a run of `tokens` tokens."""
        return self.batch_scale * tokens**self.batch_token_exponent


STEP_LAW = StepLaw()
