"""Modules that are trained and saved whole beside adapters: the embedding, the head, and the score of a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from plinth.config import UserError, nearest
from plinth.models.hub import format_of
from plinth.models.reward import RewardModel
from plinth.models.tensor_file import TensorFiles
from plinth.models.transformer import Transformer

PREFIX = "base_model.model."  # of every tensor in PEFT's files
SCORE = "score"
OURS = ("embed.weight", "head.weight", "score.weight")


@dataclass(frozen=True)
class Whole:
    """A module that can be trained and saved whole."""

    name: str
    """what it is called among adapter.whole: the last part of its published name"""
    tensors: tuple[str, ...]
    """its tensor's names in PEFT's files; two where the embedding is the head too, which PEFT would else leave as it was"""
    parameter: nn.Parameter
    """its own"""
    factor: float
    """what it is multiplied by when it is published"""

    @property
    def modules(self) -> list[str]:
        """What PEFT calls it in modules_to_save."""
        return [_last(name) for name in self.tensors]


def _last(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[2]


def wholes(model: Transformer | RewardModel) -> dict[str, Whole]:
    """Return what of a model can be saved whole, by name."""
    found, parameters = {}, dict(model.named_parameters())
    is_tied = isinstance(model, Transformer) and model.config.tie_embeddings
    for entry in format_of(model.config).layout(model.config):
        own = entry.name.removeprefix("trunk.")
        if own not in OURS or entry.name not in parameters:
            continue
        tensors = (f"{PREFIX}{entry.published[0]}", *((f"{PREFIX}lm_head.weight",) if is_tied and own == "embed.weight" else ()))
        whole = Whole(_last(tensors[0]), tensors, parameters[entry.name], (entry.factors or (1.0,))[0])
        found[whole.name] = whole
    return found


def train_whole(model: Transformer, names: Sequence[str] | None) -> None:
    """Let gradients reach the modules of these names. Raises UserError for one that the model does not have."""
    known = wholes(model)
    for name in names or ():
        if name not in known:
            tied = " The head is the embedding here." if name == "lm_head" and model.config.tie_embeddings else nearest(name, known)
            raise UserError(f"adapter.whole has {name!r}, but what can be trained whole is {', '.join(known)}.{tied}")
        known[name].parameter.requires_grad_(True)


def published(given: Sequence[Whole]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, fp32, each in memory of its own."""
    return {name: (one.parameter.detach().float().cpu() * one.factor).contiguous() for one in given for name in one.tensors}


def take(model: Transformer | RewardModel, shapes: dict[str, tuple[int, ...]], file: Path) -> list[Whole]:
    """Take what is saved whole out of a file's tensors and return it.

    Raises UserError where a tensor has another shape, where one of two that are tied is absent, and where model and file do not both
    have a reward model's score.
    """
    known = wholes(model)
    if SCORE not in known and f"{PREFIX}{SCORE}.weight" in shapes:
        raise UserError(f"{file} holds the head of a reward model, and this model is none. Merge it: `plinth merge BASE {file.parent}`.")
    given = []
    for one in known.values():
        found = {name: shapes.pop(name) for name in one.tensors if name in shapes}
        if not found and one.name != SCORE:
            continue
        for name in one.tensors:
            if found.get(name) != tuple(one.parameter.shape):
                why = f"{found.get(name, 'absent')}, but this model needs {tuple(one.parameter.shape)}"
                tied = f", as its head is its embedding ({one.name})" if len(one.tensors) > 1 else ""
                raise UserError(f"{file}: {name} is {why}{tied}. Name the model that it was trained on.")
        given.append(one)
    return given


@torch.no_grad()
def fill(given: Sequence[Whole], files: TensorFiles, file: Path) -> None:
    """Read what is saved whole into the model. Raises UserError, before, where two tensors that are tied differ."""
    for one in given:
        first, *others = (files.read(name) for name in one.tensors)
        if any(not torch.equal(first, other) for other in others):
            raise UserError(f"{file}: {' and '.join(one.tensors)} differ, but the model's head is its embedding. Merge it with PEFT first.")
    for one in given:
        one.parameter.copy_(files.read(one.tensors[0])).div_(one.factor)
