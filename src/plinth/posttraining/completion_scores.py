"""The trainer's view of sampled completions: log-probabilities with gradient, at their tokens alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from plinth.data.buckets import padded_width
from plinth.models.transformer import Transformer
from plinth.ops.loss import token_scores


@dataclass(frozen=True)
class CompletionScores:
    """What a model says of each token of completions, columns as in the mask."""

    log_probs_BT: torch.Tensor
    """log-probabilities in nats, with gradient, 0 behind the end"""
    entropy_BT: torch.Tensor | None
    """entropy in nats of each token's distribution, without gradient, where asked for"""
    hidden_BTD: torch.Tensor | None
    """hidden states that each token was predicted from, where asked for"""


def joined_tokens(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return each row's prompt with its completion right behind it, (B, S + C), what is beyond the end filled with id 0."""
    prompts_BS, lengths_B1, completions_BC = rows["prompts"].long(), rows["prompt_tokens"][:, None], rows["completions"].long()
    whole_BT = torch.cat([prompts_BS, torch.zeros_like(completions_BC)], 1)
    places_BC = lengths_B1 + torch.arange(completions_BC.shape[1], device=completions_BC.device)
    whole_BT = whole_BT * (torch.arange(whole_BT.shape[1], device=whole_BT.device) < lengths_B1)
    return whole_BT.scatter(1, places_BC, completions_BC * rows["mask"])


def completion_log_probs(
    model: Transformer, rows: dict[str, torch.Tensor], temperature: float = 1.0, *, entropy: bool = False, hidden: bool = False
) -> CompletionScores:
    """Return what a model says of the completions in rows (`Rollouts.rows`); the head runs at their tokens alone.

    The logits are divided by `temperature`, as they were when the completions were sampled.
    """
    mask_BT, lengths_B1 = rows["mask"], rows["prompt_tokens"][:, None]
    whole_BT = joined_tokens(rows)
    width = min(padded_width(whole_BT.shape[1] - 1), model.config.max_seq_len)
    hidden_BTD = model(F.pad(whole_BT, (0, width - whole_BT.shape[1])))
    sources_BT = (lengths_B1 - 1 + torch.arange(mask_BT.shape[1], device=mask_BT.device)).clamp_max(hidden_BTD.shape[1] - 1)
    batch_BT = torch.arange(len(mask_BT), device=mask_BT.device)[:, None].expand_as(mask_BT)
    counted = mask_BT.flatten().nonzero()[:, 0]
    hidden_ND = hidden_BTD[batch_BT.flatten()[counted], sources_BT.flatten()[counted]]
    targets_N = rows["completions"].flatten()[counted].long()
    cap = model.config.logit_softcap
    found_N, entropy_N = token_scores(hidden_ND, model.output_weight, targets_N, cap, temperature, entropy)

    def spread(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_zeros(mask_BT.numel()).index_put((counted,), values_N).view(mask_BT.shape)

    entropy_BT = None if entropy_N is None else spread(entropy_N)
    states = hidden_BTD[batch_BT, sources_BT] if hidden else None
    return CompletionScores(spread(found_N), entropy_BT, states)
