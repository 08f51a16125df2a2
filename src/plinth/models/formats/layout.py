"""How a family's models are published: what config.json says, and which tensors stand for which of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and where it is in a published model."""

    name: str
    """in our state_dict"""
    published: tuple[str, ...]
    """names, in order, that together make it"""
    shapes: tuple[tuple[int, ...], ...]
    """shapes of the published tensors"""
    join: Literal["cat", "stack"] = "cat"
    """along dimension 0: concatenated (fused projections), or stacked (experts)"""
    groups: int | None = None
    """of a stack, how many entries: each is the concatenation of len(published) / groups tensors; None = each tensor is an entry"""
    transpose: bool = False
    """published matrices are (in, out), as GPT-2's Conv1D has them: their last two dimensions are swapped"""
    optional: bool = False
    """may be absent: ours is then as `init_weights` draws it"""
    factors: tuple[float, ...] = ()
    """what ours is multiplied by when it is published, a factor a published tensor (default: none)"""
    constant: float | None = None
    """ours has no such tensor: the published one is full of this number"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return our tensor's shape."""
        shapes = [(*shape[:-2], shape[-1], shape[-2]) if self.transpose and len(shape) > 1 else tuple(shape) for shape in self.shapes]
        if self.join == "cat" and not shapes[0]:
            return ()  # a single number
        if self.join == "cat":
            return (sum(shape[0] for shape in shapes), *shapes[0][1:])
        count = self._group_count
        return (count, sum(shape[0] for shape in shapes[: len(shapes) // count]), *shapes[0][1:])

    @property
    def _group_count(self) -> int:
        return len(self.published) if self.groups is None else self.groups

    def parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return views of our tensor, one a published tensor, in its order and with its shape: read them to publish, fill them to load."""
        assert tuple(tensor.shape) == self.shape, f"{self.name} is {tuple(tensor.shape)}, its entry says {self.shape}"
        if not tensor.dim():
            return [tensor]
        groups = [tensor] if self.join == "cat" else list(tensor.unbind(0))
        size = len(self.published) // len(groups)
        views: list[torch.Tensor] = []
        for i, group in enumerate(groups):
            turned = [len(shape) > 1 and self.transpose for shape in self.shapes[i * size : (i + 1) * size]]
            rows = [shape[-1] if turn and len(shape) == 2 else shape[0] for turn, shape in zip(turned, self.shapes[i * size :])]
            views += [part.mT if turn else part for turn, part in zip(turned, group.split(rows))]
        return views


def no_aliases(config: Any) -> dict[str, str]:
    """Return no pairs: nothing is published twice."""
    return {}


@dataclass(frozen=True)
class Format:
    """How the models of one family are published.

    `build` is called on the meta device (plinth.models.meta), so a model keeps no table in a buffer that its state_dict lacks.
    """

    config: type
    """the family's configuration class"""
    model_types: tuple[str, ...]
    """`model_type` of the config.json files that it reads"""
    read_config: Callable[[dict[str, Any]], Any]
    """config.json → our configuration; raises UserError that names a field whose value we cannot compute"""
    write_config: Callable[[Any], dict[str, Any]]
    """our configuration → config.json, with architectures and model_type"""
    build: Callable[[Any], nn.Module]
    """configuration → model, its weights not yet drawn"""
    layout: Callable[[Any], list[Entry]]
    """configuration → every tensor of the model's state_dict"""
    ignored: tuple[str, ...] = ()
    """patterns (re.fullmatch) of published tensors that may be there and are dropped, such as rotary frequencies"""
    renamed: tuple[tuple[str, str], ...] = ()
    """(pattern, what stands in its place) by re.sub: how names that other releases wrote become the published ones of the layout"""
    aliases: Callable[[Any], dict[str, str]] = no_aliases
    """configuration → published name: published name that it must equal where it is present, such as a tied head"""
    used_by: str = "plinth"
    """the verbs that take such a model, for the error of those that do not"""
    generates: bool = False
    """whether it writes text, so that generation_config.json belongs to it"""
    architecture: str = ""
    """what the architecture of its config.json files ends with, where another format has the same model types"""

    def reads(self, values: dict[str, Any]) -> bool:
        """Return whether a config.json is one of its own, as far as its model type and its architecture say."""
        named = values.get("architectures")
        first = str(named[0]) if isinstance(named, list) and named else ""
        return values.get("model_type") in self.model_types and first.endswith(self.architecture)
