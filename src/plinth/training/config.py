"""How to train, said without PyTorch: what computes is imported where it is asked, so that help and plans need none of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from plinth.config import UserError, check_least, check_positive
from plinth.run import usable_cores
from plinth.training.schedule import warmup_stable_decay
from plinth.training.telemetry import TelemetryConfig

if TYPE_CHECKING:
    from plinth.training.saving import SavePolicy

FIRST_MOMENTUM = 0.85
LEAST_WINDOW = 16  # updates before anything counts as unusual
DTYPE_NAMES = ("float32", "bfloat16")


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["muon", "adamw"] | None = None
    """muon: Muon for hidden matrices, AdamW for embeddings, head and scales; adamw: AdamW for all (default: muon, but adamw in
    pretraining where 5 hidden_size / tokens_per_step is above 0.47)"""
    lr: float = 0.004
    """peak learning rate of AdamW"""
    muon_lr: float = 0.01
    """peak learning rate of Muon, as the root mean square of a square matrix's singular values moved a step"""
    beta1: float = 0.9
    """decay of AdamW's first moment"""
    beta2: float = 0.98
    """decay of AdamW's second moment"""
    eps: float = 1e-10
    """added to the root of AdamW's second moment"""
    tensorflow_eps: bool = False
    """add it to the root before the moment's bias is taken out, as TensorFlow 1 did: at step t it weighs 1/sqrt(1 - beta2**t) as much"""
    momentum: float = 0.95
    """decay of Muon's momentum (Nesterov)"""
    weight_decay: float = 0.1
    """decay of hidden matrices, relative to the learning rate"""
    newton_schulz_steps: int = 3
    """iterations that orthogonalise Muon's update"""
    polynomials: Literal["newton-schulz", "polar-express"] = "newton-schulz"
    """polynomials of these iterations"""
    momentum_warmup_steps: int = 0
    """updates over which Muon's momentum rises from 0.85"""
    normuon_beta2: float | None = None
    """decay of the mean square of each neuron's update, which then divides it (default: no such normalisation)"""
    cautious_decay: bool = False
    """decay only the weights of the hidden matrices that Muon moves towards zero as well"""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "muon_lr", "eps")
        check_least(self, "weight_decay", least=0)
        if not 1 <= self.newton_schulz_steps <= 10:
            raise UserError(f"newton_schulz_steps={self.newton_schulz_steps} must lie between 1 and 10.")
        if self.normuon_beta2 is not None and not 0 <= self.normuon_beta2 < 1:
            raise UserError(f"normuon_beta2={self.normuon_beta2} must lie in [0, 1).")

    def resolved(self, hidden_size: int = 0, tokens_per_step: int = 1) -> OptimizerConfig:
        """Choose the optimizer where none is named: Muon, unless its cost a step, about 5 hidden_size / tokens_per_step, is too high."""
        if self.name is not None:
            return self
        from plinth.models.cost import optimizer_by_cost

        return replace(self, name=optimizer_by_cost(hidden_size, tokens_per_step))

    def momentum_at(self, num_updates: int) -> float:
        """Return Muon's momentum at an update counted from 1."""
        share = min(1.0, num_updates / self.momentum_warmup_steps) if self.momentum_warmup_steps else 1.0
        return self.momentum - (1.0 - share) * max(0.0, self.momentum - FIRST_MOMENTUM)


@dataclass(frozen=True)
class Scale:
    """Factors on the configured learning rate (AdamW's or Muon's), weight decay and eps, for one parameter; and when it begins to move."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    begin: int = 0
    """updates that leave the parameter as it is; then it moves as if training had just begun"""


@dataclass(frozen=True)
class SpikeConfig:
    """What to do about updates that look wrong."""

    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """when loss or gradient norm jumps: say so, leave the update out, or stop before it"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """when loss or gradient is infinite or no number: stop before the update, or leave it out"""
    window: int = 64
    """updates that the median and the spread are taken over"""
    threshold: float = 8.0
    """standard deviations above the median, estimated robustly, that make a spike"""
    max_skips: int = 5
    """updates left out in a row after which training stops"""

    def __post_init__(self) -> None:
        if self.window < LEAST_WINDOW:
            raise UserError(f"window={self.window} must be at least {LEAST_WINDOW}.")
        if self.threshold <= 0:
            raise UserError(f"threshold={self.threshold} must be positive.")
        if self.max_skips < 1:
            raise UserError(f"max_skips={self.max_skips} must be at least 1.")


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train; the same for every stage."""

    steps: int | None = None
    """optimizer updates (default: as many as the stage's epochs or tokens give)"""
    warmup_steps: int = 10
    """updates over which the learning rate rises"""
    decay_fraction: float = 0.4
    """share of the updates, at the end, over which the learning rate falls to zero"""
    decay: Literal["sqrt", "linear"] = "sqrt"
    """how it falls: as 1 - sqrt, or linearly"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimizer"""
    clip_grad_norm: float = 1.0
    """largest gradient norm of an update; a guard"""
    dtype: str | None = None
    """dtype of the computation, bfloat16 or float32 (default: the faster here); the optimizer always holds float32"""
    device: str | None = None
    """where to compute: cpu, cuda or cuda:N (default: cuda where PyTorch sees a GPU, else cpu)"""
    compile: bool | None = None
    """compile the blocks of the model (default: on a GPU, for runs of 300 updates or more)"""
    cuda_graphs: bool = False
    """launch forward and backward of a micro-batch as one CUDA graph; for small models and batches of one shape"""
    tf32: bool = False
    """multiply fp32 matrices on a GPU in TF32: faster, 10 bits of fraction; bfloat16 products stay as they are"""
    deterministic: bool = False
    """equal runs give equal bits on a GPU too, slower; on a CPU they always do"""
    num_threads: int | None = None
    """worker threads of a CPU, each with one core (default: all usable cores)"""
    checkpoint_every_s: float = 60.0
    """seconds between checkpoints; 0 for one as soon as the one before is written"""
    keep_checkpoints: int = 2
    """newest checkpoints kept"""
    keep_every_steps: int | None = None
    """take a checkpoint at each multiple of so many steps and keep it for good (default: none)"""
    keep_pre_decay: bool = True
    """take a checkpoint before the learning rate falls and keep it for good, so that the run can be extended"""
    keep_final: bool = False
    """take a checkpoint after the last step and keep it, with the optimizer's state; model/ holds the weights anyway"""
    background_saves: bool = True
    """write checkpoints while training goes on; costs memory for one copy of weights and optimizer state"""
    seed: int = 0
    """seed of initialisation and order of batches"""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """updates that look wrong"""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """where metrics go, and what energy costs"""

    def __post_init__(self) -> None:
        check_least(self, "steps", "num_threads", "keep_checkpoints", "keep_every_steps")
        check_least(self, "seed", "warmup_steps", "checkpoint_every_s", least=0)
        if not self.clip_grad_norm > 0:
            raise UserError(f"clip_grad_norm={self.clip_grad_norm} must be positive; inf for no bound.")
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise UserError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPE_NAMES)}.")
        if self.device is not None:
            from plinth.training.device import check_device_name

            check_device_name(self.device)
        if not 0 <= self.decay_fraction <= 1:
            raise UserError(f"decay_fraction={self.decay_fraction} must lie between 0 and 1.")

    def resolved(self, steps: int | None = None) -> TrainConfig:
        """Fill in what the machine and the stage decide; `steps` counts where the user named none.

        Raises UserError when a tracker cannot be had here: before there is a run.
        """
        from plinth.training.compile import COMPILE_PAYS_STEPS
        from plinth.training.device import choose_device
        from plinth.training.precision import fastest_dtype

        self.telemetry.check()
        device, steps = choose_device(self.device), self.steps or steps
        if self.compile and device == "cpu":
            raise UserError("compile=true is for GPUs: a CPU's operations are fused by hand. Leave it out, or name a GPU with --device.")
        if self.cuda_graphs and device == "cpu":
            raise UserError("cuda_graphs=true needs a GPU. Leave it out, or name a GPU with --device.")
        pays = device != "cpu" and (steps or 0) >= COMPILE_PAYS_STEPS
        return replace(
            self,
            steps=steps,
            dtype=self.dtype or fastest_dtype(device),
            device=device,
            compile=pays if self.compile is None else self.compile,
            num_threads=self.num_threads or usable_cores(),
        )

    def moved_to(self, device: str) -> TrainConfig:
        """Return the resolved configuration for going on on another device; what is for GPUs alone is decided anew."""
        return replace(self, device=device, compile=None, cuda_graphs=False).resolved()

    def lr_scale(self, step: int) -> float:
        """Return the factor of the peak learning rates at a step counted from 0."""
        assert self.steps is not None
        decay_steps = self.steps - self.decay_start
        linear = self.decay == "linear"
        return warmup_stable_decay(step, steps=self.steps, warmup_steps=self.warmup_steps, decay_steps=decay_steps, linear=linear)

    @property
    def decay_start(self) -> int:
        """Return the updates done before the learning rate begins to fall."""
        assert self.steps is not None
        return self.steps - round(self.steps * self.decay_fraction)

    def save_policy(self) -> SavePolicy:
        """Return when checkpoints are taken and which are kept for good."""
        from plinth.training.saving import SavePolicy

        assert self.steps is not None
        single = {self.decay_start} - {0, self.steps} if self.keep_pre_decay else set()
        return SavePolicy(
            every_s=self.checkpoint_every_s,
            keep=self.keep_checkpoints,
            keep_every_steps=self.keep_every_steps,
            keep_steps=frozenset(single | ({self.steps} if self.keep_final else set())),
            background=self.background_saves,
        )
