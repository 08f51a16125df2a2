"""Losses of pairs of answers, and of single answers called good or bad, as functions of summed log-probabilities.

Each function returns one loss a pair (or a row), shape (B,); `preference_loss` picks one by name and sums. The policy's log-ratio of an
answer, log π(y|x) − log π_ref(y|x), is called its ratio here, in nats.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plinth.config import UserError
from plinth.posttraining.pair_scores import Pairs, given, implicit_rewards
from plinth.posttraining.preference_config import PAIR_OPTIONS


def sigmoid(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """−log σ(βΔ).  Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(beta * pairs.difference_B)


def cdpo(pairs: Pairs, *, beta: float = 0.1, epsilon: float | Tensor = 0.1) -> Tensor:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ): DPO where a label is wrong with probability ε.

    Source: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    _check_epsilon(epsilon)
    margin_B = beta * pairs.difference_B
    return -(1 - epsilon) * F.logsigmoid(margin_B) - epsilon * F.logsigmoid(-margin_B)


def robust(pairs: Pairs, *, beta: float = 0.1, epsilon: float = 0.1) -> Tensor:
    """[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε): unbiased under flips of rate ε.  Source: Chowdhury et al. 2024, arXiv:2403.00409."""
    _check_epsilon(epsilon)
    margin_B = beta * pairs.difference_B
    return (-(1 - epsilon) * F.logsigmoid(margin_B) + epsilon * F.logsigmoid(-margin_B)) / (1 - 2 * epsilon)


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 − βΔ).  Source: Zhao et al. 2023 (SLiC), arXiv:2305.10425, with DPO's margin as in Liu et al. 2023, arXiv:2309.06657."""
    return torch.relu(1 - beta * pairs.difference_B)


def ipo(pairs: Pairs, *, beta: float = 0.1, per_token: bool = True) -> Tensor:
    """(Δ − 1/(2β))², Δ of per-token means, or of sums when `per_token` is false.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.  Differs: the paper writes sums.
    """
    return ((pairs.per_token() if per_token else pairs).difference_B - 1 / (2 * beta)) ** 2


def sigmoid_norm(pairs: Pairs, *, beta: float = 5.0) -> Tensor:
    """−log σ(βΔ) with Δ of per-token means, hence the larger β.  Source: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124."""
    return -F.logsigmoid(beta * pairs.per_token().difference_B)


def exo_pair(pairs: Pairs, *, beta: float = 0.1, epsilon: float = 1e-3) -> Tensor:
    """KL from (σ(βΔ), σ(−βΔ)) to the smoothed label (1−ε, ε), ε in (0, 0.5).  Source: Ji et al. 2024 (EXO), arXiv:2402.00856, eq. 16."""
    if not 0 < epsilon < 0.5:
        raise UserError(f"epsilon={epsilon} is not between 0 and 0.5; the loss is infinite at 0. The paper uses 0.001.")
    margin_B = beta * pairs.difference_B
    right = margin_B.sigmoid() * (F.logsigmoid(margin_B) - math.log(1 - epsilon))
    return right + (-margin_B).sigmoid() * (F.logsigmoid(-margin_B) - math.log(epsilon))


def nca_pair(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr), c and r the two ratios.  Source: Chen et al. 2024 (NCA), arXiv:2402.05369."""
    chosen, rejected = beta * pairs.chosen_ratio_B, beta * pairs.rejected_ratio_B
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """−log σ(βc) − log σ(−βr), c and r the two ratios.  Source: Jung et al. 2024 (BCO), arXiv:2404.04656.  Differs: no reward shift δ."""
    return -F.logsigmoid(beta * pairs.chosen_ratio_B) - F.logsigmoid(-beta * pairs.rejected_ratio_B)


def sppo_hard(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """(c − 1/(2β))² + (r + 1/(2β))², c and r the two ratios.  Source: Wu et al. 2024 (SPPO), arXiv:2405.00675, with hard labels."""
    return (pairs.chosen_ratio_B - 0.5 / beta) ** 2 + (pairs.rejected_ratio_B + 0.5 / beta) ** 2


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """1 − σ(βc) + σ(βr): for answers better than the model's own.  Source: D'Oosterlinck et al. 2024 (APO), arXiv:2408.06266."""
    return 1 - torch.sigmoid(beta * pairs.chosen_ratio_B) + torch.sigmoid(beta * pairs.rejected_ratio_B)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """σ(βc) + 1 − σ(βΔ): for answers worse than the model's own.  Source: D'Oosterlinck et al. 2024 (APO), arXiv:2408.06266."""
    return torch.sigmoid(beta * pairs.chosen_ratio_B) + 1 - torch.sigmoid(beta * pairs.difference_B)


def discopop(pairs: Pairs, *, beta: float = 0.1, temperature: float = 0.05) -> Tensor:
    """(1−m)(−log σ(βΔ)) + m e^{−βΔ} with m = σ(βΔ/τ).  Source: Lu et al. 2024 (DiscoPOP), arXiv:2406.08414."""
    margin_B = beta * pairs.difference_B
    share_B = torch.sigmoid(margin_B / temperature)
    return -F.logsigmoid(margin_B) * (1 - share_B) + torch.exp(-margin_B) * share_B


def ropo(pairs: Pairs, *, beta: float = 0.1, noise_weight: float = 14.0) -> Tensor:
    """4α/(1+α)² (−log σ(βΔ) + α σ(−βΔ)), α the noise_weight: a pair that the policy orders the other way round, perhaps wrongly labelled,
    weighs less than one that it is undecided about.

    The factor makes the largest slope in βΔ 1 where α ≥ 1. Small α is DPO, but for the factor.
    Source: Liang et al. 2024 (ROPO), arXiv:2404.04102.  Differs: the loss alone; the paper also leaves out the pairs of the largest loss
    and samples new ones, over and over.
    """
    margin_B = beta * pairs.difference_B
    return 4 * noise_weight / (1 + noise_weight) ** 2 * (-F.logsigmoid(margin_B) + noise_weight * torch.sigmoid(-margin_B))


def aot(pairs: Pairs, *, beta: float = 0.1, epsilon: float = 0.0) -> Tensor:
    """cDPO of sorted differences: the i-th smallest log π(c)/π(r) minus the i-th smallest log π_ref(c)/π_ref(r).

    The sort is over the pairs of one call, so that the loss depends on how a step is split into micro-batches.
    Source: Melnyk et al. 2024 (AOT, paired), arXiv:2406.05882.
    """
    reference_B = given(pairs.reference_chosen_B, "reference_chosen_B") - given(pairs.reference_rejected_B, "reference_rejected_B")
    return _smoothed((pairs.chosen_B - pairs.rejected_B).sort().values - reference_B.sort().values, beta, epsilon)


def aot_unpaired(pairs: Pairs, *, beta: float = 0.1, epsilon: float = 0.0) -> Tensor:
    """cDPO of sorted differences: the i-th smallest ratio of the chosen answers minus that of the rejected; splits matter as in `aot`.

    Source: Melnyk et al. 2024 (AOT, unpaired), arXiv:2406.05882.
    """
    return _smoothed(pairs.chosen_ratio_B.sort().values - pairs.rejected_ratio_B.sort().values, beta, epsilon)


def sft(pairs: Pairs, *, tokens_per_pair: float | None = None) -> Tensor:
    """The chosen answer's negative log-likelihood, divided by its tokens, or by `tokens_per_pair`.

    With the mean number of chosen tokens over the whole step as `tokens_per_pair`, the mean over pairs is the mean over tokens.
    """
    return -pairs.chosen_B / (given(pairs.chosen_tokens_B, "chosen_tokens_B") if tokens_per_pair is None else tokens_per_pair)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """−log p(chosen) − β log σ(log-odds(chosen) − log-odds(rejected)), p the exponential of the mean log-probability of a token.

    Source: Hong et al. 2024 (ORPO), arXiv:2403.07691, eq. 6 and 7.  Differs: the likelihood counts the answer only, as the paper's
    equation does; TRL's counts the prompt too.
    """
    return -pairs.per_token().chosen_B + odds_ratio(pairs, beta=beta)


def odds_ratio(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """−β log σ(log-odds(chosen) − log-odds(rejected)), without the likelihood of ORPO.  Source: arXiv:2403.07691, eq. 7."""
    mean = pairs.per_token()
    log_odds = (mean.chosen_B - mean.rejected_B) - (_log1mexp(mean.chosen_B) - _log1mexp(mean.rejected_B))
    return -beta * F.logsigmoid(log_odds)


def simpo(pairs: Pairs, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """−log σ(β(mean c − mean r) − γ), without a reference.  Source: Meng et al. 2024 (SimPO), arXiv:2405.14734, eq. 6."""
    mean = pairs.per_token()
    return -F.logsigmoid(beta * (mean.chosen_B - mean.rejected_B) - gamma)


def cpo(pairs: Pairs, *, beta: float = 0.1, nll_coef: float = 1.0) -> Tensor:
    """−log σ(β(c − r)) + nll_coef × NLL per token of the chosen answer, without a reference.

    Source: Xu et al. 2024 (CPO), arXiv:2401.08417.  Differs: the likelihood is a mean over each answer's tokens.
    """
    loss_B = -F.logsigmoid(beta * (pairs.chosen_B - pairs.rejected_B))
    return loss_B if nll_coef == 0 else loss_B + nll_coef * sft(pairs)


def _smoothed(difference_B: Tensor, beta: float, epsilon: float) -> Tensor:
    _check_epsilon(epsilon)
    return -(1 - epsilon) * F.logsigmoid(beta * difference_B) - epsilon * F.logsigmoid(-beta * difference_B)


def _check_epsilon(epsilon: float | Tensor) -> None:
    if not isinstance(epsilon, Tensor) and not 0 <= epsilon < 0.5:
        raise UserError(f"epsilon={epsilon} is not in [0, 0.5). It is the share of labels that are the wrong way round.")


def _log1mexp(value_B: Tensor) -> Tensor:
    """log(1 − e^value) for value < 0, exact near both ends."""
    small = value_B > -math.log(2)
    near_zero = torch.log(-torch.expm1(torch.where(small, value_B, -1.0)))
    return torch.where(small, near_zero, torch.log1p(-torch.exp(torch.where(small, -1.0, value_B))))


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "ropo": ropo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "sft": sft,
    "orpo": orpo,
    "odds_ratio": odds_ratio,
    "simpo": simpo,
    "cpo": cpo,
}


def preference_loss(name: str, pairs: Pairs, *, weights_B: Tensor | None = None, **options: Any) -> tuple[Tensor, int, dict[str, float]]:
    """Return (loss_sum, num_pairs, metrics) of the loss called `name`; `weights_B` multiplies each pair's loss, as in WPO.

    Raises UserError for an unknown loss and for an option that this loss does not read, which is never ignored. Metrics are sums over
    pairs of accuracy (a tie is wrong) and margin, both of `implicit_rewards`.
    """
    loss_B = loss_rows(name, pairs, **options)
    metrics = pair_metrics(pairs, options.get("beta", default_beta(name)))
    return (loss_B if weights_B is None else loss_B * weights_B).sum(), loss_B.numel(), metrics


def mixed_loss(
    pairs: Pairs,
    parts: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    weights_B: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted sum of several losses, one value a pair, and each loss's own sum over pairs as loss_NAME.

    `parts` are the weights and `options` the options by the loss's name; `weights_B` multiplies each pair's loss, as in WPO.
    Source: Wang et al. 2024 (MPO), arXiv:2411.10442, which takes 0.8 sigmoid + 0.2 bco_pair + 1 sft.
    """
    if not parts:
        raise UserError("parts is empty. Name at least one loss, such as {'sigmoid': 1.0}.")
    rows = {name: loss_rows(name, pairs, **dict((options or {}).get(name, {}))) for name in parts}
    total_B = torch.stack([weight * rows[name] for name, weight in parts.items()]).sum(0)
    return total_B if weights_B is None else total_B * weights_B, {f"loss_{name}": float(row.detach().sum()) for name, row in rows.items()}


@torch.no_grad()
def pair_metrics(pairs: Pairs, beta: float) -> dict[str, float]:
    """Return the sums over pairs of accuracy (a tie is wrong) and margin, both of `implicit_rewards`."""
    chosen_B, rejected_B = implicit_rewards(pairs, beta)
    return {"accuracy": float((chosen_B > rejected_B).sum()), "margin": float((chosen_B - rejected_B).sum())}


def default_beta(name: str) -> float:
    """Return the β that a loss takes where none is given; 1 for a loss without."""
    arguments = inspect.signature(PREFERENCE_LOSSES[name]).parameters
    return arguments["beta"].default if "beta" in arguments else 1.0


def loss_rows(
    name: str,
    pairs: Pairs,
    *,
    divergence: str | None = None,
    divergence_alpha: float | None = None,
    length_penalty: float | None = None,
    **options: Any,
) -> Tensor:
    """Return one loss a pair, (B,). Raises UserError for an unknown loss and for an option that it does not read.

    The losses of the difference alone are given another divergence's scores in place of the ratios, where one is named, and with a
    length_penalty α the difference βΔ + α(|chosen| − |rejected|) in place of βΔ, lengths in tokens.
    Source of the latter: Park et al. 2024 (R-DPO), arXiv:2403.19159.
    """
    if name not in PREFERENCE_LOSSES:
        raise UserError(f"loss={name!r} is not one of {', '.join(PREFERENCE_LOSSES)}.")
    function = PREFERENCE_LOSSES[name]
    tie = {"divergence": divergence, "divergence_alpha": divergence_alpha, "length_penalty": length_penalty}
    given_options = options | {option: value for option, value in tie.items() if value is not None}
    known = [*PAIR_OPTIONS[name], *(("tokens_per_pair",) if name == "sft" else ())]
    if unread := [option for option in given_options if option not in known]:
        value = given_options[unread[0]]
        raise UserError(f"{unread[0]}={value} is not read by the loss {name}, which takes {', '.join(known)}. Leave it out.")
    if divergence is not None:
        pairs = pairs.under(divergence, 0.5 if divergence_alpha is None else divergence_alpha)
    if length_penalty is not None:
        pairs = pairs.lengthened(length_penalty / options.get("beta", default_beta(name)))
    return function(pairs, **options)
