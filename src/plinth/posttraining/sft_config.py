"""What supervised finetuning is told: loss, batches and schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plinth.config import UserError, check_least, check_positive
from plinth.posttraining.lora_config import LoraConfig
from plinth.training.config import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class SftConfig:
    """Batches and schedule of supervised finetuning."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=10, keep_pre_decay=False, compile=False, optimizer=OptimizerConfig(lr=0.002, muon_lr=0.01)
        )
    )
    """optimizer and schedule; not compiled on a GPU, as its batches have many shapes"""
    loss: Literal["nll", "dft"] = "nll"
    """nll: cross-entropy; dft: each token's weighed by its probability, so that surprising tokens pull less (dynamic finetuning)"""
    embedding_noise: float = 0.0
    """NEFTune: noise on the embeddings of a conversation of L tokens, even within this / sqrt(L hidden_size); papers take 5 to 15"""
    epochs: float = 3.0
    """passes over the conversations"""
    tokens: int | None = None
    """tokens to process, padding included; given, it takes the place of epochs"""
    conversations_per_step: int = 128
    """conversations an update"""
    micro_batch_size: int = 16
    """conversations a forward pass; several micro-batches for each thread let all end a step together"""
    join_turns: int = 1
    """join up to this many conversations into one, at random, so that a model taught single turns answers later ones too"""
    max_seq_len: int | None = None
    """longest conversation in tokens (default: the model's context); a longer one is never cut"""
    too_long: Literal["error", "leave-out"] = "error"
    """what to do when conversations are longer: stop before training, or leave them out; either way their rows and lengths are told"""
    packing: bool = False
    """put whole conversations in rows of max_seq_len tokens by best fit, each seeing itself alone (default: padded rows of like lengths)"""
    unpadded: bool = False
    """make each micro-batch one row without padding, each conversation seeing itself alone; on a CPU it pays for long conversations of
    unequal lengths"""
    held_out: Path | None = None
    """conversations that are not trained on but measured as training goes on, in metrics.jsonl as held_out_...; None for none"""
    held_out_every: int = 50
    """updates between these measurements; one more follows the last update"""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """train adapters in place of the weights"""

    def __post_init__(self) -> None:
        check_positive(self, "epochs")
        check_least(self, "embedding_noise", least=0)
        check_least(self, "tokens", "conversations_per_step", "micro_batch_size", "join_turns", "max_seq_len", "held_out_every")
        if self.packing and self.unpadded:
            raise UserError("packing=true and unpadded=true are two ways to make batches. Give one.")
