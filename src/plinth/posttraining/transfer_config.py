"""What both halves of transfer are told, the text of the target and its labels (ULMFiT), without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field

from plinth.config import check_least, check_positive
from plinth.models.text_classifier_config import PooledHeadConfig
from plinth.posttraining.depth_rates import RateConfig, Unfreeze
from plinth.training.config import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class LmFinetuneConfig:
    """How a language model goes on with other text."""

    rates: RateConfig = field(default_factory=RateConfig)
    """rates by depth and time"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=10, decay_fraction=0.9, keep_pre_decay=False, compile=False,
            optimizer=OptimizerConfig(name="adamw", lr=0.004, beta1=0.7, beta2=0.99, eps=1e-8, weight_decay=0.01),
        )
    )  # fmt: skip
    """optimizer and schedule; lr is that of the last group of layers"""
    epochs: float = 5.0
    """passes over the text"""
    seq_len: int | None = None
    """tokens of a row a step (default: 70 for an AWD-LSTM, whose rows go on from step to step; 256 for a decoder, or its context)"""
    sequences_per_step: int = 32
    """rows an update"""
    micro_batch_size: int = 16
    """rows a forward pass"""
    dropout: float = 1.0
    """factor on the AWD-LSTM's own rates of dropout"""
    activation_penalty: float = 2.0
    """AWD-LSTM: weight of the mean square of the last layer's outputs in the loss"""
    slowness_penalty: float = 1.0
    """AWD-LSTM: weight of the mean square of their change from a position to the next"""
    heldout_tokens: int = 100_000
    """held-out tokens scored before and after, at most; 0 for none"""

    def __post_init__(self) -> None:
        check_positive(self, "epochs")
        check_least(self, "sequences_per_step", "micro_batch_size")
        check_least(self, "dropout", "activation_penalty", "slowness_penalty", "heldout_tokens", least=0)


@dataclass(frozen=True)
class TransferClassifyConfig:
    """A classifier on a language model, its batches and its schedule."""

    head: PooledHeadConfig = field(default_factory=PooledHeadConfig)
    """pooling and head"""
    rates: RateConfig = field(default_factory=RateConfig)
    """rates by depth and time"""
    unfreeze: Unfreeze = "gradual"
    """gradual: the head learns first, and every unfreeze_epochs one group of layers more, from the top; all: all from the first
    update; head: the head alone"""
    unfreeze_epochs: float = 1.0
    """passes over the examples before the next group learns too (gradual)"""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=10, decay_fraction=0.9, keep_pre_decay=False, compile=False,
            optimizer=OptimizerConfig(name="adamw", lr=0.01, beta1=0.7, beta2=0.99, eps=1e-8, weight_decay=0.01),
        )
    )  # fmt: skip
    """optimizer and schedule; lr is that of the head"""
    epochs: float = 15.0
    """passes over the examples"""
    examples_per_step: int = 32
    """texts an update"""
    micro_batch_size: int = 16
    """texts a forward pass, over which batch norm takes its statistics"""
    trunk_dropout: float = 1.0
    """factor on the AWD-LSTM's own rates of dropout"""
    truncate: bool = False
    """cut texts that are longer than a decoder's context at their end (default: they are an error)"""
    fresh: bool = False
    """draw all weights anew instead of taking the pretrained ones, for comparison"""

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "unfreeze_epochs")
        check_least(self, "examples_per_step", "micro_batch_size")
        check_least(self, "trunk_dropout", least=0)
