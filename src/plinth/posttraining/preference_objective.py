"""The objective of preference tuning: from a batch of pairs to the sum of its losses, through the answers' log-probabilities."""

from __future__ import annotations

import torch

from plinth.models.transformer import Transformer
from plinth.ops.collision import log_sum_squares
from plinth.ops.loss import token_log_probs
from plinth.posttraining.log_probs import counted_tokens, sequence_log_probs, shared_log_probs
from plinth.posttraining.pair_scores import Pairs, shared_length_log_probs, wpo_weights
from plinth.posttraining.pairs import SHARED_PARTS, SharedBatch, shared_rows_of
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.preference_losses import default_beta, mixed_loss, pair_metrics
from plinth.training.objectives import select_rows

Metrics = dict[str, float]


def sides_log_probs(model: Transformer, inputs_BRT: torch.Tensor, targets_BRT: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability in nats of the counted targets of each example's sequences, shape (B, R)."""
    return sequence_log_probs(model, inputs_BRT.flatten(0, 1), targets_BRT.flatten(0, 1)).view(inputs_BRT.shape[:2])


def pairs_log_probs(model: Transformer, batch: SharedBatch) -> torch.Tensor:
    """Return the summed log-probability in nats of each pair's two answers, shape (B, 2); their prompt is computed once."""
    return shared_log_probs(model, batch[0], batch[1], shared_rows_of(batch))


def answers_token_log_probs(model: Transformer, batch: SharedBatch, squares: bool = False) -> tuple[torch.Tensor, ...]:
    """Return the log-probability in nats of each counted token of both answers, and whether it counts, both (B, 2, T); else 0.

    With `squares` also log Σ_v p(v)² of the model's distribution at each of them, without gradient.
    """
    rows, targets_N = shared_rows_of(batch), batch[1].flatten()
    counted_N = targets_N >= 0
    chosen = select_rows(counted_N, int(counted_N.sum()))
    hidden_ND = model(batch[0], shared=rows).flatten(0, 1)[chosen]
    found = [token_log_probs(hidden_ND, model.output_weight, targets_N[chosen], model.config.logit_softcap)]
    if squares:
        sums = log_sum_squares(hidden_ND.detach(), model.output_weight.detach(), model.config.logit_softcap)
        found.append(torch.where(counted_N[chosen], sums, 0.0))
    spread = [values.new_zeros(len(targets_N)).index_put((chosen,), values).view_as(batch[1]) for values in found]
    spread.insert(1, counted_N.to(found[0].dtype).view_as(batch[1]))
    return tuple(rows.expand(values_BL[..., None]).view(rows.places_BRT.shape) for values_BL in spread)


def desensitised_log_probs(log_probs_B2T: torch.Tensor, counted_B2T: torch.Tensor, tail_weight: float) -> torch.Tensor:
    """Return each answer's summed log-probability (B, 2) with its tokens beyond the other's length weighed by `tail_weight`; see LD-DPO."""
    shorter_B2 = counted_B2T.sum(2).min(1, keepdim=True).values.expand(-1, 2)
    found = shared_length_log_probs(log_probs_B2T.flatten(0, 1), counted_B2T.flatten(0, 1), shorter_B2.flatten(), tail_weight)
    return found.view(shorter_B2.shape)


def in_answer_order(log_probs_B2T: torch.Tensor, counted_B2T: torch.Tensor, width: int) -> torch.Tensor:
    """Return the counted tokens' log-probabilities, each answer's one after the other from the left, (B, 2, width), 0 behind its end."""
    places_B2T = torch.where(counted_B2T != 0, counted_B2T.long().cumsum(2) - 1, width)
    return log_probs_B2T.new_zeros(*log_probs_B2T.shape[:2], width + 1).scatter(2, places_B2T, log_probs_B2T)[:, :, :width]


def reference_pairs_log_probs(model: Transformer, batch: SharedBatch, config: DpoConfig, width: int = 1) -> torch.Tensor:
    """Return what the loss reads of the reference, (B, 2); with config.down_sample of each token of answers of `width`, (B, 2 width)."""
    if config.tail_weight is None and not config.down_sample:
        return pairs_log_probs(model, batch)
    log_probs_B2T, counted_B2T = answers_token_log_probs(model, batch)
    if config.tail_weight is None:
        return in_answer_order(log_probs_B2T, counted_B2T, width).flatten(1)
    return desensitised_log_probs(log_probs_B2T, counted_B2T, config.tail_weight)


def policy_pairs_log_probs(
    model: Transformer, batch: SharedBatch, config: DpoConfig, kept_B2W: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return both answers' summed log-probabilities, the same as the loss reads them, both (B, 2), and the pairs' weights (B,) if any.

    `kept_B2W` is true for each token of the answers that the loss reads, where it does not read all.
    """
    if config.tail_weight is None and kept_B2W is None and not config.weigh_by_policy:
        sums_B2 = pairs_log_probs(model, batch)
        return sums_B2, sums_B2, None
    log_probs_B2T, counted_B2T, *squares = answers_token_log_probs(model, batch, squares=config.weigh_by_policy)
    read_B2 = sums_B2 = log_probs_B2T.sum(2)
    if config.tail_weight is not None:
        read_B2 = desensitised_log_probs(log_probs_B2T, counted_B2T, config.tail_weight)
    elif kept_B2W is not None:
        read_B2 = (in_answer_order(log_probs_B2T, counted_B2T, kept_B2W.shape[2]) * kept_B2W).sum(2)
    if not squares:
        return sums_B2, read_B2, None
    aligned = (log_probs_B2T.detach() - squares[0]).unbind(1)
    masks = counted_B2T.unbind(1)
    return sums_B2, read_B2, wpo_weights(aligned[0], masks[0], aligned[1], masks[1])


def pairs_loss(policy: Transformer, batch: tuple[torch.Tensor, ...], config: DpoConfig) -> tuple[torch.Tensor, int, Metrics]:
    """Return (loss_sum, num_pairs, metrics) of a SharedBatch and reference log-probabilities (B, 2), chosen before rejected.

    One tensor more (B,) holds each pair's own epsilon; with config.down_sample the last (B, 2, W) is true at the tokens that are read.

    Beside accuracy and margin: both answers' log-probabilities in nats and tokens; with a reference, their log-ratios to it and
    chosen_fell, the pairs whose chosen answer has become less likely than it was, all as the loss reads them; of a mix each loss by its
    name; with weigh_by_policy the weights. All are sums over pairs.
    """
    shared, (reference_B2, *epsilon) = batch[:SHARED_PARTS], batch[SHARED_PARTS:]
    kept_B2W = epsilon.pop() if config.down_sample else None
    sums_B2, read_B2, weights_B = policy_pairs_log_probs(policy, shared, config, kept_B2W)
    tokens_B2 = counted_tokens(shared[1], shared_rows_of(shared))
    references = reference_B2.unbind(1) if config.needs_reference else (None, None)
    pairs = Pairs(*read_B2.unbind(1), *references, *(tokens_B2 if kept_B2W is None else kept_B2W.sum(2)).unbind(1))
    options = {name: config.options_of(name) for name in config.parts}
    if epsilon:
        options["cdpo"]["epsilon"] = epsilon[0]
    loss_B, parts = mixed_loss(pairs, config.parts, options, weights_B)
    metrics = pair_metrics(pairs, config.beta or default_beta(next(iter(config.parts))))
    metrics |= _answer_metrics(pairs, sums_B2.detach(), tokens_B2) | (parts if len(parts) > 1 else {})
    if weights_B is not None:
        metrics["weight"] = float(weights_B.sum())
    return loss_B.sum() - config.nll_coef * sums_B2[:, 0].sum(), len(loss_B), metrics


@torch.no_grad()
def _answer_metrics(pairs: Pairs, sums_B2: torch.Tensor, tokens_B2: torch.Tensor) -> Metrics:
    """Return the sums over pairs of what is measured of each side."""
    metrics = {}
    for i, side in enumerate(("chosen", "rejected")):
        metrics[f"{side}_log_prob"], metrics[f"{side}_tokens"] = float(sums_B2[:, i].sum()), float(tokens_B2[:, i].sum())
    if pairs.reference_chosen_B is not None:
        metrics["chosen_ratio"], metrics["rejected_ratio"] = float(pairs.chosen_ratio_B.sum()), float(pairs.rejected_ratio_B.sum())
        metrics["chosen_fell"] = float((pairs.chosen_ratio_B < 0).sum())
    return metrics
