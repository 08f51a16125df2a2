"""The encoder: every position sees every other, left and right. BERT and ELECTRA are this with different heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from plinth.models.bidirectional import BiasedLinear, LayerNorm, MultiHeadAttention, key_mask
from plinth.models.embedding import Embedding
from plinth.models.encoder_config import EncoderConfig
from plinth.models.encoder_heads import activate, encoder_head

START_AT_ZERO = (".attention.out.weight", ".down.weight", "head.out.weight", "head.weight", "bias")


class Embeddings(nn.Module):
    """The sum of a token's, its position's and its segment's vector, normalised."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.embedding_width
        self.tokens = Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_seq_len, width)
        self.segments = nn.Embedding(config.num_segments, width)
        self.norm = LayerNorm(width, config.norm_eps)

    def forward(self, tokens_BT: torch.Tensor, segments_BT=None, positions_BT=None) -> torch.Tensor:
        """Return (B, T, X); without segments all positions are of the first kind, without positions they count from 0."""
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[-1], device=tokens_BT.device)
        kinds = self.segments.weight[0] if segments_BT is None else self.segments(segments_BT)
        return self.norm(self.tokens(tokens_BT) + kinds + self.positions(positions_BT))


class EncoderBlock(nn.Module):
    """Attention and feed-forward layer, each added to its input and normalised after the sum (post-norm).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1; Devlin et al. 2018, arXiv:1810.04805.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.attention = MultiHeadAttention(config.hidden_size, config.num_heads)
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.up = BiasedLinear(config.hidden_size, config.intermediate_size)
        self.down = BiasedLinear(config.intermediate_size, config.hidden_size)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.activation = config.activation

    def forward(self, x_BTD: torch.Tensor, mask=None) -> torch.Tensor:
        x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, mask=mask))
        return self.mlp_norm(x_BTD + self.down(activate(self.activation, self.up(x_BTD))))


class Encoder(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.embed = Embeddings(config)
        differs = config.embedding_width != config.hidden_size
        self.project = BiasedLinear(config.embedding_width, config.hidden_size) if differs else None
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))

    def forward(self, tokens_BT: torch.Tensor, mask=None, segments_BT=None, positions_BT=None) -> torch.Tensor:
        """Return the last block's hidden states (B, T, D)."""
        for state in self.states(tokens_BT, mask, segments_BT, positions_BT):
            last = state
        return last

    def states(self, tokens_BT: torch.Tensor, mask=None, segments_BT=None, positions_BT=None) -> Iterator[torch.Tensor]:
        """Give the embeddings and then what each block makes of them, (B, T, D) each."""
        x_BTD = self.embed(tokens_BT, segments_BT, positions_BT)
        x_BTD = x_BTD if self.project is None else self.project(x_BTD)
        yield x_BTD
        shown = attention_mask(mask)
        for layer in self.layers:
            x_BTD = layer(x_BTD, shown)
            yield x_BTD


class EncoderModel(nn.Module):
    """An encoder with a head; `forward` gives hidden states, `scores` what the head makes of them."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.pooler = BiasedLinear(config.hidden_size, config.hidden_size) if config.pooler else None
        self.head = encoder_head(config)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> EncoderModel:
        """Draw the weights; see `init_parameter`."""
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter, generator)
        return self

    def forward(self, tokens_BT: torch.Tensor, mask=None, segments_BT=None, positions_BT=None) -> torch.Tensor:
        """Return hidden states (B, T, D).

        `mask` is true where a position holds a token and not padding, (B, T), or says of each position which it sees, (B, T, T).
        `segments_BT` numbers the stretches of a row (a text and a second one), from 0.
        """
        return self.encoder(tokens_BT, mask, segments_BT, positions_BT)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the head makes of hidden states (..., D): of each position, or with head=classify of a text (B, T, D) as a whole.

        mlm (..., V), rtd (...), tag (..., labels), answer (..., 2), classify (B, labels).
        """
        if self.config.head == "none":
            raise ValueError("head=none computes no scores; take the hidden states.")
        if self.config.head == "classify":
            return self.head(self.pooled(hidden))
        return self.head(hidden, self.encoder.embed.tokens.weight) if self.config.head == "mlm" else self.head(hidden)

    def pooled(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return what stands for the whole text: the first position's state, through BERT's pooler where there is one, (B, D)."""
        first_BD = hidden_BTD[:, 0]
        return first_BD if self.pooler is None else torch.tanh(self.pooler(first_BD))

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, for who compiles them."""
        return list(self.encoder.layers)

    def matrix_parts(self) -> dict[str, tuple[int, ...]]:
        """Return the hidden matrices by parameter name, each with the row counts of the projections fused in it."""
        config, parts = self.config, dict[str, tuple[int, ...]]()
        for i in range(config.num_layers):
            parts[f"encoder.layers.{i}.attention.qkv.weight"] = (config.hidden_size,) * 3
            parts[f"encoder.layers.{i}.attention.out.weight"] = (config.hidden_size,)
            parts[f"encoder.layers.{i}.up.weight"] = (config.intermediate_size,)
            parts[f"encoder.layers.{i}.down.weight"] = (config.hidden_size,)
        return parts

    @torch.no_grad()
    def attention_weights(self, tokens_T: torch.Tensor, mask=None, segments_T=None, positions_T=None) -> dict[str, torch.Tensor]:
        """Return {"self": attention weights (L, H, T, S), fp32} of one text, by plain softmax."""
        mask, segments, positions = (None if x is None else x[None] for x in (mask, segments_T, positions_T))
        states = list(self.encoder.states(tokens_T[None], mask, segments, positions))[:-1]
        layers = [layer.attention.weights(x, mask=attention_mask(mask))[0] for layer, x in zip(self.encoder.layers, states)]
        return {"self": torch.stack(layers)}


def attention_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask (B, T) of tokens, or (B, T, T) of what each sees, as attention takes it."""
    return mask[:, None].bool() if mask is not None and mask.dim() == 3 else key_mask(mask)


@torch.no_grad()
def init_parameter(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Draw one parameter: matrices and embeddings normal with deviation 1/sqrt(columns), scales 1, biases 0.

    Embeddings are normalised before the first block, so their size sets how far an update turns them: small ones (BERT's 0.02) are turned
    too far at first. What writes to the residual stream starts at 0, so that every block begins as the identity, as in the decoder; so
    does a head's last layer, so that it begins with no opinion.
    """
    if name.endswith(START_AT_ZERO):
        parameter.zero_()
    elif parameter.dim() < 2:
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
