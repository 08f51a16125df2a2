"""Scores of a learnt reward model for answers, as training with rewards, best-of-n and reports want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import padded_width
from plinth.models.hub import load_decoder, load_model, read_config
from plinth.models.reward import RewardConfig, RewardModel
from plinth.posttraining.examples import unweighted
from plinth.posttraining.masks import render_weighted
from plinth.run import find_model
from plinth.tokenizer.chat import Message
from plinth.tokenizer.encode import Tokenizer
from plinth.training.precision import DTYPES

BATCH_TOKENS = 4096  # of one forward pass, padding included


@dataclass(frozen=True)
class LoadedReward:
    """A reward model with its tokenizer, ready to score."""

    model: RewardModel
    """on the device and in the type that it computes in"""
    tokenizer: Tokenizer
    """what its texts are rendered by"""

    def score(self, prompts: Sequence[str | list[Message]], answers: Sequence[str | list[Message]]) -> list[float]:
        """Return the score of each answer to its prompt; a prompt is the user's message or a conversation before the answer.

        Raises ValueError when the two differ in length, and UserError for what cannot be rendered or is longer than the context.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts for {len(answers)} answers.")
        return self.score_tokens([self.render(prompt, answer) for prompt, answer in zip(prompts, answers)]).tolist()

    def render(self, prompt: str | list[Message], answer: str | list[Message]) -> list[int]:
        """Return the tokens that are scored: the conversation with the answer and what ends it."""
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        return render_weighted(self.tokenizer, [*unweighted(before), *after]).tokens

    @torch.no_grad()
    def score_tokens(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the scores of rows of tokens, fp32 (N,) on the CPU, each read at its row's last token; like lengths share a pass.

        Raises UserError for a row without tokens or longer than the context.
        """
        limit, device = self.model.config.max_seq_len, self.model.score.weight.device
        for i, row in enumerate(rows):
            if not 0 < len(row) <= limit:
                raise UserError(f"text {i} has {len(row)} tokens; a reward model of max_seq_len={limit} scores 1 to {limit}.")
        scores = torch.zeros(len(rows))
        for part in like_lengths([len(row) for row in rows], BATCH_TOKENS):
            tokens_BT, lengths_B = pad_right([rows[i] for i in part], self.tokenizer.pad_id or 0, limit)
            scores[part] = self.model(tokens_BT.to(device), lengths_B.to(device)).cpu()
        return scores


def load_reward(run: Path | str, *, device: str = "cpu", dtype: str = "float32") -> LoadedReward:
    """Load the reward model of a run or of a folder in the Hugging Face format with one label.

    Raises UserError when it holds another kind of model.
    """
    folder = find_model(Path(run))
    model = load_model(folder, DTYPES[dtype])
    if not isinstance(model, RewardModel):
        raise UserError(f"{run} holds no reward model. Train one with `plinth reward {run} --data PAIRS --out NEW`.")
    return LoadedReward(model.to(device).eval(), Tokenizer.load(folder))


def start_model(source: Path, seed: int) -> RewardModel:
    """Return a reward model on a decoder's weights, or the reward model that the folder holds."""
    if isinstance(read_config(source)[1], RewardConfig):
        model = load_model(source)
        assert isinstance(model, RewardModel)
        return model
    return RewardModel.from_decoder(load_decoder(source), torch.Generator().manual_seed(seed))


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, max_seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens (B, T), lengths (B,)): T is the longest row rounded up to a multiple of WIDTH_STEP, at most `max_seq_len`."""
    tokens_BT = torch.full((len(rows), min(padded_width(max(len(row) for row in rows)), max_seq_len)), pad_id)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = torch.as_tensor(row)
    return tokens_BT, torch.tensor([len(row) for row in rows])


def like_lengths(lengths: Sequence[int], most_tokens: int) -> list[np.ndarray]:
    """Deal rows into batches of like lengths, of at most so many tokens with padding but of one row at least; each row once."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    parts: list[list[int]] = []
    for i in order.tolist():
        if parts and (len(parts[-1]) + 1) * padded_width(lengths[i]) <= most_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return [np.array(part) for part in parts]
