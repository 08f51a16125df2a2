"""Tensors between a model of ours and a published one: checked as a whole before any is read, then read one at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import nn

from plinth.config import UserError, nearest
from plinth.models.formats.layout import Entry, Format
from plinth.models.meta import on_meta

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHOWN = 5  # names that an error lists


class Source(Protocol):
    """Published tensors: what they are is known before their bytes are read."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class InMemory:
    """Published tensors that are in memory already."""

    tensors: Mapping[str, torch.Tensor]
    """by published name"""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class Renamed:
    """Published tensors whose names are spelled as a format's layout has them."""

    def __init__(self, source: Source, format: Format):
        self._source, self._names = source, {}
        for name in source.shapes():
            spelled = name
            for pattern, other in format.renamed:
                spelled = re.sub(pattern, other, spelled)
            self._names[spelled] = name

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self._source.shapes()
        return {spelled: shapes[name] for spelled, name in self._names.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._names[name])

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._names[name])


def publish(format: Format, model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights under their published names, fused ones split; those that need no change are views, not copies."""
    tensors, state = {}, model.state_dict()
    for entry in format.layout(model.config):
        if entry.constant is not None:
            tensors |= {name: torch.full(shape, entry.constant, dtype=dtype) for name, shape in zip(entry.published, entry.shapes)}
            continue
        parts = entry.parts(state.pop(entry.name).detach())
        for i, (name, part) in enumerate(zip(entry.published, parts)):
            part = part.to("cpu", torch.float32 if entry.factors else dtype)
            tensors[name] = (part * entry.factors[i] if entry.factors else part).to(dtype).contiguous()
    assert not state, f"the layout has no entry for {sorted(state)}"
    return tensors


def check(format: Format, config: Any, source: Source, where: str) -> tuple[list[Entry], list[str]]:
    """Return the entries to read, and the names of ours that an optional entry leaves as they are drawn.

    Raises UserError that lists every published tensor which is missing, of another shape or type, or without a place; `where` begins
    its text.
    """
    return _checked(format, config, Renamed(source, format), where)


def _checked(format: Format, config: Any, source: Source, where: str) -> tuple[list[Entry], list[str]]:
    left = dict(source.shapes())
    if (layers := getattr(config, "num_layers", 0)) > len(left):  # before a list of their tensors is made
        raise UserError(f"{where} holds {len(left)} tensors, but its config.json says {layers} layers. Copy the model again.")
    entries = format.layout(config)
    present, absent, lacking, wrong = [], [], [], []
    aliases = format.aliases(config)
    for entry in entries:
        if entry.optional and not any(name in left for name in entry.published):
            absent.append(entry.name)
            continue
        present.append(entry)
        for name, shape in zip(entry.published, entry.shapes):
            if name not in left:
                lacking.append(name)
            elif left[name] != tuple(shape):
                wrong.append(f"{name} has shape {left[name]}; its config.json says {tuple(shape)}")
            elif source.dtype(name) not in FLOATS:
                wrong.append(f"{name} holds {source.dtype(name)}; quantised weights are not supported, use the fp32, fp16 or bf16 ones")
    known = {name for entry in entries for name in entry.published} | set(aliases)
    extra = [name for name in left if name not in known and not any(re.fullmatch(pattern, name) for pattern in format.ignored)]
    _refuse(lacking, wrong, sorted(extra), where)
    for name, other in aliases.items():
        if name in left and other in left and not torch.equal(source.read(name), source.read(other)):
            raise UserError(f"{where}: config.json ties {name} to {other}, but they differ. Set tie_word_embeddings to false.")
    return present, absent


def _refuse(lacking: list[str], wrong: list[str], extra: list[str], where: str) -> None:
    """Raise UserError that lists what is wrong, unless nothing is."""
    faults = []
    if lacking:
        noun = f"{len(lacking)} tensors: " if len(lacking) > 1 else "the tensor "
        faults.append(f"lacks {noun}{_some(lacking)}")
    if wrong:
        faults.append(_some(wrong, "; "))
    if extra:
        faults.append(f"holds {len(extra)} tensor(s) that its config.json has no place for: {_some(extra)}")
    if faults:
        guess = nearest(lacking[0], extra) if lacking else ""
        raise UserError(f"{where} {'; '.join(faults)}.{guess} Copy the model again, with the config.json that belongs to it.")


def _some(names: list[str], joint: str = ", ") -> str:
    more = f"{joint}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return joint.join(names[:SHOWN]) + more


def fill(format: Format, config: Any, source: Source, dtype: torch.dtype | None, where: str) -> nn.Module:
    """Return a model with the published weights in `dtype`, None = each in the type that it is stored in.

    One tensor of the source is in memory at a time besides the model's own.

    Raises UserError as `check` does, and for a tensor that config.json says is constant and is not.
    """
    source = Renamed(source, format)
    entries, absent = _checked(format, config, source, where)
    model = on_meta(lambda: format.build(config))
    model = model if dtype is None else model.to(dtype)
    if absent:  # their values are drawn with the model's own recipe, always the same ones
        model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))  # type: ignore[operator]
    state: dict[str, torch.Tensor] = {name: tensor for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}
    for entry in entries:
        tensor = read_entry(entry, source, dtype, where)
        if entry.constant is None:
            state[entry.name] = tensor
    model.load_state_dict(state, assign=True)
    lost = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    assert not lost, f"{lost} are in no state_dict and have no values: a model computes its tables in forward"
    return model


def read_entry(entry: Entry, source: Source, dtype: torch.dtype | None, where: str) -> torch.Tensor:
    """Return our tensor, in memory of its own, put together from the published ones."""
    stored = torch.float32 if entry.factors else reduce(torch.promote_types, map(source.dtype, entry.published))
    tensor = torch.empty(entry.shape, dtype=dtype or stored)
    for i, (name, part) in enumerate(zip(entry.published, entry.parts(tensor))):
        published = source.read(name)
        if entry.constant is not None and not bool((published == torch.tensor(entry.constant, dtype=published.dtype)).all()):
            raise UserError(f"{where}: {name} is not {entry.constant:g} everywhere, as its config.json says. Use its own config.json.")
        part.copy_(published)
        if entry.factors and entry.constant is None:
            part.div_(entry.factors[i])
    return tensor
