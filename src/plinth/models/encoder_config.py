"""What an encoder is: its shape, its head, and the family that it is published as."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from plinth.config import UserError

Head = Literal["none", "mlm", "rtd", "classify", "tag", "answer"]
HEADS: dict[str, str] = {
    "none": "hidden states alone",
    "mlm": "the token under a mask",
    "rtd": "whether a token was replaced",
    "classify": "a label for a text",
    "tag": "a label for each word",
    "answer": "the start and the end of an answer",
}
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
LABELLED = ("classify", "tag")


@dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional Transformer with normalisation after each sum, as BERT and ELECTRA have it."""

    vocab_size: int = 4096
    """number of token ids"""
    hidden_size: int = 256
    """width of the residual stream"""
    num_layers: int = 4
    """number of blocks"""
    num_heads: int = 4
    """heads a block; divides hidden_size"""
    intermediate_size: int = 1024
    """width of the feed-forward layer"""
    max_seq_len: int = 256
    """longest sequence in tokens, the marks at its ends included"""
    num_segments: int = 2
    """kinds of stretches that a sequence may have: a text and a second one (token types)"""
    embedding_size: int | None = None
    """width of the embeddings, projected to hidden_size where it differs; ELECTRA only (default: hidden_size)"""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    """function of the feed-forward layer"""
    norm_eps: float = 1e-12
    """added to the variance before the root"""
    tie_embeddings: bool = True
    """the masked-token head multiplies with the embeddings"""
    pad_id: int = 0
    """id of padding"""
    pooler: bool = False
    """a tanh layer on the first position, as BERT's classifier reads it"""
    head: Head = "mlm"
    """what is computed from the hidden states"""
    labels: tuple[str, ...] = ()
    """names of the labels, for the heads classify and tag"""
    published_as: Literal["bert", "electra"] = "bert"
    """Hugging Face's model_type that it is saved as; decides the shape of the heads"""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_seq_len", "num_segments"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}. "
                f"Use {self.hidden_size // self.num_heads * self.num_heads or self.num_heads}, or change num_heads."
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r} is unknown. Use one of {', '.join(ACTIVATIONS)}.")
        if self.head not in HEADS:
            raise UserError(f"head={self.head!r} is unknown. Use one of {', '.join(HEADS)}.")
        if self.norm_eps <= 0:
            raise UserError(f"norm_eps={self.norm_eps} must be positive.")
        self._check_family()

    def _check_family(self) -> None:
        is_bert = self.published_as == "bert"
        if is_bert and self.embedding_size not in (None, self.hidden_size):
            raise UserError(
                f"embedding_size={self.embedding_size} differs from hidden_size={self.hidden_size}: BERT has one width. "
                "Leave it out, or set published_as=electra."
            )
        if is_bert and self.head == "rtd":
            raise UserError("head=rtd (replaced tokens) is ELECTRA's. Set published_as=electra, or take head=mlm.")
        if self.head in LABELLED and (len(self.labels) < 1 or len(set(self.labels)) < len(self.labels)):
            raise UserError(f"labels={self.labels!r} must be the names of the labels, each once, for head={self.head}.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def num_outputs(self) -> int:
        """Scores a position, or a text, that the head gives."""
        return {"none": 0, "mlm": self.vocab_size, "rtd": 1, "answer": 2}.get(self.head, len(self.labels))

    def with_head(self, head: Head, labels: tuple[str, ...] = ()) -> EncoderConfig:
        """Return the shape with another head; BERT's classifier has the pooler, and no other head has it."""
        return replace(self, head=head, labels=labels, pooler=head == "classify" and self.published_as == "bert")


def train_flops_per_token(config: EncoderConfig, seq_len: int, head_share: float = 1.0) -> float:
    """Return the operations of a training step a token: three times forward, a multiply-add counted as two.

    `head_share` is the share of the positions that the head sees. Norms, softmax and embeddings' look-ups are left out.
    """
    width, outputs = config.hidden_size, config.num_outputs
    block = 4 * width * width + 2 * width * config.intermediate_size
    attention = 2 * width * seq_len  # scores and values: each position sees all
    project = width * config.embedding_width if config.embedding_width != width else 0
    head = {"mlm": config.embedding_width * (width + outputs), "rtd": width * (width + 1)}.get(config.head, width * outputs)
    return 6.0 * (config.num_layers * (block + attention) + project + head_share * head)
