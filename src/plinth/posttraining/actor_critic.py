"""Policy and critic as one trained model, and the ways in which their batches may stand."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError
from plinth.data.buckets import padded_width
from plinth.models.config import DecoderConfig
from plinth.models.reward import RewardModel
from plinth.models.transformer import Transformer
from plinth.posttraining.completion_scores import completion_log_probs, joined_tokens
from plinth.posttraining.rollouts import Rows

DROPOUT_SEED = 0x5EED


@dataclass(frozen=True)
class View:
    """How updates see rows; see PpoConfig for what the fields are for."""

    temperature: float = 1.0
    """divisor of the logits"""
    padding: str = "right"
    """right, left or left_unadjusted"""
    dropout: float = 0.0
    """share of the last hidden states' numbers that are dropped"""
    reads_prompt: bool = True
    """whether the critic does"""


@dataclass(frozen=True)
class Judged:
    """What policy and critic say of completions, columns as in the mask."""

    log_probs_BT: torch.Tensor
    """log-probabilities of the tokens in nats, 0 behind the end"""
    entropy_BT: torch.Tensor
    """entropy in nats of each token's distribution, without gradient"""
    values_BT: torch.Tensor
    """expected return before each token, fp32, 0 behind the end"""


class SeenRows:
    """A decoder that sees rows as a view says; stands for it where hidden states of joined rows are asked for."""

    def __init__(self, model: Transformer, rows: Rows, view: View):
        self.model, self.view = model, view
        self.config, self.output_weight = model.config, model.output_weight
        self.lengths_B = rows["prompt_tokens"] + rows["mask"].sum(1)
        self.seed = int(rows["completions"].sum())

    def __call__(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return hidden states (B, T, D), in the places of right padding whatever the view's."""
        hidden_BTD = self.model(tokens_BT) if self.view.padding == "right" else self._left(tokens_BT)
        if not self.view.dropout:
            return hidden_BTD
        generator = torch.Generator(hidden_BTD.device).manual_seed(DROPOUT_SEED + self.seed)
        kept = torch.rand(hidden_BTD.shape, generator=generator, device=hidden_BTD.device) >= self.view.dropout
        return hidden_BTD * kept / (1 - self.view.dropout)

    def _left(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        width = tokens_BT.shape[1]
        places_T, fill_B1 = torch.arange(width, device=tokens_BT.device), (width - self.lengths_B)[:, None]
        moved_BT = tokens_BT.gather(1, (places_T - fill_B1) % width)
        adjusted = self.view.padding == "left"
        hidden_BTD = self.model(moved_BT, (places_T >= fill_B1).long()) if adjusted else self.model(moved_BT)
        back_BT = (places_T + fill_B1) % width
        return hidden_BTD.gather(1, back_BT[..., None].expand_as(hidden_BTD))


class ActorCritic(nn.Module):
    """The policy, and a critic that is a reward model of its own or a head on the policy's hidden states."""

    def __init__(self, policy: Transformer, critic: RewardModel | None):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head = nn.Linear(policy.config.hidden_size, 1, bias=False) if critic is None else None

    @property
    def config(self) -> DecoderConfig:
        return self.policy.config

    @property
    def layers(self) -> nn.ModuleList:
        """The policy's blocks, for who compiles them."""
        return self.policy.layers

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices of both by parameter name, each with the row counts of the projections fused in it."""
        parts = {f"policy.{name}": rows for name, rows in self.policy.matrix_parts().items()}
        if self.critic is not None:
            parts |= {f"critic.{name}": rows for name, rows in self.critic.matrix_parts().items()}
        return parts

    def critic_names(self) -> list[str]:
        """Return the names of the parameters that only the critic has."""
        return [name for name, _ in self.named_parameters() if not name.startswith("policy.")]

    def judge(self, rows: Rows, view: View) -> Judged:
        """Return what both say of the completions in rows (`Rollouts.rows`), with gradient."""
        seen = SeenRows(self.policy, rows, view)
        scores = completion_log_probs(seen, rows, view.temperature, entropy=True, hidden=self.critic is None)  # type: ignore[arg-type]
        if self.critic is None:
            values_BT = self.read_values(scores.hidden_BTD)
        else:
            values_BT = self.values(rows, view)[0]
        assert scores.entropy_BT is not None
        return Judged(scores.log_probs_BT, scores.entropy_BT, values_BT * rows["mask"])

    def values(self, rows: Rows, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values before each token (B, C), 0 behind the end, and those behind the last token (B,)."""
        if not view.reads_prompt:
            rows = rows | {"prompts": rows["prompts"][:, :1], "prompt_tokens": torch.ones_like(rows["prompt_tokens"])}
        trunk = self.policy if self.critic is None else self.critic.trunk
        columns = rows["mask"].shape[1] + 1
        whole_BT = joined_tokens(rows)
        width = min(padded_width(whole_BT.shape[1]), trunk.config.max_seq_len)
        hidden_BTD = SeenRows(trunk, rows, view)(F.pad(whole_BT, (0, width - whole_BT.shape[1])))
        places_BC = rows["prompt_tokens"][:, None] - 1 + torch.arange(columns, device=whole_BT.device)
        places_BC = places_BC.clamp_max(hidden_BTD.shape[1] - 1)
        values_BC = self.read_values(hidden_BTD.gather(1, places_BC[..., None].expand(-1, -1, hidden_BTD.shape[2])))
        ends_B = rows["mask"].sum(1, keepdim=True)
        return values_BC[:, :-1] * rows["mask"], values_BC.gather(1, ends_B)[:, 0]

    def read_values(self, hidden: torch.Tensor | None) -> torch.Tensor:
        """Return the values of hidden states (..., D), fp32 (...)."""
        assert hidden is not None
        if self.critic is not None:
            return self.critic.read(hidden)
        assert self.value_head is not None
        return (hidden.float() * self.value_head.weight[0].float()).sum(-1)


def new_actor_critic(
    policy: Transformer, base: Transformer, *, trunk: str, start: RewardModel | None, head: str, generator: torch.Generator
) -> ActorCritic:
    """Return policy and critic; see CriticConfig. `start` is a reward model, `base` the policy's weights as they came in.

    Raises UserError where the head of a reward model is asked for and there is none, or where its vocabulary is another.
    """
    if head == "reward" and (start is None or trunk == "shared"):
        raise UserError("critic.head=reward needs a reward model to take it from: name one in critic.start, or use zero or normal.")
    if trunk == "shared":
        model = ActorCritic(policy, None)
        assert model.value_head is not None
        weight = model.value_head.weight
    else:
        if start is not None and start.config.vocab_size != policy.config.vocab_size:
            raise UserError(
                f"critic.start has {start.config.vocab_size} token ids and the policy {policy.config.vocab_size}: they read other tokens. "
                "Take a reward model made from the same base, or leave critic.start out with another reward."
            )
        critic = RewardModel.from_decoder(copy.deepcopy(base), generator) if start is None else copy.deepcopy(start).float()
        critic.requires_grad_(True)
        model = ActorCritic(policy, critic)
        weight = critic.score.weight
        if head != "reward":
            critic.config = replace(critic.config, bias=0.0)
    with torch.no_grad():
        if head == "zero":
            weight.zero_()
        elif head == "normal":
            weight.normal_(0.0, (weight.shape[1] + 1) ** -0.5, generator=generator)
    return model
