"""The loss that a plan's law predicts on the way, to be drawn beside the loss that comes."""

from __future__ import annotations

import math
from pathlib import Path

from plinth.config import UserError, load_config
from plinth.scaling.candidates import predict_bpb
from plinth.scaling.laws import LAWS, NATS_PER_BIT, ChinchillaLaw
from plinth.scaling.plan_record import Plan

AGREEMENT = 0.01


def predicted_curve(plan: Plan, points: int = 80) -> list[tuple[float, float]]:
    """Return (tokens, nats a token) from the first tokens at which the law beats guessing to the plan's last.

    Each point is the held-out loss of a run of the planned size whose learning rate has fallen to zero after that many tokens; a
    longer run is above it there, until its own rate falls. Empty when the law that made the plan is not at hand any more.
    """
    law = plan_law(plan)
    if law is None:
        return []
    bytes_per_token = plan.corpus.bytes_per_token(plan.model.vocab_size)

    def loss(tokens: float) -> float:
        bpb = predict_bpb(law, plan.model, plan.optimizer, plan.corpus, tokens * bytes_per_token, plan.config)
        return bpb * NATS_PER_BIT * bytes_per_token

    if abs(loss(plan.tokens) / plan.predicted.loss_nats - 1.0) > AGREEMENT:
        return []
    tokens = [plan.tokens * 10.0 ** (-4.0 * (1.0 - i / (points - 1))) for i in range(points)]
    return [(count, value) for count in tokens if (value := loss(count)) <= math.log(plan.model.vocab_size)]


def plan_law(plan: Plan) -> ChinchillaLaw | None:
    """Return the law that a plan minimised, or None when it was one of the user's own whose file is gone."""
    if not plan.laws:
        return None
    known = next((law for law in LAWS.values() if law.name == plan.laws[0].law), None)
    if known is not None or not (plan.config.law or "").endswith(".json"):
        return known
    try:
        return load_config(ChinchillaLaw, Path(plan.config.law))
    except UserError:
        return None
