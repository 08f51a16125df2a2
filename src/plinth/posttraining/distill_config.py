"""What distillation and a teacher's file are told, without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from plinth.config import UserError, check_least, check_positive
from plinth.posttraining.lora_config import LoraConfig
from plinth.training.config import DTYPE_NAMES, OptimizerConfig, TrainConfig

DIVERGENCE_NAMES = ("forward_kl", "reverse_kl", "symmetric_kl", "jsd", "total_variation")


@dataclass(frozen=True)
class DistillConfig:
    """Loss, batches and schedule of distillation."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=10, keep_pre_decay=False, compile=False, optimizer=OptimizerConfig(lr=0.002, muon_lr=0.01)
        )
    )
    """optimizer and schedule; not compiled on a GPU, as its batches have many shapes"""
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, symmetric_kl, jsd or total_variation, of teacher and student"""
    beta: float | None = None
    """weight of the teacher in jsd's mixture: 0 is the forward KL, 1 the reverse; None takes 0.5"""
    temperature: float = 1.0
    """divisor of both models' logits within the divergence, whose weight is its square"""
    share: float = 1.0
    """weight of the divergence; the rest is the cross-entropy of the data's tokens"""
    on_policy_share: float = 0.0
    """share of an update's examples whose last answer the student writes anew, so that it learns what to do in its own mistakes"""
    max_tokens: int = 128
    """longest answer that the student writes, in tokens"""
    sampling_temperature: float = 1.0
    """divisor of the student's logits when it writes"""
    long_term: bool = False
    """on the student's own answers, add the gradient that goes through its choice of tokens, by what the teacher says of all that follows
    (MiniLLM); with divergence=reverse_kl"""
    length_normalised: bool = True
    """what follows a token counts by its mean a token, not by its sum, which favours short answers; for long_term"""
    tail: Literal["bucket", "drop"] | None = None
    """with a teacher's file: the tokens that it leaves out are one outcome more (bucket), or the sum goes without them (drop; forward_kl
    alone) (default: bucket)"""
    epochs: float = 3.0
    """passes over the examples"""
    tokens: int | None = None
    """tokens to process, padding included; given, it takes the place of epochs"""
    examples_per_step: int = 64
    """examples an update"""
    micro_batch_size: int = 16
    """examples a forward pass of each model"""
    max_seq_len: int | None = None
    """longest example in tokens (default: the shorter context of both models); a longer one is an error, never cut"""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """train adapters in place of the student's weights"""

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCE_NAMES:
            raise UserError(f"divergence={self.divergence!r} is not one of {', '.join(DIVERGENCE_NAMES)}.")
        if self.beta is not None and (self.divergence != "jsd" or not 0 <= self.beta <= 1):
            raise UserError(f"beta={self.beta} is for divergence=jsd, between 0 and 1. Leave it out, or take jsd.")
        check_positive(self, "temperature", "sampling_temperature", "epochs")
        check_least(self, "tokens", "examples_per_step", "micro_batch_size", "max_seq_len", "max_tokens")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share} must be above 0 and at most 1; without a teacher's share, this is `plinth sft`.")
        if not 0 <= self.on_policy_share <= 1:
            raise UserError(f"on_policy_share={self.on_policy_share} must lie between 0 and 1.")
        if self.on_policy_share and self.share < 1:
            raise UserError(
                f"share={self.share} adds the cross-entropy of tokens, which the student's own are no targets for. "
                f"Use share=1 with on_policy_share={self.on_policy_share}."
            )
        if self.long_term and not (self.on_policy_share and self.divergence == "reverse_kl"):
            raise UserError(
                f"long_term is a gradient of the reverse KL on the student's own answers; here divergence={self.divergence} and "
                f"on_policy_share={self.on_policy_share}. Use divergence=reverse_kl and on_policy_share=1, or leave it out."
            )
        if self.long_term and not self.temperature == self.sampling_temperature == 1:
            raise UserError("long_term needs temperature=1 and sampling_temperature=1: the answers must be drawn from what is trained.")
        if not self.length_normalised and not self.long_term:
            raise UserError("length_normalised=False is for long_term, which is not given. Leave it out.")
        if self.tail == "drop" and self.divergence != "forward_kl":
            raise UserError(f"tail=drop leaves a sum that is no {self.divergence}. Use tail=bucket, or divergence=forward_kl.")

    @property
    def loss_options(self) -> dict[str, Any]:
        """What the loss is given beside the two heads."""
        beta = {} if self.beta is None else {"beta": self.beta}
        return {"name": self.divergence, "temperature": self.temperature, "share": self.share, **beta}


@dataclass(frozen=True)
class TeacherFileConfig:
    """What is kept of a teacher, and how it is computed."""

    top_k: int = 64
    """tokens kept a position, the most probable; 8 bytes each"""
    temperature: float = 1.0
    """divisor of the teacher's logits; a student can be taught at this temperature alone"""
    max_seq_len: int | None = None
    """longest example in tokens (default: the teacher's context); a longer one is an error, never cut"""
    vocab_size: int | None = None
    """tokens that the distribution is over, the first so many (default: all of the teacher's, whose matrix may be padded)"""
    micro_batch_size: int = 16
    """examples a forward pass"""
    dtype: str = "float32"
    """dtype of the computation, bfloat16 or float32"""
    device: str | None = None
    """where to compute: cpu, cuda or cuda:N (default: cuda where PyTorch sees a GPU, else cpu)"""
    num_threads: int | None = None
    """worker threads of a CPU, each with one core (default: all usable cores)"""

    def __post_init__(self) -> None:
        check_least(self, "top_k", "micro_batch_size", "max_seq_len", "vocab_size", "num_threads")
        check_positive(self, "temperature")
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPE_NAMES)}.")
        if self.device is not None:
            from plinth.training.device import check_device_name

            check_device_name(self.device)
