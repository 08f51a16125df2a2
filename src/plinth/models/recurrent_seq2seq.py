"""Sequence to sequence with LSTM or GRU cells: without attention, with additive and with multiplicative attention.

Sources: Sutskever et al. 2014, arXiv:1409.3215 (the state alone goes over); Cho et al. 2014, arXiv:1406.1078 (it is read at each step);
Bahdanau et al. 2014, arXiv:1409.0473 (additive attention); Luong et al. 2015, arXiv:1508.04025 (multiplicative attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError
from plinth.models.recurrent import RecurrentLayer
from plinth.models.recurrent_attention import AdditiveAttention, Attention, MultiplicativeAttention, Score
from plinth.ops.dropout import dropout
from plinth.ops.recurrent import GATES, STATES, Cell, State

EMBEDDING_RANGE = 0.1  # embeddings start uniform in ± this


@dataclass(frozen=True)
class RecurrentSeq2SeqConfig:
    """An encoder and a decoder of recurrent layers, and how the one looks at the other."""

    cell: Cell = "gru"
    """kind of the recurrent layers"""
    attention: Attention = "additive"
    """none: all of the source passes through the encoder's last state; additive (Bahdanau) or multiplicative (Luong)"""
    source_vocab_size: int = 4096
    """number of the source's token ids"""
    target_vocab_size: int = 4096
    """number of the target's token ids"""
    embedding_size: int = 256
    """width of a token's embedding, on both sides"""
    hidden_size: int = 512
    """width of a recurrent layer, in each direction"""
    num_layers: int = 1
    """layers of the encoder, and of the decoder"""
    bidirectional: bool = True
    """let a second encoder read the source from its end"""
    repeat_context: bool = True
    """without attention: show the encoder's last state to each step of the decoder and to its head, not only as its first state"""
    score: Score = "general"
    """with multiplicative attention: dot (query · key) or general (query · W key)"""
    input_feeding: bool = False
    """with multiplicative attention: each step reads what the one before it handed to the head; slower, as steps then run one by one"""
    dropout: float = 0.2
    """share of numbers dropped from embeddings, between layers and before the head, 0 to 1"""

    def __post_init__(self) -> None:
        for name in ("source_vocab_size", "target_vocab_size", "embedding_size", "hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout={self.dropout} must be at least 0 and less than 1.")

    @property
    def vocab_size(self) -> int:
        """Number of the source's token ids: its tokenizer is the one in the model's folder."""
        return self.source_vocab_size

    @property
    def memory_size(self) -> int:
        """Width of the encoder's output at each place."""
        return self.hidden_size * (2 if self.bidirectional else 1)

    @property
    def context_size(self) -> int:
        """Width of what the decoder reads of the source at each step; 0 when it starts from the encoder's state and reads nothing more."""
        if self.attention == "none":
            return self.hidden_size if self.repeat_context else 0
        return self.memory_size

    @property
    def fed_size(self) -> int:
        """Width of what the decoder's first layer reads beside the embedding."""
        if self.attention == "multiplicative":
            return self.hidden_size if self.input_feeding else 0
        return self.context_size

    @property
    def head_size(self) -> int:
        """Width of what the head reads: the decoder's output, with the context and the embedding where a step reads those too."""
        if self.attention == "multiplicative" or not self.context_size:
            return self.hidden_size
        return self.hidden_size + self.context_size + self.embedding_size

    def train_flops(self, source_len: float, target_len: float) -> float:
        """Return the operations of a training step on a pair of so many tokens, in matrix products: three times those of a forward pass."""
        gates, hidden, memory = GATES[self.cell], self.hidden_size, self.memory_size
        directions = 2 if self.bidirectional else 1
        encoder = sum(directions * gates * hidden * (width + hidden) for width in [self.embedding_size] + [memory] * (self.num_layers - 1))
        bridges = memory * hidden * STATES[self.cell] * self.num_layers if self.bidirectional else 0
        widths = [self.embedding_size + self.fed_size] + [hidden] * (self.num_layers - 1)
        decoder = sum(gates * hidden * (width + hidden) for width in widths) + self.head_size * self.target_vocab_size
        keys, query, pair = 0, 0, 0
        if self.attention == "additive":
            keys, query, pair = memory * hidden, hidden * hidden, hidden + memory
        elif self.attention == "multiplicative":
            keys, query, pair = memory * hidden * (self.score == "general"), (memory + hidden) * hidden, hidden + memory
        return 6.0 * ((encoder + keys) * source_len + bridges + (decoder + query) * target_len + pair * source_len * target_len)


class Memory(NamedTuple):
    """What the encoder made of some sources; a row each."""

    values_BSD: torch.Tensor
    """outputs at each place"""
    keys_BSF: torch.Tensor | None
    """what attention compares with"""
    mask_BS: torch.Tensor
    """True at the source's own places"""
    first: tuple[State, ...]
    """the decoder's first state, of each layer"""

    def select(self, rows_B: torch.Tensor) -> Memory:
        """Return some rows, any of them any number of times."""
        keys = None if self.keys_BSF is None else self.keys_BSF[rows_B]
        first = tuple(tuple(part[rows_B] for part in state) for state in self.first)
        return Memory(self.values_BSD[rows_B], keys, self.mask_BS[rows_B], first)


@dataclass(frozen=True)
class DecoderState:
    """Where some decoders stand."""

    memory: Memory
    """what they look at"""
    layers: tuple[State, ...]
    """state of each layer"""
    fed_BD: torch.Tensor | None
    """what the first layer reads beside the next embedding, where that is known already"""

    def select(self, rows_B: torch.Tensor) -> DecoderState:
        """Return the state of some rows, any of them any number of times."""
        layers = tuple(tuple(part[rows_B] for part in state) for state in self.layers)
        return DecoderState(self.memory.select(rows_B), layers, None if self.fed_BD is None else self.fed_BD[rows_B])


class Encoder(nn.Module):
    """Recurrent layers over the source, in one direction or in both, and the decoder's first state from their last ones."""

    def __init__(self, config: RecurrentSeq2SeqConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.source_vocab_size, config.embedding_size)
        sizes = [config.embedding_size] + [config.memory_size] * (config.num_layers - 1)
        self.forwards = nn.ModuleList(RecurrentLayer(config.cell, size, config.hidden_size) for size in sizes)
        two = config.bidirectional
        self.backwards = nn.ModuleList(RecurrentLayer(config.cell, size, config.hidden_size, backwards=True) for size in sizes if two)
        bridges = STATES[config.cell] * config.num_layers if two else 0
        self.bridges = nn.ModuleList(nn.Linear(config.memory_size, config.hidden_size) for _ in range(bridges))

    def forward(
        self, source_BS: torch.Tensor, mask_BS: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, tuple[State, ...]]:
        """Return the outputs (B, S, D), 0 at padding, and the decoder's first state of each layer."""
        rate, lengths_B = self.config.dropout, mask_BS.sum(1)
        x, last = dropout(self.embed(source_BS), rate, generator), []
        for i, layer in enumerate(self.forwards):
            x = dropout(x, rate, generator) if i else x
            outputs, state = layer(x, None, lengths_B)
            if self.config.bidirectional:
                other, other_state = self.backwards[i](x, None, lengths_B)
                outputs, state = torch.cat([outputs, other], -1), self._bridged(i, state, other_state)
            x = outputs
            last.append(state)
        return x, tuple(last)

    def _bridged(self, layer: int, state: State, other: State) -> State:
        """Return one state from those of both directions: tanh(W [h; h']), and W' [c; c'] of an LSTM's cells, which have no bound."""
        parts = [torch.cat(pair, -1) for pair in zip(state, other)]
        first = layer * len(parts)
        hidden, *cells = (self.bridges[first + i](part) for i, part in enumerate(parts))
        return (torch.tanh(hidden), *cells)


class RecurrentSeq2Seq(nn.Module):
    """A recurrent encoder and decoder; `forward` gives what the head reads, `logits` the scores of the next target token."""

    def __init__(self, config: RecurrentSeq2SeqConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.embed = nn.Embedding(config.target_vocab_size, config.embedding_size)
        sizes = [config.embedding_size + config.fed_size] + [config.hidden_size] * (config.num_layers - 1)
        self.layers = nn.ModuleList(RecurrentLayer(config.cell, size, config.hidden_size) for size in sizes)
        self.attention: AdditiveAttention | MultiplicativeAttention | None = None
        if config.attention == "additive":
            self.attention = AdditiveAttention(config.hidden_size, config.memory_size, config.hidden_size)
        elif config.attention == "multiplicative":
            self.attention = MultiplicativeAttention(config.hidden_size, config.memory_size, config.score)
        is_luong = config.attention == "multiplicative"
        self.combine = nn.Linear(config.memory_size + config.hidden_size, config.hidden_size, bias=False) if is_luong else None
        self.head = nn.Linear(config.head_size, config.target_vocab_size)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> RecurrentSeq2Seq:
        """Draw the weights: embeddings uniform in ±0.1, layers as `RecurrentLayer` does, other matrices uniform in ±1/sqrt(fan_in)."""
        for module in self.modules():
            if isinstance(module, RecurrentLayer):
                module.init_weights(generator)
            elif isinstance(module, nn.Embedding):
                module.weight.uniform_(-EMBEDDING_RANGE, EMBEDDING_RANGE, generator=generator)
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        return self

    @property
    def output_weight(self) -> torch.Tensor:
        """The head's matrix, shape (V, D)."""
        return self.head.weight

    @property
    def runs_whole(self) -> bool:
        """Whether a target that is known runs in one call: no step reads what attention made of the one before it."""
        return self.config.attention == "none" or (self.config.attention == "multiplicative" and not self.config.input_feeding)

    def encode(self, source_BS: torch.Tensor, mask_BS: torch.Tensor | None = None, generator: torch.Generator | None = None) -> Memory:
        """Read sources; the mask is True at their own places, which come first. Without one there is no padding."""
        mask_BS = torch.ones_like(source_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
        values_BSD, first = self.encoder(source_BS, mask_BS, generator)
        return Memory(values_BSD, None if self.attention is None else self.attention.keys(values_BSD), mask_BS, first)

    def begin(self, memory: Memory, rows: int | None = None) -> DecoderState:
        """Return the decoder's state before its first token; `rows`, where given, is how many the memory has."""
        config, fed = self.config, None
        if config.attention == "none" and config.repeat_context:
            fed = memory.first[-1][0]
        elif config.fed_size:
            fed = memory.values_BSD.new_zeros(len(memory.values_BSD), config.fed_size)
        return DecoderState(memory, memory.first, fed)

    def advance(
        self, tokens_B: torch.Tensor, state: DecoderState, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, DecoderState, torch.Tensor | None]:
        """Read one target token a row; return what the head reads (B, D), the next state, and attention's weights (B, S)."""
        rate, fed, weights = self.config.dropout, state.fed_BD, None
        embedded = dropout(self.embed(tokens_B), rate, generator)
        if self.config.attention == "additive":  # looks before the step, by the state that the last one left
            assert isinstance(self.attention, AdditiveAttention)
            fed, weights = self._look(state.layers[-1][0][:, None], state.memory)
            fed, weights = fed[:, 0], weights[:, 0]
        x, after = embedded if fed is None else torch.cat([embedded, fed], -1), []
        for i, layer in enumerate(self.layers):
            x = dropout(x, rate, generator) if i else x
            after.append(layer.step(x, state.layers[i]))
            x = after[-1][0]
        if self.combine is not None:  # looks after the step, by the state that it left
            read, weights_B1S = self._combined(x[:, None], state.memory)
            read, weights = read[:, 0], weights_B1S[:, 0]
            fed = read if self.config.input_feeding else None
        else:
            read = torch.cat([x, fed, embedded], -1) if fed is not None else x
        return dropout(read, rate, generator), DecoderState(state.memory, tuple(after), fed), weights

    def _look(self, query_BTD: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention(query_BTD, memory.keys_BSF, memory.values_BSD, memory.mask_BS)

    def _combined(self, output_BTH: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attentional hidden state tanh(W [context; output]) (Luong et al., eq. 5), and the weights."""
        context_BTD, weights_BTS = self._look(output_BTH, memory)
        return torch.tanh(self.combine(torch.cat([context_BTD, output_BTH], -1))), weights_BTS

    def step(self, tokens_B: torch.Tensor, state: DecoderState) -> tuple[torch.Tensor, DecoderState]:
        """Read a token a row; return the scores of the next, float32 (B, V), and the state behind it."""
        read, state, _ = self.advance(tokens_B, state)
        return self.logits(read).float(), state

    def forward(
        self,
        source_BS: torch.Tensor,
        targets_BT: torch.Tensor,
        mask_BS: torch.Tensor | None = None,
        *,
        teacher_forcing: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Return what the head reads at each target place, (B, T, D), when the decoder is given the target's tokens one by one.

        `generator` turns dropout on. With `teacher_forcing` below 1 it also draws, place by place, whether the
        decoder reads the target's token (with that probability) or the one that it finds most probable itself.
        """
        memory = self.encode(source_BS, mask_BS, generator)
        if teacher_forcing >= 1.0 and self.runs_whole:
            return self._run_whole(targets_BT, memory, generator)
        return self._run_steps(targets_BT, memory, teacher_forcing, generator)[0]

    def _run_whole(self, targets_BT: torch.Tensor, memory: Memory, generator: torch.Generator | None) -> torch.Tensor:
        rate, state = self.config.dropout, self.begin(memory)
        embedded = dropout(self.embed(targets_BT), rate, generator)
        fed = None if state.fed_BD is None else state.fed_BD[:, None].expand(-1, targets_BT.shape[1], -1)
        x = embedded if fed is None else torch.cat([embedded, fed], -1)
        for i, layer in enumerate(self.layers):
            x, _ = layer(dropout(x, rate, generator) if i else x, state.layers[i])
        if self.combine is not None:
            x = self._combined(x, memory)[0]
        elif fed is not None:
            x = torch.cat([x, fed, embedded], -1)
        return dropout(x, rate, generator)

    def _run_steps(
        self, targets_BT: torch.Tensor, memory: Memory, teacher_forcing: float, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        state, tokens_B = self.begin(memory), targets_BT[:, 0]
        reads, looks = [], []
        for t in range(targets_BT.shape[1]):
            if t and teacher_forcing < 1.0:
                given_B = (torch.rand(len(tokens_B), generator=generator) < teacher_forcing).to(tokens_B.device)
                with torch.no_grad():
                    own_B = self.logits(reads[-1]).argmax(-1)
                tokens_B = torch.where(given_B, targets_BT[:, t], own_B)
            else:
                tokens_B = targets_BT[:, t]
            read, state, weights = self.advance(tokens_B, state, generator)
            reads.append(read)
            looks.append(weights)
        return torch.stack(reads, 1), looks

    def logits(self, read: torch.Tensor) -> torch.Tensor:
        """Return next-token scores, shape (..., V)."""
        return F.linear(read, self.head.weight, self.head.bias)

    @torch.no_grad()
    def attention_weights(self, source_S: torch.Tensor, targets_T: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"cross": (1, 1, T, S)} in fp32: where the decoder looks when it reads each target token; empty without attention."""
        if self.attention is None:
            return {}
        memory = self.encode(source_S[None])
        looks = self._run_steps(targets_T[None], memory, 1.0, None)[1]
        return {"cross": torch.stack(looks, 1)[None].float()}

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices, with the row counts of the gates fused in them; embeddings, head and score vector are none."""
        parts: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, RecurrentLayer):
                parts |= {f"{name}.{matrix}": rows for matrix, rows in module.matrix_parts().items()}
            elif isinstance(module, nn.Linear) and name != "head" and module.out_features > 1:
                parts[f"{name}.weight"] = (module.out_features,)
        return parts
