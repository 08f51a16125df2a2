"""Low-rank adapters: LoRA, rsLoRA and DoRA on the matrices of a decoder whose own weights stay as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError, nearest
from plinth.models.hub import format_of
from plinth.models.mlp import Linear
from plinth.models.transformer import Transformer
from plinth.ops.dropout import dropout_within
from plinth.ops.linear import linear, linear_rows
from plinth.ops.nf4 import Nf4, dequantise_nf4, nf4_linear, quantise_nf4
from plinth.posttraining.adapter_wholes import train_whole
from plinth.posttraining.lora_config import LoraConfig

ALL = "all-linear"  # as PEFT says it


AnyModel = TypeVar("AnyModel", bound=nn.Module)
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Projection:
    """One of the projections that are fused in a matrix of ours."""

    published: str
    """module that other programs know it as, such as model.layers.0.self_attn.q_proj"""
    rows: int
    """rows of the matrix that are its own"""
    factor: float
    """what its rows are multiplied by when they are published"""
    is_transposed: bool
    """whether it is published as (in, out), as GPT-2's are"""
    is_adapted: bool = True
    """whether it has an adapter"""

    @property
    def target(self) -> str:
        """Return the last part of the published name."""
        return self.published.rpartition(".")[2]


class AdaptedLinear(Linear):
    """A frozen matrix W with an adapter for each projection fused in it: y = (W + s B A) x, or with DoRA m (W + s B A) x / n.

    A is drawn and B is 0, so that nothing changes at first. n holds the norms of the rows of W + s B A, counted as constants in the
    gradient, and m starts as those of W. `frozen` is W; `lora_a` (P r, D) and `lora_b`, `magnitude` (rows of the P adapted projections)
    are stacked. With config.quantise W is rounded to 4 bits and held so: `frozen` is None, and `packed` has its parts.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3 (DoRA); Dettmers et al.
    2023, arXiv:2305.14314, eq. 5 (QLoRA).
    Differs: norms are taken in fp32 whatever the dtype; a row of norm 0 stays 0 with DoRA. Dropout, within `dropping` alone, is of what
    enters A; the projections fused in a matrix drop the same numbers. PEFT's each drop their own, and with DoRA it drops what enters W
    in the term of the norms too.
    """

    def __init__(self, base: Linear, projections: Sequence[Projection], config: LoraConfig):
        nn.Module.__init__(self)
        assert config.rank is not None
        self.in_features, self.out_features = base.in_features, base.out_features
        self.frozen, self.bias = (None if config.quantise else base.weight), base.bias
        if config.quantise:
            self._hold(quantise_nf4(base.weight))
        self.projections, self.adapter = tuple(projections), config
        self.rank, self.scaling = config.rank, config.scaling
        self.start: tuple[torch.Tensor, torch.Tensor] | None = None  # A and B at first, fp32, where W has lost their product
        adapted = [projection.rows for projection in projections if projection.is_adapted]
        self.lora_a = nn.Parameter(base.weight.new_empty(len(adapted) * config.rank, self.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(sum(adapted), config.rank))
        self.magnitude = nn.Parameter(self._adapted_rows(self.base_weight().norm(dim=1))) if config.dora else None

    def _hold(self, weight: Nf4) -> None:
        """Keep the parts of a rounded matrix as buffers, which move with the module and are in no file."""
        for name in ("codes_N", "scales_G", "steps_S"):
            self.register_buffer(name, getattr(weight, name), persistent=False)

    @property
    def packed(self) -> Nf4:
        """Return the matrix in 4 bits, where it is held so."""
        assert self.frozen is None
        return Nf4((self.out_features, self.in_features), self.codes_N, self.scales_G, self.steps_S)

    def base_weight(self) -> torch.Tensor:
        """Return W in fp32, without gradient: made anew from 4 bits where it is held so."""
        return dequantise_nf4(self.packed) if self.frozen is None else self.frozen.detach().float()

    @torch.no_grad()
    def init_adapter(self, generator: torch.Generator) -> None:
        """Draw A as the configuration says, as PEFT does; B stays 0, but for pissa."""
        if self.adapter.init == "pissa":
            return self._take_principal()
        drawn = torch.empty(self.lora_a.shape)
        bound = self.in_features**-0.5
        if self.adapter.init == "uniform":
            drawn.uniform_(-bound, bound, generator=generator)
        else:
            drawn.normal_(0.0, 1 / self.rank, generator=generator)
        self.lora_a.copy_(drawn)

    def _take_principal(self) -> None:
        """Let s B A be the best approximation of each projection by rank r, and W what is left of it.

        Source: Meng et al. 2024, arXiv:2404.02948, eqs. 2 to 4 (PiSSA), with A and B divided by the root of s as PEFT does.
        """
        assert self.frozen is not None
        parts = self.frozen.data.split([projection.rows for projection in self.projections])
        taken = [part for projection, part in zip(self.projections, parts) if projection.is_adapted]
        for part, a, b in zip(taken, self.lora_a.split(self.rank), self.lora_b.split([len(part) for part in taken])):
            if self.rank > min(part.shape):
                raise UserError(f"adapter.rank={self.rank} is more than the {min(part.shape)} singular values of a matrix. Lower it.")
            left, sizes, right = torch.linalg.svd(part.float(), full_matrices=False)
            roots = (sizes[: self.rank] / self.scaling).sqrt()
            a.copy_(roots[:, None] * right[: self.rank])
            b.copy_(left[:, : self.rank] * roots)
            part.sub_(self.scaling * b @ a)
        self.start = self.lora_a.detach().clone(), self.lora_b.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(x, linear, F.linear)

    def forward_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, each row independent of its company bit for bit."""
        return self._forward(x_ND, linear_rows, linear_rows)

    def _forward(self, x: torch.Tensor, product: Product, small: Product) -> torch.Tensor:
        # The adapter's own products are PyTorch's: our kernels know a weight by its identity, and these are slices.
        hidden = iter(small(dropout_within(x, self.adapter.dropout), self.lora_a).split(self.rank, -1))
        added = [
            small(next(hidden).contiguous(), b) * self.scaling if b is not None else x.new_zeros(*x.shape[:-1], projection.rows)
            for projection, b in self._parts(self.lora_b)
        ]
        y = self._base_product(x, product) + torch.cat(added, -1)
        if self.magnitude is not None:
            y = y * self._row_factors().to(y.dtype)
        return y if self.bias is None else y + self.bias

    def _base_product(self, x: torch.Tensor, product: Product) -> torch.Tensor:
        if self.frozen is not None:
            return product(x, self.frozen)
        return nf4_linear(x, self.packed) if product is linear else product(x, dequantise_nf4(self.packed, x.dtype))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The merged matrix in the model's dtype, computed anew: what reads a decoder's matrices reads what it computes."""
        return self.merged_weight().to(self.lora_a.dtype)

    def merged_weight(self) -> torch.Tensor:
        """Return the matrix that alone computes what this does, fp32."""
        with torch.no_grad():
            whole = self._sum()
            return whole if self.magnitude is None else whole * self._row_factors()[:, None]

    def _sum(self) -> torch.Tensor:
        """Return W + s B A, fp32, without gradient."""
        a = iter(self.lora_a.detach().float().split(self.rank))
        added = [
            b.detach().float() @ next(a) if b is not None else torch.zeros(projection.rows, self.in_features, device=self.lora_a.device)
            for projection, b in self._parts(self.lora_b)
        ]
        return self.base_weight() + self.scaling * torch.cat(added)

    def _row_factors(self) -> torch.Tensor:
        """Return m / n by row, 1 where there is no adapter, fp32; its gradient reaches m alone."""
        assert self.magnitude is not None
        norms = self._sum().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).split([p.rows for p in self.projections])
        parts = self._parts(self.magnitude)
        return torch.cat([m.float() / n if m is not None else torch.ones_like(n) for (_, m), n in zip(parts, norms)])

    def _parts(self, stacked: torch.Tensor) -> Iterator[tuple[Projection, torch.Tensor | None]]:
        """Yield each projection with its rows of a stacked tensor, None where it has no adapter."""
        rows = iter(stacked.split([projection.rows for projection in self.projections if projection.is_adapted]))
        for projection in self.projections:
            yield projection, next(rows) if projection.is_adapted else None

    def _adapted_rows(self, by_row: torch.Tensor) -> torch.Tensor:
        parts = by_row.split([projection.rows for projection in self.projections])
        return torch.cat([part for projection, part in zip(self.projections, parts) if projection.is_adapted])

    def adapters(self) -> dict[str, tuple[Projection, dict[str, torch.Tensor]]]:
        """Return each adapted projection's tensors by its published name: lora_A.weight, lora_B.weight, lora_magnitude_vector.

        They are views, and add to W as it came. Where W has lost something at the beginning, that is taken off again: [B, -B'] [A; A'],
        of twice the rank.
        """
        found: dict[str, tuple[Projection, dict[str, torch.Tensor]]] = {}
        a = iter(self.lora_a.detach().split(self.rank))
        magnitudes = self._parts(self.magnitude.detach()) if self.magnitude is not None else None
        rows = [projection.rows for projection in self.projections if projection.is_adapted]
        first = None if self.start is None else (iter(self.start[0].split(self.rank)), iter(self.start[1].split(rows)))
        for projection, b in self._parts(self.lora_b.detach()):
            m = next(magnitudes)[1] if magnitudes is not None else None
            if b is None:
                continue
            tensors = {"lora_A.weight": next(a), "lora_B.weight": b}
            if first is not None:
                tensors = {
                    "lora_A.weight": torch.cat([tensors["lora_A.weight"], next(first[0])]),
                    "lora_B.weight": torch.cat([b, -next(first[1])], 1),
                }
            found[projection.published] = projection, tensors if m is None else tensors | {"lora_magnitude_vector": m}
        return found


def add_adapters(model: Transformer, config: LoraConfig, generator: torch.Generator | None = None) -> Transformer:
    """Put adapters on the model's matrices, in place, and freeze all else but config.whole; returns the model, which computes as before.

    The embedding and the head have none, so a head that is the embedding stays it. Experts and their routers have none either.
    Draws from `generator` (default: seed 0). Raises UserError for a target that the model does not have.
    """
    matrices = adaptable(model)
    install(model, matrices, choose(matrices, config), config, generator or torch.Generator().manual_seed(0))
    train_whole(model, config.whole)
    return model


def choose(matrices: dict[str, list[Projection]], config: LoraConfig) -> set[str]:
    """Return the published names of the projections of `adaptable` that a configuration adapts.

    Raises UserError where it names what the model does not have, or nothing is left.
    """
    blocks = {name: int(name.split(".")[1]) for name in matrices}
    layers = set(blocks.values()) if config.layers is None else set(config.layers)
    if absent := layers - set(blocks.values()):
        raise UserError(f"adapter.layers has {min(absent)}, but the blocks that can have adapters are {_spans(set(blocks.values()))}.")
    parts = [part for name, fused in matrices.items() if blocks[name] in layers for part in fused]
    if config.pattern is not None:
        wanted = {part.published for part in parts if _compiled(config.pattern).fullmatch(part.published)}
    else:
        targets = _checked({part.target for fused in matrices.values() for part in fused}, config.targets)
        wanted = {part.published for part in parts if part.target in targets}
    if not wanted:
        raise UserError(f"no projection is adapted by {_given(config)}. One is named {next(iter(matrices.values()))[0].published}.")
    return wanted


def _checked(known: set[str], targets: tuple[str, ...] | None) -> set[str]:
    if targets is None or targets == (ALL,):
        return known
    for target in targets:
        if target not in known:
            more = f" {ALL} stands alone." if target == ALL else nearest(target, known)
            raise UserError(f"adapter.targets has {target!r}, but the model's are {', '.join(sorted(known))}.{more}")
    if not targets:
        raise UserError(f"adapter.targets is empty. Name some of {', '.join(sorted(known))}, or leave it out for all.")
    return set(targets)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"adapter.pattern={pattern!r} is no regular expression: {error}.") from None


def _given(config: LoraConfig) -> str:
    """Return the options that choose, as they were given."""
    names = ("targets", "pattern", "layers")
    return ", ".join(f"adapter.{name}={value!r}" for name in names if (value := getattr(config, name)) is not None)


def _spans(numbers: set[int]) -> str:
    whole = numbers == set(range(min(numbers), max(numbers) + 1))
    return f"{min(numbers)} to {max(numbers)}" if whole else ", ".join(map(str, sorted(numbers)))


def install(
    model: Transformer, matrices: dict[str, list[Projection]], wanted: Collection[str], config: LoraConfig, generator: torch.Generator
) -> Transformer:
    """Put adapters on the projections whose published names are wanted, in place, and freeze all else; returns the model."""
    model.requires_grad_(False)
    for name, parts in matrices.items():
        if any(part.published in wanted for part in parts):
            chosen = [replace(part, is_adapted=part.published in wanted) for part in parts]
            adapted = AdaptedLinear(model.get_submodule(name), chosen, config)  # type: ignore[arg-type]
            adapted.init_adapter(generator)
            model.set_submodule(name, adapted)
    return model


def adaptable(model: Transformer) -> dict[str, list[Projection]]:
    """Return what `projections_of` does. Raises UserError if some modules have adapters already."""
    if any(True for _ in adapted_modules(model)):
        raise UserError("the model has adapters already. Merge them first.")
    return projections_of(model)


def projections_of(model: Transformer) -> dict[str, list[Projection]]:
    """Return the modules that have or can have adapters, by name, each with the projections fused in it."""
    found = {}
    for entry in format_of(model.config).layout(model.config):
        name, _, kind = entry.name.rpartition(".")
        if kind != "weight" or not name.startswith("layers.") or type(model.get_submodule(name)) not in (Linear, AdaptedLinear):
            continue
        rows = [shape[-1 if entry.transpose else 0] for shape in entry.shapes]
        factors = entry.factors or (1.0,) * len(rows)
        names = [published.removesuffix(".weight") for published in entry.published]
        found[name] = [Projection(*values, entry.transpose) for values in zip(names, rows, factors)]
    return found


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield the modules that have adapters, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


@torch.no_grad()
def merge(model: AnyModel) -> AnyModel:
    """Add the adapters to the weights that they adapt, in place; returns the model, which has no adapters then and computes the same.

    The sum is taken in fp32 and rounded to the weights' dtype once. All weights can be trained again.
    """
    for name, module in list(adapted_modules(model)):
        plain = nn.Module.__new__(Linear)
        nn.Module.__init__(plain)
        plain.in_features, plain.out_features, plain.bias = module.in_features, module.out_features, module.bias
        plain.weight = nn.Parameter(module.weight)
        model.set_submodule(name, plain)
    return model.requires_grad_(True)
