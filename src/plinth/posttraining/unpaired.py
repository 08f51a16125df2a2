"""Learning from single answers that are called good or bad (KTO and its kin): rows, the reference point of a step, and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.models.transformer import Transformer
from plinth.posttraining.examples import Examples, Unpaired
from plinth.posttraining.log_probs import sequence_log_probs
from plinth.posttraining.masks import render_row
from plinth.posttraining.pairs import LeftRow, check_learnable, left_row
from plinth.posttraining.unpaired_losses import UNPAIRED_LOSSES, kto_reference_point
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer


@dataclass(frozen=True)
class LabelledAnswer:
    """A prompt with an answer that is wanted or not, rendered."""

    answer: Rendered
    """the prompt with its answer"""
    wanted: bool
    """whether the answer is wanted"""
    mismatched: Rendered | None = None
    """the prompt with another prompt's answer, from which KTO estimates the KL; None for other losses"""


def render_labelled(
    tokenizer: Tokenizer, found: Examples, max_seq_len: int, *, mismatch: bool, seed: int
) -> tuple[list[LabelledAnswer], list[LeftRow]]:
    """Return the answers that can be learnt, and the rows that cannot.

    With `mismatch` each prompt is joined with the answer of the next row, in an order drawn with `seed`, whose prompt is another.
    Raises UserError when all prompts are the same, of which no mismatch can be made.
    """
    kept: list[tuple[Unpaired, Rendered]] = []
    left_out: list[LeftRow] = []
    for number, row in zip(found.numbers, found.rows):
        try:
            rendered = render_row(tokenizer, row)[0].rendered
            check_learnable(rendered, "answer", max_seq_len)
        except UserError as error:
            left_out.append(left_row(number, error))
            continue
        kept.append((row, rendered))
    if not mismatch:
        return [LabelledAnswer(rendered, row.label) for row, rendered in kept], left_out
    others = mismatches([row for row, _ in kept], seed)
    answers = []
    for (row, rendered), other in zip(kept, others):
        crossed = render_row(tokenizer, Unpaired(row.prompt, kept[other][0].completion, row.label))[0].rendered
        answers.append(LabelledAnswer(rendered, row.label, _fitting(crossed, max_seq_len)))
    return answers, left_out


def _fitting(rendered: Rendered, max_seq_len: int) -> Rendered:
    """Cut the end of a mismatched answer that does not fit: it is measured, never learnt."""
    return Rendered(rendered.tokens[: max_seq_len + 1], rendered.loss_mask[: max_seq_len + 1])


def mismatches(rows: Sequence[Unpaired], seed: int) -> list[int]:
    """Return for each row the number of a row with another prompt; each row's answer is taken about as often as any other's."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
    others = [-1] * len(rows)
    for place, row in enumerate(order):
        for step in range(1, len(rows)):
            other = order[(place + step) % len(rows)]
            if rows[other].prompt != rows[row].prompt:
                others[row] = int(other)
                break
        else:
            raise UserError("all prompts are the same, so the KL of kto cannot be estimated. Use --loss apo_zero_unpaired or bco.")
    return others


def unpaired_loss(
    policy: Transformer, batch: tuple[torch.Tensor, ...], loss: str, options: Mapping[str, Any]
) -> tuple[torch.Tensor, int, dict[str, float]]:
    """Return (loss_sum, answers, metrics) of (inputs, targets (B, 1, T), wanted, reference log-probabilities, reference points (B,)).

    The reference point is that of the whole step, so that the loss does not depend on how the step is split. Metrics are sums over
    answers: accuracy (the log-ratio on the right side of the point), margin (by how much, times β), wanted, wanted_fell (wanted
    answers that have become less likely), and the point.
    """
    inputs_BRT, targets_BRT, wanted_B, reference_B, point_B = batch
    log_probs_B = sequence_log_probs(policy, inputs_BRT[:, 0], targets_BRT[:, 0])
    ratio_B = log_probs_B - reference_B
    given = (ratio_B, wanted_B) if loss == "apo_zero_unpaired" else (ratio_B, wanted_B, point_B)
    loss_B = UNPAIRED_LOSSES[loss](*given, **options)
    with torch.no_grad():
        beta = options.get("beta", 0.1)
        gain_B = beta * ratio_B - point_B * (1.0 if loss == "bco" else beta)
        right_B = torch.where(wanted_B, gain_B, -gain_B)
        metrics = {
            "accuracy": float((right_B > 0).sum()),
            "margin": float(right_B.sum()),
            "wanted": float(wanted_B.sum()),
            "wanted_fell": float((wanted_B & (ratio_B < 0)).sum()),
            {"kto": "kl", "bco": "shift"}.get(loss, "point"): float(point_B.sum()),
            "answer_tokens": float((targets_BRT >= 0).sum()),
        }
    return loss_B.sum(), len(loss_B), metrics


def reference_point(
    loss: str,
    policy_parts: Sequence[torch.Tensor],
    reference_parts: Sequence[torch.Tensor],
    wanted_parts: Sequence[torch.Tensor],
    beta: float,
) -> float:
    """Return a step's reference point from the log-probabilities of its micro-batches: KTO's KL, or BCO's shift, in nats.

    KTO's are of mismatched answers. BCO's shift is the mean of the wanted answers' mean reward and of the unwanted ones'.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306; Jung et al. 2024, arXiv:2404.04656.
    Differs: both are of the step's own answers; BCO's paper takes a running mean over steps.
    """
    policy_B, reference_B, wanted_B = (torch.cat(list(parts)) for parts in (policy_parts, reference_parts, wanted_parts))
    if loss == "kto":
        return float(kto_reference_point(policy_B, reference_B))
    rewards_B = beta * (policy_B - reference_B)
    means = [rewards_B[chosen_B].mean() for chosen_B in (wanted_B, ~wanted_B) if chosen_B.any()]
    return float(torch.stack(means).mean())


def weight_advice(wanted: int, unwanted: int, loss: str, options: Mapping[str, Any]) -> str | None:
    """Return what to say when there is one kind of answer only, or the weights of kto leave one far heavier; None when all is well.

    Source: Ethayarajh et al. 2024, section 4.2: the weights times the counts should stand as 1 to 1 up to 4 to 3.
    """
    if not wanted or not unwanted:
        kind = "wanted" if not wanted else "unwanted"
        return f"there is no {kind} answer: the loss can be lowered by making every answer {'less' if not wanted else 'more'} likely."
    share = options.get("desirable_weight", 1.0) * wanted / (options.get("undesirable_weight", 1.0) * unwanted)
    if loss != "kto" or 0.75 <= share <= 4 / 3:
        return None
    name, weight = ("--undesirable-weight", wanted / unwanted) if wanted > unwanted else ("--desirable-weight", unwanted / wanted)
    return f"{wanted} wanted answers weigh {share:.2f} times as much as {unwanted} unwanted ones. {name} {weight:.2f} makes them equal."
