"""What a published model holds, tensor by tensor in closed form, and what follows from it: parameters, operations and cache, exactly.

A ledger is worked out from the values of a config.json alone: no weights, no PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["lookup", "matrix", "other"]


@dataclass(frozen=True)
class Piece:
    """Equal tensors of a model: how many of which shape, and how many of them one token passes through."""

    name: str
    """what it is, as in the architecture's paper"""
    shape: tuple[int, ...]
    """shape of one"""
    kind: Kind
    """lookup: a table of which a token reads a row; matrix: multiplied with every token; other: norms, biases, scalars"""
    copies: int = 1
    """how many there are: layers, times experts where it is an expert's"""
    used: int | None = None
    """how many of them one token passes through (default: all); fewer in a mixture of experts"""
    shared: bool = False
    """the weights are those of another piece: they multiply again, but are not counted again"""
    stream: str = "text"
    """name of the stream of tokens that passes through it"""

    @property
    def size(self) -> int:
        """Numbers in one."""
        return math.prod(self.shape)

    @property
    def params(self) -> int:
        """Parameters that it adds to the model."""
        return 0 if self.shared else self.size * self.copies

    @property
    def active(self) -> int:
        """Parameters of it that one token passes through; a shared one's are those of the other piece."""
        return 0 if self.shared else self.size * self.copies_used

    @property
    def copies_used(self) -> int:
        """How many of the copies one token passes through."""
        return self.copies if self.used is None else self.used


@dataclass(frozen=True)
class Attending:
    """Equal layers of attention: what their scores cost, and what their cache holds."""

    name: str
    """which layers"""
    layers: int
    """how many"""
    heads: int
    """query heads a layer"""
    head_widths: int
    """width of a head's query plus that of its value: twice head_dim, but in multi-head latent attention"""
    cached: int = 0
    """numbers that a layer's cache holds a position: 2 x kv heads x head_dim; 0 where nothing is generated"""
    hidden_size: int = 0
    """width of the residual stream, for what training keeps"""
    window: int | None = None
    """positions that a query sees at most (default: all)"""
    causal: bool = True
    """whether a query sees what stands before it only"""
    stream: str = "text"
    """where the queries come from"""
    keys: str | None = None
    """where the keys come from (default: the queries' own stream)"""

    def scores(self, queries: int, keys: int, *, causal: bool) -> int:
        """Return how many pairs of query and key a head weighs; `causal` leaves out those that a mask hides."""
        seen = min(keys, self.window or keys)
        if not (causal and self.causal):
            return queries * seen
        return seen * (seen + 1) // 2 + (queries - seen) * seen

    def flops(self, queries: int, keys: int, *, causal: bool) -> int:
        """Return the operations of scores and weighted values in a forward pass of one example."""
        return 2 * self.layers * self.heads * self.head_widths * self.scores(queries, keys, causal=causal)


@dataclass(frozen=True)
class Stream:
    """Tokens that pass through some of the pieces together."""

    name: str
    """text, source, target, image, pooled ..."""
    tokens: int | None = None
    """tokens of an example; None: the context that is asked for"""
    counted: bool = True
    """whether its tokens are those that "a token" of a number means"""


@dataclass(frozen=True)
class Ledger:
    """All pieces of a model and all its layers of attention."""

    pieces: tuple[Piece, ...]
    """in the order in which a token meets them"""
    attending: tuple[Attending, ...]
    """groups of equal layers"""
    streams: tuple[Stream, ...] = (Stream("text"),)
    """of what tokens"""
    max_seq_len: int | None = None
    """longest context, tokens; None: the architecture has no bound"""
    vocab_size: int = 0
    """scores a token of the head; 0 without one"""

    @property
    def total(self) -> int:
        """All parameters; tied ones once."""
        return sum(piece.params for piece in self.pieces)

    @property
    def active(self) -> int:
        """Parameters that one token passes through: all but the experts that it is not sent to."""
        return sum(piece.active for piece in self.pieces)

    @property
    def embedding(self) -> int:
        """Parameters of lookup tables: of tokens, positions, segments."""
        return sum(piece.params for piece in self.pieces if piece.kind == "lookup")

    @property
    def matmul(self) -> int:
        """Parameters that one token is multiplied with: the head's too, tied or not, no lookups, norms and biases."""
        return sum(piece.size * piece.copies_used for piece in self.pieces if piece.kind == "matrix")

    def lengths(self, context: int) -> dict[str, int]:
        """Return the tokens of each stream in one example."""
        return {stream.name: context if stream.tokens is None else stream.tokens for stream in self.streams}

    def tokens(self, context: int) -> int:
        """Return the tokens of an example that numbers a token are divided by."""
        lengths = self.lengths(context)
        return sum(lengths[stream.name] for stream in self.streams if stream.counted)

    def forward_flops(self, context: int, *, attention: Literal["none", "full", "causal"] = "full") -> int:
        """Return the operations of a forward pass of one example, a multiply-add being two.

        `full` counts attention to every position, as PaLM does; `causal` those that a mask shows; `none` the matrices alone.
        """
        lengths = self.lengths(context)
        matrices = sum(2 * piece.size * piece.copies_used * lengths[piece.stream] for piece in self.pieces if piece.kind == "matrix")
        if attention == "none":
            return matrices
        causal = attention == "causal"
        return matrices + sum(
            group.flops(lengths[group.stream], lengths[group.keys or group.stream], causal=causal) for group in self.attending
        )

    def train_flops_per_token(self, context: int, *, attention: Literal["none", "full", "causal"] = "full") -> float:
        """Return the operations of a training step a token: forward and twice that backward, nothing recomputed."""
        return exact_ratio(3 * self.forward_flops(context, attention=attention), self.tokens(context))

    @property
    def kv_per_token(self) -> int:
        """Numbers that the cache grows by a position, while no window is full."""
        return sum(group.layers * group.cached for group in self.attending)

    def kv_numbers(self, context: int) -> int:
        """Return how many numbers the cache of one sequence of `context` tokens holds; a layer with a window keeps that many positions."""
        return sum(group.layers * group.cached * min(context, group.window or context) for group in self.attending)


def exact_ratio(numerator: int, denominator: int) -> float:
    """Return an integer where the division leaves no rest, else a float."""
    whole, rest = divmod(numerator, denominator)
    return numerator / denominator if rest else whole


def linear(
    name: str, inputs: int, outputs: int, copies: int = 1, *, bias: bool = False, used: int | None = None, stream: str = "text"
) -> list[Piece]:
    """Return the pieces of equal linear layers."""
    matrix = Piece(name, (outputs, inputs), "matrix", copies, used, stream=stream)
    return [matrix, Piece(f"{name} bias", (outputs,), "other", copies, used, stream=stream)] if bias else [matrix]


def norms(name: str, width: int, copies: int = 1, *, bias: bool = False, stream: str = "text") -> list[Piece]:
    """Return the pieces of equal normalisations: a scale, and with `bias` a shift."""
    scale = Piece(f"{name} scale", (width,), "other", copies, stream=stream)
    return [scale, Piece(f"{name} shift", (width,), "other", copies, stream=stream)] if bias else [scale]


def lookup(name: str, rows: int, width: int, *, stream: str = "text") -> Piece:
    """Return the piece of a lookup table."""
    return Piece(name, (rows, width), "lookup", stream=stream)


def head(vocab_size: int, width: int, *, tied: bool, bias: bool = False, stream: str = "text") -> list[Piece]:
    """Return the pieces of an output head; a tied one is the embedding's matrix again."""
    name = "head (the embedding again)" if tied else "head"
    matrix = Piece(name, (vocab_size, width), "matrix", shared=tied, stream=stream)
    return [matrix, Piece("head bias", (vocab_size,), "other", stream=stream)] if bias else [matrix]


def on_stream(pieces: list[Piece], stream: str) -> list[Piece]:
    """Return the pieces as those of another stream, named after it."""
    return [replace(piece, name=f"{stream} {piece.name}", stream=stream) for piece in pieces]
