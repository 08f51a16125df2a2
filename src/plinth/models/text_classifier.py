"""Labels of texts from a pretrained language model: its states pooled, and a small head on them.

Source: Howard and Ruder 2018, arXiv:1801.06146 (ULMFiT), sections 3.3 and 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.models.text_classifier_config import PooledHeadConfig
from plinth.models.transformer import Transformer
from plinth.ops.dropout import dropout
from plinth.ops.pooling import POOLS, pool

LANGUAGE_MODEL_ONLY = ("head.weight", "head_bias")  # of the trunk: what makes scores of the vocabulary
NORM_EPS = 1e-5


@dataclass(frozen=True)
class TextClassifierConfig:
    """A language model without its vocabulary's head, the labels, and the head that tells them."""

    trunk: AwdLstmConfig | DecoderConfig
    """shape of the language model"""
    labels: tuple[str, ...]
    """names of the labels"""
    head: PooledHeadConfig
    """pooling and layers"""

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels={self.labels!r} must be the names of two labels or more, each once.")

    @property
    def vocab_size(self) -> int:
        return self.trunk.vocab_size

    @property
    def longest(self) -> int | None:
        """Longest text in tokens, the one that begins it included; None where there is no limit."""
        return self.trunk.max_seq_len if isinstance(self.trunk, DecoderConfig) else None

    @property
    def pooled_size(self) -> int:
        """Channels that the head reads."""
        width = self.trunk.hidden_size if isinstance(self.trunk, DecoderConfig) else self.trunk.layer_sizes[-1][1]
        return width * len(POOLS[self.head.pooling])


class BatchNorm(nn.Module):
    """Channels to mean 0 and deviation 1, then scaled and moved: over the batch in training, by kept statistics in use.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.  Differs: the statistics are not averaged on the way, but those of the finished
    model over its training examples (`TextClassifier.settle`), without dropout, as Wu and Johnson 2021, arXiv:2105.07576, advise. So
    there is no state that depends on the order in which threads come.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def forward(self, x_BD: torch.Tensor, over_batch: bool) -> torch.Tensor:
        wide = x_BD.float()
        mean, variance = (wide.mean(0), wide.var(0, correction=0)) if over_batch else (self.mean.float(), self.variance.float())
        return ((wide - mean) * torch.rsqrt(variance + NORM_EPS)).to(x_BD.dtype) * self.weight + self.bias

    @torch.no_grad()
    def settle(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Keep the mean and variance of examples, and return them normalised."""
        self.mean.copy_(x_ND.mean(0))
        self.variance.copy_(x_ND.var(0, correction=0))
        return self(x_ND, over_batch=False)


class PooledHead(nn.Module):
    """Scores of labels from a pooled text: for each layer batch norm, dropout, the layer; a ReLU between."""

    def __init__(self, config: TextClassifierConfig):
        super().__init__()
        head = config.head
        sizes = [config.pooled_size, *([head.hidden_size] if head.hidden_size else []), len(config.labels)]
        self.rates = (head.pooled_dropout, head.hidden_dropout)[: len(sizes) - 1]
        self.norms = nn.ModuleList(BatchNorm(size) for size in (sizes[:-1] if head.batch_norm else ()))
        self.layers = nn.ModuleList(nn.Linear(width, out) for width, out in zip(sizes, sizes[1:]))

    def forward(self, x_BD: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return scores (B, labels); a generator turns on dropout and batch statistics."""
        for i, (layer, rate) in enumerate(zip(self.layers, self.rates)):
            x_BD = F.relu(x_BD) if i else x_BD
            x_BD = self.norms[i](x_BD, over_batch=generator is not None) if self.norms else x_BD
            x_BD = layer(dropout(x_BD, rate, generator))
        return x_BD

    @torch.no_grad()
    def settle(self, x_ND: torch.Tensor) -> None:
        """Take the statistics of batch norm from examples, layer by layer."""
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers)):
            x_ND = layer(norm.settle(F.relu(x_ND) if i else x_ND))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the layers with deviation 1/sqrt(fan_in); the last starts at 0, so that the head begins with no opinion."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.startswith(f"layers.{len(self.layers) - 1}."):
                parameter.zero_()
            elif parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


class TextClassifier(nn.Module):
    """A language model's trunk with a pooled head; `forward` gives scores of labels."""

    def __init__(self, config: TextClassifierConfig):
        super().__init__()
        self.config = config
        self.trunk: AwdLstm | Transformer = AwdLstm(config.trunk) if isinstance(config.trunk, AwdLstmConfig) else Transformer(config.trunk)
        self.trunk.head = None
        if isinstance(self.trunk, AwdLstm):
            del self.trunk.head_bias
        self.head = PooledHead(config)

    def init_weights(self, generator: torch.Generator) -> TextClassifier:
        """Draw all weights; a trunk that is pretrained is put in afterwards with `load_trunk`."""
        whole = type(self.trunk)(self.config.trunk).init_weights(generator)
        self.load_trunk(whole)
        self.head.init_weights(generator)
        return self

    def load_trunk(self, model: nn.Module) -> None:
        """Take the weights of a language model of the trunk's shape, without its head."""
        self.trunk.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name not in LANGUAGE_MODEL_ONLY})

    def forward(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, generator: torch.Generator | None = None, frozen: int = 0
    ) -> torch.Tensor:
        """Return scores (B, labels) of texts padded on the right.

        `generator` turns on dropout and batch statistics. No gradient reaches the first `frozen` of the `depth_groups`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and frozen < len(self.depth_groups()) - 1):
            pooled_BD = self.pooled(tokens_BT, lengths_B, generator, frozen)
        return self.head(pooled_BD, generator)

    def pooled(
        self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, generator: torch.Generator | None = None, frozen: int = 0
    ) -> torch.Tensor:
        """Return what the head reads of each text, (B, pooled_size)."""
        if isinstance(self.trunk, Transformer):
            hidden_BTD = self.trunk(tokens_BT, frozen=frozen)  # padding stands behind, where no token looks
        else:
            hidden_BTD = self._read_in_chunks(self.trunk, tokens_BT, lengths_B, generator, frozen)
        return pool(hidden_BTD, lengths_B, self.config.head.pooling)

    def _read_in_chunks(self, trunk: AwdLstm, tokens_BT, lengths_B, generator, frozen: int) -> torch.Tensor:
        """Return the last layer's states of all positions; each chunk begins with the state that the one before left (BPT3C).

        Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.3.  Differs: as in fastai no gradient crosses from a chunk into the one
        before; but every chunk is pooled, where fastai pools the last 1440 tokens only, and `gradient_tokens` says which ones learn.
        """
        width = tokens_BT.shape[1]
        size, learnt = self.config.head.chunk_tokens or width, self.config.head.gradient_tokens
        first = 0 if learnt is None else int(lengths_B.min()) - learnt
        state, parts = None, []
        for start in range(0, width, size):
            stop = min(start + size, width)
            with torch.set_grad_enabled(torch.is_grad_enabled() and stop > first):
                run = trunk.run(tokens_BT[:, start:stop], state, generator, frozen=frozen)
            state = [tuple(part.detach() for part in layer) for layer in run.state]
            parts.append(run.hidden[-1])
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def settle(self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take the statistics of batch norm from texts, (tokens (B, T), lengths (B,)) each: the last thing before the model is used."""
        if self.config.head.batch_norm:
            self.head.settle(torch.cat([self.pooled(tokens, lengths) for tokens, lengths in batches]))

    def depth_groups(self) -> list[list[str]]:
        """Return the parameters' names from the input to the output: the trunk's groups, then the head."""
        kept = [[name for name in group if name not in LANGUAGE_MODEL_ONLY] for group in self.trunk.depth_groups()]
        groups = [[f"trunk.{name}" for name in group] for group in kept if group]
        return [*groups, [f"head.{name}" for name, _ in self.head.named_parameters()]]

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, for who compiles them."""
        return list(self.trunk.layers)

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by parameter name, each with the row counts of the projections fused in it."""
        return {f"trunk.{name}": rows for name, rows in self.trunk.matrix_parts().items()}
