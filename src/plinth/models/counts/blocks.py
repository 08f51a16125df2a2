"""Closed forms of the layers that published models share: attention, feed-forward layers, experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plinth.config import UserError
from plinth.models.counts.ledger import Attending, Piece, linear, norms

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Widths:
    """The sizes of a stack of equal blocks."""

    layers: int
    """blocks"""
    hidden_size: int
    """width of the residual stream"""
    heads: int
    """query heads"""
    kv_heads: int
    """key and value heads"""
    head_dim: int
    """width of a head"""
    intermediate_size: int
    """width of the feed-forward layer"""

    @property
    def heads_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim


def need(values: Values, *names: str) -> list[int]:
    """Return positive integers of config.json. Raises UserError that names what is missing or no size."""
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise UserError(
            f"config.json of model_type={values.get('model_type')!r} lacks {', '.join(missing)}; the count follows from it. "
            "Copy the model's own config.json."
        )
    for name in names:
        if isinstance(values[name], bool) or not isinstance(values[name], int) or values[name] < 1:
            raise UserError(f"config.json: {name}={values[name]!r} is not a size. Use a positive integer.")
    return [values[name] for name in names]


def either(values: Values, name: str, default: Any) -> Any:
    """Return a value of config.json, or the default where it is absent or null."""
    found = values.get(name)
    return default if found is None else found


def widths(values: Values) -> Widths:
    """Read the sizes under their usual names."""
    layers, hidden, heads, inner = need(values, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    kv_heads = either(values, "num_key_value_heads", heads)
    return Widths(layers, hidden, heads, kv_heads, either(values, "head_dim", hidden // heads), inner)


def all_heads(values: Values) -> Values:
    """Return the values without what an architecture does not have: groups of heads that share keys, heads of another width."""
    return {name: value for name, value in values.items() if name not in ("num_key_value_heads", "head_dim")}


def attention(
    size: Widths, *, bias: bool = False, out_bias: bool | None = None, qk_norm: str | None = None, name: str = "attention"
) -> list[Piece]:
    """Return the projections of all blocks' attention; qk_norm: "head" (scales of head_dim) or "full" (over all heads)."""
    layers, hidden = size.layers, size.hidden_size
    pieces = linear(f"{name} query", hidden, size.heads_width, layers, bias=bias)
    pieces += linear(f"{name} key", hidden, size.kv_width, layers, bias=bias)
    pieces += linear(f"{name} value", hidden, size.kv_width, layers, bias=bias)
    if qk_norm is not None:
        lengths = {"head": (size.head_dim, size.head_dim), "full": (size.heads_width, size.kv_width)}[qk_norm]
        pieces += norms(f"{name} query norm", lengths[0], layers) + norms(f"{name} key norm", lengths[1], layers)
    return pieces + linear(f"{name} output", size.heads_width, hidden, layers, bias=bias if out_bias is None else out_bias)


def feed_forward(size: Widths, *, gated: bool = True, bias: bool = False, layers: int | None = None, inner: int | None = None):
    """Return the feed-forward layers of all blocks, or of so many."""
    layers = size.layers if layers is None else layers
    inner = inner or size.intermediate_size
    pieces = linear("feed-forward gate", size.hidden_size, inner, layers, bias=bias) if gated else []
    pieces += linear("feed-forward up", size.hidden_size, inner, layers, bias=bias)
    return pieces + linear("feed-forward down", inner, size.hidden_size, layers, bias=bias)


def experts(size: Widths, count: int, active: int, inner: int, layers: int, *, shared_inner: int = 0, bias: bool = False) -> list[Piece]:
    """Return gated experts with their router, and a shared expert that every token passes through."""
    copies, used, hidden = layers * count, layers * active, size.hidden_size
    pieces = linear("router", hidden, count, layers, bias=bias)
    for name in ("gate", "up"):
        pieces += linear(f"expert {name}", hidden, inner, copies, bias=bias, used=used)
    pieces += linear("expert down", inner, hidden, copies, bias=bias, used=used)
    if shared_inner:
        for name in ("gate", "up"):
            pieces += linear(f"shared expert {name}", hidden, shared_inner, layers)
        pieces += linear("shared expert down", shared_inner, hidden, layers)
    return pieces


def windows(values: Values, layers: int, sliding: int, window: int | None) -> list[tuple[str, int, int | None]]:
    """Return (name, layers, window) of the layers that see a window, of which there are `sliding`, and of those that see all.

    `layer_types` of config.json, where it is there, says which they are.
    """
    types = values.get("layer_types")
    if types:
        sliding = sum(kind == "sliding_attention" for kind in types)
    if not window:
        sliding = 0
    groups = [("sliding attention", sliding, window), ("attention", layers - sliding, None)]
    return [group for group in groups if group[1]]


def causal_groups(size: Widths, groups: list[tuple[str, int, int | None]]) -> tuple[Attending, ...]:
    """Return the attention of a decoder's blocks, with keys and values cached."""
    return tuple(
        Attending(name, layers, size.heads, 2 * size.head_dim, 2 * size.kv_width, size.hidden_size, window)
        for name, layers, window in groups
    )
