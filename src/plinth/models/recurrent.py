"""Recurrent layers, and the AWD-LSTM language model.

Source: Merity, Keskar and Socher 2017, arXiv:1708.02182.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError
from plinth.ops.dropout import dropout
from plinth.ops.recurrent import GATES, STATES, STEPS, Cell, State, Weights, reverse_rows, run_layer
from plinth.ops.sequence_dropout import locked_dropout, word_dropout

DROPOUTS = ("embedding_dropout", "input_dropout", "hidden_dropout", "weight_dropout", "output_dropout")


class RecurrentLayer(nn.Module):
    """One layer of LSTM or GRU cells, in one direction."""

    def __init__(self, cell: Cell, input_size: int, hidden_size: int, *, backwards: bool = False):
        super().__init__()
        self.cell, self.hidden_size, self.backwards = cell, hidden_size, backwards
        rows = GATES[cell] * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw weights and biases uniformly in ±1/sqrt(H), as PyTorch does; an LSTM's forget gates start open, with a bias of 1 more.

        Source: Jozefowicz et al. 2015, "An empirical exploration of recurrent network architectures" (the open forget gate).
        """
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
        if self.cell == "lstm":
            self.bias_ih[self.hidden_size : 2 * self.hidden_size] += 1.0

    def zero_state(self, rows: int) -> State:
        """Return the state before any input, in the weights' dtype."""
        return tuple(self.weight_hh.new_zeros(rows, self.hidden_size) for _ in range(STATES[self.cell]))

    def weights(self, weight_dropout: float = 0.0, generator: torch.Generator | None = None) -> Weights:
        """Return the weights of one forward pass; with a generator, single recurrent weights are dropped for all of it.

        Source: Wan et al. 2013, "Regularization of neural networks using DropConnect".
        """
        return self.weight_ih, dropout(self.weight_hh, weight_dropout, generator), self.bias_ih, self.bias_hh

    def forward(
        self, x_BTD: torch.Tensor, state: State | None = None, lengths_B: torch.Tensor | None = None, weights: Weights | None = None
    ) -> tuple[torch.Tensor, State]:
        """Return the outputs (B, T, H), 0 behind a row's length, and the last state; backwards, the last is the one at the first input."""
        state = self.zero_state(x_BTD.shape[0]) if state is None else state
        weights = weights or self.weights()
        if not self.backwards:
            return run_layer(self.cell, x_BTD, state, weights, lengths_B)
        outputs, after = run_layer(self.cell, reverse_rows(x_BTD, lengths_B), state, weights, lengths_B)
        return reverse_rows(outputs, lengths_B), after

    def step(self, x_BD: torch.Tensor, state: State) -> State:
        """Return the state after one input; its first tensor is the output."""
        return STEPS[self.cell](x_BD, state, self.weights())

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the matrices with the row counts of their gates."""
        rows = (self.hidden_size,) * GATES[self.cell]
        return {"weight_ih": rows, "weight_hh": rows}


@dataclass(frozen=True)
class AwdLstmConfig:
    """An LSTM language model regularised by dropped weights, channels and words."""

    vocab_size: int = 4096
    """number of token ids"""
    embedding_size: int = 256
    """width of a token's embedding; with tie_embeddings of the last layer too"""
    hidden_size: int = 640
    """width of the layers but the last, and of that without tie_embeddings"""
    num_layers: int = 3
    """LSTM layers"""
    tie_embeddings: bool = True
    """use the embedding matrix as output head"""
    embedding_dropout: float = 0.02
    """share of the vocabulary's tokens dropped in a training step, 0 to 1"""
    input_dropout: float = 0.25
    """share of the embedding's channels dropped, the same at all positions of a sequence"""
    hidden_dropout: float = 0.15
    """share of the channels dropped between layers, the same at all positions"""
    weight_dropout: float = 0.2
    """share of each layer's recurrent weights dropped, the same at all positions"""
    output_dropout: float = 0.1
    """share of the channels dropped before the head, the same at all positions"""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in DROPOUTS:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and less than 1.")

    def without_dropout(self, factor: float = 0.0) -> AwdLstmConfig:
        """Return the configuration with all rates of dropout multiplied by `factor`."""
        return replace(self, **{name: factor * getattr(self, name) for name in DROPOUTS})

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """Input and output width of each layer."""
        last = self.embedding_size if self.tie_embeddings else self.hidden_size
        outputs = [self.hidden_size] * (self.num_layers - 1) + [last]
        return list(zip([self.embedding_size, *outputs], outputs))

    @property
    def train_flops_per_token(self) -> int:
        """Operations of a training step a token, in matrix products: 6 a weight of the layers and of the head."""
        layers = sum(4 * out * (width + out) for width, out in self.layer_sizes)
        return 6 * (layers + self.vocab_size * self.layer_sizes[-1][1])


class LstmRun(NamedTuple):
    """What an AWD-LSTM computed of a text."""

    raw: list[torch.Tensor]
    """outputs of each layer before dropout, (B, T, H) each"""
    hidden: list[torch.Tensor]
    """outputs of each layer as the next one, or the head, reads them: after dropout"""
    state: list[State]
    """state of each layer behind the last token"""


@dataclass(frozen=True)
class LstmState:
    """Where some texts stand, for generation token by token."""

    layers: list[State]
    """state of each layer"""

    def select(self, rows_B: torch.Tensor) -> LstmState:
        """Return the state of some rows, any of them any number of times."""
        return LstmState([tuple(part[rows_B] for part in state) for state in self.layers])


class AwdLstm(nn.Module):
    """A recurrent language model; `forward` gives hidden states, `logits` the scores of the next token.

    Dropout happens where a generator is handed in, and nowhere else.
    Differs from the paper: no averaging of weights at the end (NT-ASGD); the training loop's schedule and optimizers take its place.
    """

    def __init__(self, config: AwdLstmConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(RecurrentLayer("lstm", width, out) for width, out in config.layer_sizes)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> AwdLstm:
        """Draw the weights: embedding and head uniform with deviation 1/sqrt(width), the head's bias 0, layers as `RecurrentLayer` does.

        At the paper's width of 400 that is ±0.09, about its ±0.1, which is too little for narrow ones.
        """
        bound = (3.0 / self.config.embedding_size) ** 0.5
        self.embed.weight.uniform_(-bound, bound, generator=generator)
        for layer in self.layers:
            layer.init_weights(generator)
        if self.head is not None:
            bound = (3.0 / self.config.hidden_size) ** 0.5
            self.head.weight.uniform_(-bound, bound, generator=generator)
        self.head_bias.zero_()
        return self

    @property
    def output_weight(self) -> torch.Tensor:
        """The head's matrix, shape (V, D)."""
        return self.embed.weight if self.head is None else self.head.weight

    def zero_state(self, rows: int) -> list[State]:
        """Return the state of each layer before any token."""
        return [layer.zero_state(rows) for layer in self.layers]

    def run(
        self,
        tokens_BT: torch.Tensor,
        state: list[State] | None = None,
        generator: torch.Generator | None = None,
        lengths_B: torch.Tensor | None = None,
        frozen: int = 0,
    ) -> LstmRun:
        """Read tokens on from a state (default: none before) and return every layer's outputs at every position.

        `generator` turns dropout on. `lengths_B` is for text padded on the right. No gradient reaches the first `frozen` of the
        `depth_groups`: the embedding, and then layer after layer.
        """
        config, learns = self.config, torch.is_grad_enabled()
        with torch.set_grad_enabled(learns and not frozen):
            x = word_dropout(self.embed(tokens_BT), tokens_BT, config.vocab_size, config.embedding_dropout, generator)
            x = locked_dropout(x, config.input_dropout, generator)
        raw, hidden, after = [], [], []
        for i, (layer, before) in enumerate(zip(self.layers, state or self.zero_state(tokens_BT.shape[0]))):
            rate = config.output_dropout if i == len(self.layers) - 1 else config.hidden_dropout
            with torch.set_grad_enabled(learns and i + 1 >= frozen):
                output, layer_state = layer(x, before, lengths_B, layer.weights(config.weight_dropout, generator))
                x = locked_dropout(output, rate, generator)
            raw.append(output)
            hidden.append(x)
            after.append(layer_state)
        return LstmRun(raw, hidden, after)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return the last layer's outputs, shape (B, T, D), for texts that begin at their first token."""
        return self.run(tokens_BT).hidden[-1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return next-token scores of hidden states, shape (..., V)."""
        return F.linear(hidden, self.output_weight, self.head_bias)

    def encode(self, source_BS: torch.Tensor, source_mask_BS: torch.Tensor) -> None:
        """Be a language model: there is nothing to look at."""

    def begin(self, memory: None, rows: int) -> LstmState:
        """Return the state before the first token of `rows` texts."""
        return LstmState(self.zero_state(rows))

    def step(self, tokens_B: torch.Tensor, state: LstmState) -> tuple[torch.Tensor, LstmState]:
        """Read a token a row; return the scores of the next, float32 (B, V), and the state behind it."""
        x, after = self.embed(tokens_B), []
        for layer, before in zip(self.layers, state.layers):
            after.append(layer.step(x, before))
            x = after[-1][0]
        return self.logits(x).float(), LstmState(after)

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices, with the row counts of the gates fused in them."""
        return {f"layers.{i}.{name}": rows for i, layer in enumerate(self.layers) for name, rows in layer.matrix_parts().items()}

    def depth_groups(self) -> list[list[str]]:
        """Return the parameters' names from the input to the output: embedding (with a tied head's bias), each layer, a head of its own.

        Finetuning gives each group a rate of its own (Howard and Ruder 2018, arXiv:1801.06146).
        """
        first = ["embed.weight"] + (["head_bias"] if self.head is None else [])
        layers = [[f"layers.{i}.{name}" for name, _ in layer.named_parameters()] for i, layer in enumerate(self.layers)]
        return [first, *layers] + ([] if self.head is None else [["head.weight", "head_bias"]])
