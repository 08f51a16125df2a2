"""Encoder-decoders: the Transformer of 2017 and T5, for training with the whole target and for generation token by token.

Sources: Vaswani et al. 2017, arXiv:1706.03762; Raffel et al. 2020, arXiv:1910.10683.
Differs: dropout falls on the embeddings and on each layer's result, not on attention weights or inside the feed-forward layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from plinth.models.bidirectional import BiasedLinear, LayerNorm, MultiHeadAttention, key_mask
from plinth.models.embedding import Embedding
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.models.norm import RMSNorm
from plinth.ops.dropout import dropout

Drop = Callable[[torch.Tensor], torch.Tensor]
KeysValues = tuple[torch.Tensor, torch.Tensor]  # (B, H, S, E) each
Seen = dict[str, list[torch.Tensor]]  # attention weights by the name of the attention, in the order of the blocks


@lru_cache(maxsize=8)
def sinusoids(length: int, size: int) -> torch.Tensor:
    """Return the positions' table, fp32 (length, size): sines in the first half of the columns, cosines in the second.

    Source: Vaswani et al. 2017, section 3.5.  Differs: their formula interleaves the two; their code, Marian and we lay them side by side.
    """
    with torch.inference_mode(False):  # a table first wanted in generation serves training too
        rates = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * rates
        return torch.cat((angles.sin(), angles.cos()), -1).float()


def relative_buckets(distance: torch.Tensor, num_buckets: int, max_distance: int, both_sides: bool) -> torch.Tensor:
    """Return the bucket of each distance (key position minus query position), int64, same shape.

    Near distances have a bucket each; farther ones share buckets that widen with the logarithm, up to max_distance. With `both_sides`
    half of the buckets are for keys behind the query, else those count as distance 0.
    Source: Raffel et al. 2020, section 2.1, as in their code.
    """
    side = torch.zeros_like(distance)
    if both_sides:
        num_buckets //= 2
        side = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    near = num_buckets // 2
    octave = torch.log(distance.clamp_min(1).float() / near) / math.log(max_distance / near)
    far = (near + (octave * (num_buckets - near)).long()).clamp_max(num_buckets - 1)
    return side + torch.where(distance < near, distance, far)


class DistanceBias(nn.Module):
    """T5's learnt numbers, one a head and bucket of distance, added to attention scores; all blocks of a stack share them."""

    def __init__(self, config: EncoderDecoderConfig, both_sides: bool):
        super().__init__()
        self.table = nn.Embedding(config.relative_buckets, config.num_heads)
        self.max_distance, self.both_sides = config.relative_max_distance, both_sides

    def forward(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Return (1, H, T, S); the last query stands at the last key."""
        keys_S = torch.arange(num_keys, device=self.table.weight.device)
        distance_TS = keys_S - keys_S[num_keys - num_queries :, None]
        buckets = relative_buckets(distance_TS, self.table.num_embeddings, self.max_distance, self.both_sides)
        return self.table(buckets).permute(2, 0, 1)[None]


class FeedForward(nn.Module):
    """down(activation(up(x))), or with a gate down(gelu(gate(x)) · up(x)), gate and up one matrix."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.gate = partial(F.gelu, approximate="tanh") if config.is_gated else None
        self.activation = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}.get(config.activation)
        name = "gate_up" if config.is_gated else "up"
        rows = config.intermediate_size * (2 if config.is_gated else 1)
        self.add_module(name, BiasedLinear(config.hidden_size, rows, bias=not config.is_t5))
        self.down = BiasedLinear(config.intermediate_size, config.hidden_size, bias=not config.is_t5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.gate(gate) * up)


def _norm(config: EncoderDecoderConfig) -> nn.Module:
    return RMSNorm(config.hidden_size, config.norm_eps, True) if config.is_t5 else LayerNorm(config.hidden_size, config.norm_eps)


def _attention(config: EncoderDecoderConfig, cross: bool = False) -> MultiHeadAttention:
    shape = (config.hidden_size, config.num_heads, config.head_dim)
    return MultiHeadAttention(*shape, bias=not config.is_t5, cross=cross, scale=config.query_scale)


class Block(nn.Module):
    """Self-attention, in a decoder attention to the source, and a feed-forward layer, each with its residual sum and normalisation."""

    def __init__(self, config: EncoderDecoderConfig, is_decoder: bool):
        super().__init__()
        self.before, self.is_decoder = config.is_t5, is_decoder
        self.attention, self.attention_norm = _attention(config), _norm(config)
        if is_decoder:
            self.cross, self.cross_norm = _attention(config, cross=True), _norm(config)
        self.mlp, self.mlp_norm = FeedForward(config), _norm(config)

    def forward(
        self, x, mask, bias, drop: Drop, source: KeysValues | None = None, past: KeysValues | None = None, seen: Seen | None = None
    ) -> tuple[torch.Tensor, KeysValues]:
        """Return the stream (B, T, D) behind the block, and the keys and values of its self-attention, those of `past` in front.

        `mask` is that of the source, (B, 1, 1, S). In a decoder `source` are its keys and values here. `seen` collects weights.
        """
        name = "decoder" if self.is_decoder else "encoder"
        now = self._read(x, self.attention_norm)
        query, *new = self.attention.project(now)
        key, value = new if past is None else (torch.cat(both, 2) for both in zip(past, new))
        shown = {"mask": None if self.is_decoder else mask, "bias": bias, "causal": self.is_decoder and query.shape[2] > 1}
        _note(seen, name, self.attention, query, key, shown)
        x = self._add(x, self.attention.attend(query, key, value, **shown), self.attention_norm, drop)
        if source is not None:
            query = self.cross.queries(self._read(x, self.cross_norm))
            _note(seen, "cross", self.cross, query, source[0], {"mask": mask})
            x = self._add(x, self.cross.attend(query, *source, mask), self.cross_norm, drop)
        return self._add(x, self.mlp(self._read(x, self.mlp_norm)), self.mlp_norm, drop), (key, value)

    def _read(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return norm(x) if self.before else x

    def _add(self, x: torch.Tensor, result: torch.Tensor, norm: nn.Module, drop: Drop) -> torch.Tensor:
        total = x + drop(result)
        return total if self.before else norm(total)


def _note(seen: Seen | None, name: str, attention: MultiHeadAttention, query, key, shown) -> None:
    if seen is not None:
        seen.setdefault(name, []).append(attention.shares(query, key, **shown)[0])


class Stack(nn.Module):
    """The blocks of an encoder or a decoder."""

    def __init__(self, config: EncoderDecoderConfig, is_decoder: bool):
        super().__init__()
        self.is_decoder = is_decoder
        count = config.decoder_layers if is_decoder else config.num_layers
        self.layers = nn.ModuleList(Block(config, is_decoder) for _ in range(count))
        self.bias = DistanceBias(config, both_sides=not is_decoder) if config.is_t5 else None
        self.final_norm = _norm(config) if config.is_t5 else None

    def forward(
        self,
        x_BTD,
        mask,
        drop: Drop,
        sources: list[KeysValues] | None = None,
        past: list[KeysValues] | None = None,
        seen: Seen | None = None,
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        """Return hidden states (B, T, D) and the keys and values of each block's self-attention; arguments as of `Block`, one a block."""
        num_past = past[0][0].shape[2] if past else 0
        bias = None if self.bias is None else self.bias(x_BTD.shape[1], num_past + x_BTD.shape[1])
        kept = []
        for i, layer in enumerate(self.layers):
            x_BTD, new = layer(x_BTD, mask, bias, drop, sources and sources[i], past and past[i], seen)
            kept.append(new)
        return x_BTD if self.final_norm is None else drop(self.final_norm(x_BTD)), kept


@dataclass(frozen=True)
class Memory:
    """What a decoder looks at of N sources."""

    sources: list[KeysValues]
    """keys and values (N, H, S, E) of each block: computed once, read at every step"""
    mask: torch.Tensor | None
    """(N, 1, 1, S), true on tokens"""


@dataclass(frozen=True)
class State:
    """Where the rows of a batch are in their targets."""

    memory: Memory
    """of all sources that were encoded together"""
    owners_B: torch.Tensor
    """the source of each row"""
    sources: list[KeysValues]
    """keys and values (B, H, S, E) of each row's source"""
    mask: torch.Tensor | None
    """(B, 1, 1, S)"""
    past: list[KeysValues] | None
    """keys and values of the tokens read so far; None before the first"""

    def select(self, rows_B: torch.Tensor) -> State:
        """Return the state of some rows; the sources are copied only where rows change theirs."""
        if len(rows_B) == len(self.owners_B) and bool((rows_B == torch.arange(len(rows_B), device=rows_B.device)).all()):
            return self
        owners_B = self.owners_B[rows_B]
        past = None if self.past is None else [(key[rows_B], value[rows_B]) for key, value in self.past]
        if torch.equal(owners_B, self.owners_B):
            return State(self.memory, owners_B, self.sources, self.mask, past)
        sources = [(key[owners_B], value[owners_B]) for key, value in self.memory.sources]
        return State(self.memory, owners_B, sources, None if self.memory.mask is None else self.memory.mask[owners_B], past)


class EncoderDecoder(nn.Module):
    """A model of a target given a source; follows `inference.step_space.StepModel` for generation."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        separate = config.target_vocab_size is not None
        self.target_embed = Embedding(config.output_size, config.hidden_size) if separate else None
        self.encoder, self.decoder = Stack(config, is_decoder=False), Stack(config, is_decoder=True)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.output_size, bias=False)
        self.register_buffer("head_bias", torch.zeros(1, config.output_size) if config.output_bias else None)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> EncoderDecoder:
        """Draw the weights: normal with deviation 1/sqrt(fan_in); matrices that write to the residual stream, and biases, start at 0.

        The transformer's embeddings, where they are the head too, start small: as blocks begin as the identity, each token would be
        sure to come again. T5's have deviation 1, as in its code.
        """
        for name, parameter in self.named_parameters():
            if name.endswith((".bias", "bias.table.weight", "attention.out.weight", "cross.out.weight", "mlp.down.weight")):
                parameter.zero_()
            elif parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self._embed_deviation if "embed" in name else parameter.shape[1] ** -0.5, generator=generator)
        return self

    @property
    def _embed_deviation(self) -> float:
        if self.config.is_t5:
            return 1.0
        return 0.02 if self.config.tie_embeddings else self.config.hidden_size**-0.5

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by parameter name, each with the row counts of the projections fused in it."""
        heads = self.config.num_heads * self.config.head_dim
        fused = {"qkv.weight": (heads,) * 3, "kv.weight": (heads,) * 2, "gate_up.weight": (self.config.intermediate_size,) * 2}
        parts = {}
        for name, parameter in self.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                parts[name] = fused.get(".".join(name.split(".")[-2:]), (parameter.shape[0],))
        return parts

    @property
    def output_weight(self) -> torch.Tensor:
        """The head's matrix, (V, D)."""
        return self._target.weight if self.head is None else self.head.weight

    @property
    def _target(self) -> nn.Embedding:
        return self.embed if self.target_embed is None else self.target_embed

    def forward(self, source_BS, mask_BS, inputs_BT, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return hidden states (B, T, D) for the head, of decoder inputs that begin with the start.

        The mask is true on the source's tokens (None: on all). With a generator, dropout draws from it. Padding of the inputs may stand
        on the right only: no token sees later ones.
        """
        drop, mask = self._drop(generator), key_mask(mask_BS)
        sources = self._sources(self._encoded(source_BS, mask, drop))
        x_BTD, _ = self.decoder(self._embedded(self._target, inputs_BT, 0, drop), mask, drop, sources)
        return self._output(x_BTD)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next token, (..., V)."""
        scores = F.linear(hidden, self.output_weight)
        return scores if self.head_bias is None else scores + self.head_bias.view(-1)

    def _drop(self, generator: torch.Generator | None) -> Drop:
        return lambda x: dropout(x, self.config.dropout, generator)

    def _encoded(self, source_BS, mask, drop: Drop, seen: Seen | None = None) -> torch.Tensor:
        return self.encoder(self._embedded(self.embed, source_BS, 0, drop), mask, drop, seen=seen)[0]

    def _sources(self, encoded_BSD: torch.Tensor) -> list[KeysValues]:
        return [layer.cross.keys_values(encoded_BSD) for layer in self.decoder.layers]

    def _embedded(self, table: nn.Embedding, tokens_BT: torch.Tensor, start: int, drop: Drop) -> torch.Tensor:
        x, config = table(tokens_BT), self.config
        if not config.is_t5:
            end = start + tokens_BT.shape[1]
            positions = sinusoids(max(end, config.max_seq_len), config.hidden_size)[start:end]
            x = (x * math.sqrt(config.hidden_size) if config.scale_embedding else x) + positions.to(x.device, x.dtype)
        return drop(x)

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.config.hidden_size**-0.5 if self.config.is_t5 and self.config.tie_embeddings else x

    @torch.no_grad()
    def encode(self, source_BS: torch.Tensor, source_mask_BS: torch.Tensor | None) -> Memory:
        """Read sources; returns what `step` attends to, its keys and values in every block."""
        mask = key_mask(source_mask_BS)
        return Memory(self._sources(self._encoded(source_BS, mask, self._drop(None))), mask)

    def begin(self, memory: Memory, rows: int) -> State:
        """Return the state before the decoder's start, one row a source."""
        assert rows == len(memory.sources[0][0]), "a row for each source"
        return State(memory, torch.arange(rows, device=memory.sources[0][0].device), memory.sources, memory.mask, None)

    @torch.no_grad()
    def step(self, tokens_B: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Read a target token a row; return the scores of the next, fp32 (B, V), and the state behind it."""
        position, drop = 0 if state.past is None else state.past[0][0].shape[2], self._drop(None)
        x_B1D = self._embedded(self._target, tokens_B[:, None], position, drop)
        hidden_B1D, past = self.decoder(x_B1D, state.mask, drop, state.sources, state.past)
        logits_BV = self.logits(self._output(hidden_B1D)[:, 0]).float()
        return logits_BV, State(state.memory, state.owners_B, state.sources, state.mask, past)

    @torch.no_grad()
    def attention_weights(self, source_S: torch.Tensor, inputs_T: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return one example's weights by plain softmax, fp32: "encoder" (L, H, S, S), "decoder" (L, H, T, T), "cross" (L, H, T, S)."""
        seen: Seen = {}
        drop = self._drop(None)
        sources = self._sources(self._encoded(source_S[None], None, drop, seen))
        self.decoder(self._embedded(self._target, inputs_T[None], 0, drop), None, drop, sources, seen=seen)
        return {name: torch.stack(weights) for name, weights in seen.items()}
