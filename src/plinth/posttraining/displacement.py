"""What preference tuning did to the answers themselves: whether the chosen ones became less likely; whether length told sides apart.

A loss of pairs asks for a difference alone: it falls when both answers become less likely, the rejected one faster. That is what
people see as "the chosen reward drops"; far enough, the model writes neither answer but something else.
Source: Razin et al. 2024, arXiv:2410.08847 (likelihood displacement).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LAST_SHARE = 0.1  # of the steps, at the end, that the summary averages
FELL_SHARE = 0.5  # of the chosen answers: more than that is said
FELL_NATS = 0.05  # on average: less is not worth a word
LENGTH_SHARE = 0.6
FEWEST = 20  # pairs below which a share says nothing
AVERAGED = ("accuracy", "margin", "chosen_ratio", "rejected_ratio", "chosen_fell", "chosen_tokens", "rejected_tokens", "wanted_fell", "kl")


def last_means(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the means of what the last tenth of the steps logged, by name."""
    last = metrics[-max(1, round(LAST_SHARE * len(metrics))) :]
    found = {name: [record[name] for record in last if record.get(name) is not None] for name in AVERAGED}
    return {name: math.fsum(values) / len(values) for name, values in found.items() if values}


def displacement(means: Mapping[str, float], nll_coef: float) -> str | None:
    """Return what to say, and to do, when most chosen answers have become less likely; None when they have not."""
    if means.get("chosen_fell", 0.0) <= FELL_SHARE or means.get("chosen_ratio", 0.0) > -FELL_NATS:
        return None
    return (
        f"{means['chosen_fell']:.0%} of the chosen answers have become less likely than they were, by {-means['chosen_ratio']:.1f} nats on "
        f"average (the rejected ones by {-means['rejected_ratio']:.1f}): the loss is content with the difference. Look at what the model "
        f"writes now. Raise --chosen-nll-coef (it was {nll_coef:g}) to hold the chosen answers up, or lower the rates or --epochs; "
        "training on the chosen answers first (plinth sft) helps too."
    )


def length_bias(chosen: Sequence[int], rejected: Sequence[int]) -> str | None:
    """Return what to say when length alone tells most pairs apart, given both answers' tokens; None when it does not."""
    told = [a > b for a, b in zip(chosen, rejected) if a != b]
    share = max(sum(told), len(told) - sum(told)) / len(told) if told else 0.0
    if len(told) < FEWEST or share < LENGTH_SHARE:
        return None
    side = "longer" if 2 * sum(told) > len(told) else "shorter"
    return (
        f"the {side} answer is the chosen one in {share:.0%} of the pairs whose lengths differ: length alone can be learnt. Compare "
        "lengths before and after (chosen_tokens, rejected_tokens), or take a loss of means over tokens: simpo, sigmoid_norm, ipo, orpo."
    )
