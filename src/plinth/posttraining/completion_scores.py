"""The trainer's view of sampled completions: log-probabilities with gradient, at their tokens alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from plinth.data.buckets import padded_width
from plinth.models.transformer import Transformer
from plinth.ops.loss import token_scores
from plinth.ops.shared_rows import SharedRows, share_rows

SHARE = 0.3  # of a group's tokens: a prompt of 16 before 8 completions of 32 is more


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
    model: Transformer,
    rows: dict[str, torch.Tensor],
    temperature: float = 1.0,
    *,
    group_size: int = 1,
    entropy: bool = False,
    hidden: bool = False,
) -> CompletionScores:
    """Return what a model says of the completions in rows (`Rollouts.rows`); the head runs at their tokens alone.

    The logits are divided by `temperature`, as they were when the completions were sampled. Where each `group_size` rows have one prompt
    and it pays (`sharing_pays`), it is computed once for all of them; the result is the same but for rounding.
    """
    mask_BT = rows["mask"]
    batch_BT = torch.arange(len(mask_BT), device=mask_BT.device)[:, None].expand_as(mask_BT)
    sources_BT = rows["prompt_tokens"][:, None] - 1 + torch.arange(mask_BT.shape[1], device=mask_BT.device)
    if sharing_pays(rows, group_size, model.config.max_seq_len):
        lie, tokens_PL = shared_prompts(rows, group_size)
        hidden_BTD = model(tokens_PL, shared=lie)
        places_NT = lie.places_BRT.flatten(0, 1)
        sources_BT = places_NT.gather(1, sources_BT.clamp_max(lie.width - 1))
        batch_BT = batch_BT // group_size
    else:
        whole_BT = joined_tokens(rows)
        width = min(padded_width(whole_BT.shape[1] - 1), model.config.max_seq_len)
        hidden_BTD = model(F.pad(whole_BT, (0, width - whole_BT.shape[1])))
        sources_BT = sources_BT.clamp_max(width - 1)
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


def sharing_pays(rows: dict[str, torch.Tensor], group_size: int, max_seq_len: int) -> bool:
    """Return whether each group has one prompt, and computing it once saves SHARE of the tokens, which pays for copies."""
    prompts_NS, prompt_N, length_N = rows["prompts"], rows["prompt_tokens"], rows["mask"].sum(1)
    if group_size < 2 or prompts_NS.device.type != "cpu" or len(prompts_NS) % group_size:
        return False
    saved = int(prompt_N.view(-1, group_size)[:, 1:].sum())
    if saved < SHARE * int((prompt_N + length_N).sum()) or padded_width(int((prompt_N + length_N).max())) > max_seq_len:
        return False
    groups, lengths = prompts_NS.view(-1, group_size, prompts_NS.shape[1]), prompt_N.view(-1, group_size)
    return bool((groups == groups[:, :1]).all() and (lengths == lengths[:, :1]).all())


def shared_prompts(rows: dict[str, torch.Tensor], group_size: int) -> tuple[SharedRows, torch.Tensor]:
    """Return how each group's sequences, all but their last tokens, lie in a row in which the prompt stands once, and the rows' tokens."""
    prompts, completions = rows["prompts"].tolist(), rows["completions"].tolist()
    lengths, counts = rows["prompt_tokens"].tolist(), rows["mask"].sum(1).tolist()
    sequences = [prompts[i][: lengths[i]] + completions[i][: counts[i] - 1] for i in range(len(prompts))]
    examples = [sequences[i : i + group_size] for i in range(0, len(sequences), group_size)]
    shared = lengths[::group_size]
    longest = max(sum(map(len, each)) - (group_size - 1) * common for each, common in zip(examples, shared))
    return share_rows(examples, shared, padded_width(longest + 1), padded_width(max(map(len, sequences)) + 1))
