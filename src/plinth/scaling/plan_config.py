"""What a user may decide of a plan; all else is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plinth.config import UserError


@dataclass(frozen=True)
class PlanConfig:
    """Choices and prices that a plan keeps to. None: the plan decides."""

    hidden_size: int | None = None
    """width of the model, a multiple of 32"""
    num_layers: int | None = None
    """number of blocks"""
    min_body_params: int | None = None
    """smallest model to consider, parameters without embedding and head"""
    vocab_size: int | None = None
    """entries of the tokenizer"""
    seq_len: int | None = None
    """training context, tokens"""
    tokens_per_step: int | None = None
    """tokens an update, a multiple of seq_len"""
    short_share: float = 0.4
    """share of the tokens, at the start, in sequences of a quarter of seq_len, as many tokens an update; 0 = all of one length"""
    optimizer: Literal["adamw", "muon"] | None = None
    """optimizer of the matrices of the blocks"""
    lr: float | None = None
    """peak learning rate of AdamW"""
    muon_lr: float = 0.01
    """peak learning rate of Muon where it is used"""
    weight_decay: float = 0.1
    """decoupled weight decay"""
    tie_embeddings: bool | None = None
    """use the embedding as output head"""
    law: str | None = None
    """scaling law: small-code, besiroglu, hoffmann, muennighoff, or a .json file of your own; unset: the one fitted nearest"""
    pretrain_share: float = 0.45
    """share of the budget for pretraining when instruction data follows; without it pretraining gets all"""
    sft_share: float = 0.50
    """share of the budget for supervised finetuning"""
    dpo_share: float = 0.05
    """share of the budget for preference tuning"""
    overhead_share: float = 0.05
    """share of a time budget kept for checkpoints, validation and a machine busier than at the probe"""
    muon_gain: float = 1.26
    """tokens under AdamW that a token under Muon is worth; the default is a ratio of published record times"""
    warmup_share: float = 0.05
    """share of the steps in which the learning rate rises"""
    decay_share: float = 0.4
    """share of the steps in which it falls to zero at the end"""
    min_steps: int = 100
    """fewer updates than this are no training"""
    max_epochs: float = 40.0
    """passes over the text after which more are worth nothing"""
    tolerance: float = 0.02
    """plans whose predicted bits per byte differ by less than this share count as equal: half of what the law misses its own runs by"""
    memory_share: float = 0.6
    """share of the machine's memory that training may take"""
    max_memory_bytes: int | None = None
    """memory that training may take, bytes, if less than memory_share"""
    exposures_per_fact: int = 30
    """times that finetuning shows a fact, over all phrasings and epochs"""
    bytes_per_example: int = 160
    """bytes of question and answer in an instruction example"""
    compile_speedup: float | None = None
    """measured speed of torch.compile against plain PyTorch, a ratio"""
    compile_s: float | None = None
    """measured time to compile, seconds"""
    watts_per_core: float = 10.0
    """power of a busy core with its share of memory and supply, watts, where no counter is readable"""
    price_per_hour: float = 0.0
    """price of the machine, a currency unit an hour"""

    def __post_init__(self) -> None:
        shares = self.pretrain_share + self.sft_share + self.dpo_share
        if abs(shares - 1.0) > 1e-6 or min(self.pretrain_share, self.sft_share, self.dpo_share) < 0:
            raise UserError(
                f"pretrain_share={self.pretrain_share:g} + sft_share={self.sft_share:g} + dpo_share={self.dpo_share:g} "
                f"= {shares:g}; they must be non-negative and add up to 1."
            )
        if self.pretrain_share == 0:
            raise UserError("pretrain_share=0 leaves nothing to finetune; give pretraining a share.")
        for name in ("overhead_share", "warmup_share", "decay_share", "tolerance", "price_per_hour"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name):g} must not be negative.")
        if not 0 <= self.short_share < 1:
            raise UserError(f"short_share={self.short_share:g} must lie between 0 and 1, 1 excluded. Use 0 for one length of sequences.")
        if self.overhead_share >= 1:
            raise UserError(f"overhead_share={self.overhead_share:g} leaves no time to train; use less than 1.")
        if self.warmup_share + self.decay_share > 1:
            raise UserError(
                f"warmup_share={self.warmup_share:g} + decay_share={self.decay_share:g} exceed 1; warm-up and decay must fit in the run."
            )
        for name in ("min_steps", "max_epochs", "exposures_per_fact", "bytes_per_example", "watts_per_core", "memory_share", "muon_gain",
                     "hidden_size", "num_layers", "min_body_params", "vocab_size", "seq_len", "tokens_per_step", "lr", "muon_lr",
                     "max_memory_bytes"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={value:g} must be positive.")
        if self.tokens_per_step and self.seq_len and self.tokens_per_step % self.seq_len:
            raise UserError(f"tokens_per_step={self.tokens_per_step} is not a multiple of seq_len={self.seq_len}.")
