"""What the training of a reward model is told, without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from plinth.config import UserError, check_least, check_positive
from plinth.posttraining.lora_config import LoraConfig
from plinth.training.config import OptimizerConfig, TrainConfig

TooLong = Literal["leave_out", "cut_start"]


@dataclass(frozen=True)
class RewardTuning:
    """Loss, batches and schedule of a reward model."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=5, keep_pre_decay=False, compile=False, optimizer=OptimizerConfig(lr=3e-4, muon_lr=2e-3)
        )
    )
    """optimizer and schedule; not compiled on a GPU, as its batches have many shapes"""
    epochs: float = 1.0
    """passes over the prompts; more than one or two learn the answers by heart"""
    prompts_per_step: int = 32
    """prompts an update, each with all its answers"""
    micro_batch_size: int = 8
    """prompts a forward pass"""
    center_coef: float = 0.01
    """weight of the squared sum of a pair's scores, which keeps them around 0"""
    max_seq_len: int | None = None
    """longest prompt with an answer, in tokens (default: the model's context)"""
    too_long: TooLong = "leave_out"
    """what becomes of longer ones: leave_out, or cut_start (the prompt loses its beginning); both are counted and said"""
    held_out_share: float = 0.1
    """share of the file, at its end, that is not trained on but reported on; 0 for none"""
    normalise: Literal["none", "mean", "mean_std"] = "mean"
    """scores of the reference answers after training: left as they are, shifted to mean 0, or to mean 0 and deviation 1"""
    normalise_before: bool = False
    """let the untrained model's scores of the reference answers have mean 0 and deviation 1"""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """train adapters in place of the trunk's weights; the head is trained whole"""

    def __post_init__(self) -> None:
        check_positive(self, "epochs")
        check_least(self, "prompts_per_step", "micro_batch_size", "max_seq_len")
        check_least(self, "center_coef", least=0)
        if not 0 <= self.held_out_share < 1:
            raise UserError(f"held_out_share={self.held_out_share} must lie in [0, 1).")
