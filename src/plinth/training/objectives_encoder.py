"""Losses of encoders: hidden tokens, replaced tokens, labels of texts and of words, spans. Each returns a sum, a count and metric sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

RtdTokens = Literal["all", "masked"]


def masked_lm_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]):
    """Return the cross-entropy of hidden tokens; the batch is (inputs, targets, mask), (B, T) each, targets below 0 do not count.

    The head runs on the counted positions only.
    """
    inputs_BT, targets_BT, mask_BT = batch
    loss, scores_NV, targets_N, _ = masked_lm_terms(model, inputs_BT, targets_BT, mask_BT)
    return loss, len(targets_N), {"accuracy": num_right(scores_NV, targets_N)}


def masked_lm_terms(model: nn.Module, inputs_BT, targets_BT, mask_BT):
    """Return the summed loss, the scores and targets of the counted positions, and these positions in the flattened batch."""
    hidden_ND = model(inputs_BT, whole_mask(mask_BT)).flatten(0, 1)
    targets = targets_BT.flatten()
    rows_N = torch.nonzero(targets >= 0)[:, 0]
    scores_NV, targets_N = model.scores(hidden_ND[rows_N]), targets[rows_N]
    return F.cross_entropy(scores_NV.float(), targets_N, reduction="sum"), scores_NV, targets_N, rows_N


def replaced_token_loss(share: float, weight: float = 50.0, tokens: RtdTokens = "all") -> Callable:
    """Return ELECTRA's loss: the generator's cross-entropy on hidden tokens plus `weight` times the discriminator's on which were replaced.

    The batch is (inputs, targets, mask, uniform), (B, T) each: the generator's guess at a hidden token is the one at which its
    probabilities, added up in the order of the ids, reach the position's uniform number. `share` is the share of tokens that is hidden:
    both means are then over all tokens, so that one division serves. With tokens="masked" the discriminator counts the hidden positions
    only. A guess that is right counts as original; no gradient goes through it.
    Source: Clark et al. 2020, arXiv:2003.10555, section 2.  Differs: the first mean is over share · tokens, not over the exact count.
    """

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]):
        inputs_BT, targets_BT, mask_BT, uniform_BT = batch
        mlm, scores_NV, targets_N, rows_N = masked_lm_terms(model.generator, inputs_BT, targets_BT, mask_BT)
        guesses_N = sample_at(scores_NV.detach(), uniform_BT.flatten()[rows_N])
        original_BT = torch.where(targets_BT >= 0, targets_BT, inputs_BT)
        corrupted_BT = original_BT.flatten().index_copy(0, rows_N, guesses_N).view_as(original_BT)
        replaced_BT = (corrupted_BT != original_BT).float()
        logits_BT = model.discriminator.scores(model.discriminator(corrupted_BT, whole_mask(mask_BT))).float()
        counted_BT = mask_BT if tokens == "all" else targets_BT >= 0
        rtd = F.binary_cross_entropy_with_logits(logits_BT, replaced_BT, weight=counted_BT.float(), reduction="sum")
        rtd = rtd if tokens == "all" else rtd / share
        right = ((logits_BT > 0) == (replaced_BT > 0)) & counted_BT
        return (
            mlm / share + weight * rtd,
            mask_BT.sum(dtype=torch.float64),
            {
                "mlm_nats": mlm.detach() / share,
                "rtd_nats": rtd.detach(),
                "rtd_accuracy": right.sum() / (1.0 if tokens == "all" else share),
                "replaced_share": replaced_BT.sum(),
                "generator_accuracy": num_right(scores_NV, targets_N) / share,
            },
        )

    return loss


@torch.no_grad()
def sample_at(scores_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """Return, of each row's distribution softmax(scores), the id at which its cumulative probability passes a uniform number."""
    cumulative_NV = scores_NV.float().softmax(-1).cumsum(-1)
    target_N1 = (uniform_N[:, None].float() * cumulative_NV[:, -1:]).contiguous()
    return torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0].clamp_max(scores_NV.shape[-1] - 1)


def classification_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]):
    """Return the cross-entropy of a label a text; the batch is (tokens, mask, segments), (B, T) each, and labels (B,)."""
    tokens_BT, mask_BT, segments_BT, labels_B = batch
    scores = model.scores(model(tokens_BT, whole_mask(mask_BT), segments_BT))
    return F.cross_entropy(scores.float(), labels_B, reduction="sum"), len(labels_B), {"accuracy": num_right(scores, labels_B)}


def tagging_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]):
    """Return the cross-entropy of a label a word; the batch is (tokens, mask, segments, labels), (B, T), labels below 0 do not count."""
    tokens_BT, mask_BT, segments_BT, labels_BT = batch
    hidden_ND = model(tokens_BT, whole_mask(mask_BT), segments_BT).flatten(0, 1)
    rows_N = torch.nonzero(labels_BT.flatten() >= 0)[:, 0]
    scores, labels_N = model.scores(hidden_ND[rows_N]), labels_BT.flatten()[rows_N]
    return F.cross_entropy(scores.float(), labels_N, reduction="sum"), len(labels_N), {"accuracy": num_right(scores, labels_N)}


def span_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]):
    """Return the mean of the cross-entropies of an answer's first and last token over the row's positions, summed over rows.

    The batch is (tokens, mask, segments), (B, T) each, and spans (B, 2); a question without an answer has its span at position 0.
    Source: Devlin et al. 2018, arXiv:1810.04805, section 4.2 and 4.3.
    """
    tokens_BT, mask_BT, segments_BT, spans_B2 = batch
    scores_BT2 = model.scores(model(tokens_BT, whole_mask(mask_BT), segments_BT)).float()
    scores_B2T = scores_BT2.masked_fill(~mask_BT[..., None], -torch.inf).transpose(1, 2)
    loss = F.cross_entropy(scores_B2T.flatten(0, 1), spans_B2.flatten(), reduction="sum") / 2
    right = (scores_B2T.argmax(-1) == spans_B2).all(-1).sum()
    return loss, len(spans_B2), {"exact": right}


def num_right(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return how many rows of scores are highest at their target."""
    return (scores.detach().argmax(-1) == targets).sum()


def whole_mask(mask_BT: torch.Tensor) -> torch.Tensor | None:
    """Return None for a mask that hides nothing, so that attention takes its faster way; on a GPU, where asking would wait, the mask."""
    return None if mask_BT.device.type == "cpu" and bool(mask_BT.all()) else mask_BT
