"""What preference tuning is told: the loss or the mix of losses, what they read, batches and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from plinth.config import UserError, check_least, check_positive, nearest
from plinth.posttraining.lora_config import LoraConfig
from plinth.training.config import OptimizerConfig, TrainConfig

# What each loss reads beside the answers. The functions are in preference_losses and unpaired_losses; this table needs no PyTorch.
PAIR_OPTIONS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("beta", "divergence", "divergence_alpha", "length_penalty"),
    "cdpo": ("beta", "epsilon", "divergence", "divergence_alpha", "length_penalty"),
    "robust": ("beta", "epsilon", "divergence", "divergence_alpha", "length_penalty"),
    "hinge": ("beta", "divergence", "divergence_alpha", "length_penalty"),
    "ipo": ("beta", "per_token", "divergence", "divergence_alpha"),
    "sigmoid_norm": ("beta", "divergence", "divergence_alpha"),
    "exo_pair": ("beta", "epsilon", "divergence", "divergence_alpha", "length_penalty"),
    "nca_pair": ("beta",),
    "bco_pair": ("beta",),
    "sppo_hard": ("beta",),
    "apo_zero": ("beta",),
    "apo_down": ("beta",),
    "discopop": ("beta", "temperature", "divergence", "divergence_alpha", "length_penalty"),
    "ropo": ("beta", "noise_weight", "divergence", "divergence_alpha", "length_penalty"),
    "aot": ("beta", "epsilon"),
    "aot_unpaired": ("beta", "epsilon"),
    "sft": (),
    "orpo": ("beta",),
    "odds_ratio": ("beta",),
    "simpo": ("beta", "gamma"),
    "cpo": ("beta", "nll_coef"),
}
SINGLE_OPTIONS: dict[str, tuple[str, ...]] = {
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
    "apo_zero_unpaired": ("beta",),
    "bco": ("beta",),
}
REFERENCE_FREE = frozenset({"sft", "orpo", "odds_ratio", "simpo", "cpo"})
SORTING = frozenset({"aot", "aot_unpaired"})  # after which a pair's loss is no longer that pair's
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True)
class DpoConfig:
    """Loss, batches and schedule of preference tuning."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            warmup_steps=5, keep_pre_decay=False, compile=False, optimizer=OptimizerConfig(lr=3e-5, muon_lr=2e-4)
        )
    )
    """optimizer and schedule; not compiled on a GPU, as its batches have many shapes"""
    epochs: float = 1.0
    """passes over the pairs"""
    tokens: int | None = None
    """tokens to learn from, each answer's with its prompt's; given, it takes the place of epochs"""
    loss: str = "sigmoid"
    """loss of a pair: sigmoid (DPO), cdpo, robust, hinge, ipo, sigmoid_norm, simpo, orpo, ... (docs/losses.md); or a weighted sum of them,
    sigmoid=0.8,bco_pair=0.2,sft (MPO); or loss of a labelled answer: kto, apo_zero_unpaired, bco"""
    beta: float | None = None
    """strength of the tie to the reference model; None takes the loss's own, 0.1 for most"""
    epsilon: float | None = None
    """share of labels taken to be the wrong way round, for the losses that read it; None takes the loss's own, with cdpo each pair's own
    where the file has probabilities"""
    gamma: float | None = None
    """margin of simpo; None takes 1"""
    divergence: Divergence | None = None
    """what ties the policy to the reference in the losses of the difference alone (f-DPO); None takes reverse_kl, which is DPO"""
    divergence_alpha: float | None = None
    """alpha of the alpha divergence: towards 1 the reverse KL, towards 0 the forward; None takes 0.5"""
    length_penalty: float | None = None
    """reward in nats that a token costs, in the losses of the difference alone: what of a preference the length explains is not learnt
    (R-DPO); None takes 0, which is DPO"""
    tail_weight: float | None = None
    """weight, 0 to 1, of the tokens of the longer answer beyond the length of the shorter (LD-DPO); None takes 1, which is DPO"""
    down_sample: bool = False
    """read as many tokens of the longer answer as the shorter one has, drawn anew for each update (SamPO)"""
    weigh_by_policy: bool = False
    """weigh each pair by how likely the policy is to write both answers, 1 at most (WPO)"""
    move_reference_every: int | None = None
    """updates after which the reference moves to the policy, again and again (TR-DPO); None keeps it the model as it came in"""
    move_reference_by: float | None = None
    """how far it moves: the policy's share, 0 to 1, in the reference's new weights; below 1 a second model is in memory; None takes 1"""
    per_token: bool | None = None
    """whether ipo compares means over tokens; None takes true, false is the paper's equation"""
    temperature: float | None = None
    """width of discopop's passage from one loss to the other, in margins; None takes 0.05"""
    noise_weight: float | None = None
    """weight of ropo's bounded term against its DPO; None takes 14"""
    desirable_weight: float | None = None
    """weight of wanted answers in kto; None takes 1"""
    undesirable_weight: float | None = None
    """weight of unwanted answers in kto; None takes 1"""
    chosen_nll_coef: float | None = None
    """weight of the chosen answer's cross-entropy, which keeps its probability from sinking: of its sum over tokens, with cpo of its mean;
    None takes 0.2 with sigmoid alone, 1 with cpo, else 0"""
    pairs_per_step: int = 64
    """pairs, or labelled answers, an update"""
    micro_batch_size: int = 8
    """pairs, or labelled answers, a forward pass"""
    max_seq_len: int | None = None
    """longest prompt with its answer in tokens (default: the model's context); longer ones are left out, counted, never cut"""
    held_out: Path | None = None
    """pairs, or labelled answers, not trained on but measured as training goes on, in metrics.jsonl as held_out_...; None for none"""
    held_out_every: int = 50
    """updates between these measurements; one more follows the last update"""
    adapter: LoraConfig = field(default_factory=LoraConfig)
    """train adapters in place of the weights; the reference is the model without them"""

    def __post_init__(self) -> None:
        check_positive(self, "beta", "epochs", "noise_weight")
        check_least(self, "chosen_nll_coef", "length_penalty", "desirable_weight", "undesirable_weight", least=0)
        check_least(self, "tokens", "pairs_per_step", "micro_batch_size", "max_seq_len", "held_out_every", "move_reference_every")
        if self.tail_weight is not None and not 0 <= self.tail_weight <= 1:
            raise UserError(f"tail_weight={self.tail_weight} must lie between 0 (no token beyond the shorter answer's length) and 1 (all).")
        if self.divergence_alpha is not None and (self.divergence != "alpha" or self.divergence_alpha == 1):
            raise UserError(f"divergence_alpha={self.divergence_alpha} is for --divergence alpha; at 1 that is reverse_kl.")
        for name in ("tail_weight", "length_penalty"):
            if self.down_sample and getattr(self, name) is not None:
                raise UserError(
                    f"{name}={getattr(self, name)} is about answers of unequal length, and down_sample=true makes all equal. Give one."
                )
        for name in ("chosen_nll_coef", "tail_weight", "down_sample", "weigh_by_policy"):
            if self.is_unpaired and getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)} is for losses of pairs, and {self.loss} is none. Leave it out.")
        if self.weigh_by_policy and (sorting := SORTING & set(self.parts)):
            raise UserError(f"weigh_by_policy=true weighs pairs, and {min(sorting)} sorts them apart. Leave one of them out.")
        check_read(self.parts, self._given)
        self._check_move()

    def _check_move(self) -> None:
        """Raise UserError for a reference that cannot move as it is told to."""
        every, share = self.move_reference_every, self.move_reference_by
        if every is None and share is not None:
            raise UserError(f"move_reference_by={share} says how far, and nothing how often. Add --move-reference-every 100.")
        if every is not None and not self.needs_reference:
            raise UserError(f"move_reference_every={every} moves a reference, and {self.loss} reads none. Leave it out.")
        if share is not None and not 0 < share <= 1:
            raise UserError(f"move_reference_by={share} must lie above 0 (no move) and be at most 1 (all the way).")
        if share not in (None, 1) and self.adapter.rank is not None:
            raise UserError(
                f"move_reference_by={share} mixes weights, and a mix of two adapters' matrices is not the mix of what they do. Use 1, "
                "or train without adapters."
            )

    @cached_property
    def parts(self) -> dict[str, float]:
        """The weights of the losses by name: one of weight 1, or those of a mix."""
        return parse_loss(self.loss)

    @property
    def is_unpaired(self) -> bool:
        """Whether the loss is of single answers."""
        return not PAIR_OPTIONS.keys() & self.parts.keys()

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with the reference model."""
        return not self.parts.keys() <= REFERENCE_FREE

    @property
    def _given(self) -> dict[str, Any]:
        """What losses read, where it was given."""
        names = dict.fromkeys(name for options in (PAIR_OPTIONS | SINGLE_OPTIONS).values() for name in options if name != "nll_coef")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def loss_options(self) -> dict[str, Any]:
        """What the loss of single answers is given beside them."""
        return self.options_of(next(iter(self.parts)))

    def options_of(self, name: str) -> dict[str, Any]:
        """What one of the losses is given beside the answers."""
        read = (PAIR_OPTIONS | SINGLE_OPTIONS)[name]
        own = {"nll_coef": self.chosen_nll_coef} if name == "cpo" and len(self.parts) == 1 and self.chosen_nll_coef is not None else {}
        return {option: value for option, value in self._given.items() if option in read} | own

    @property
    def nll_coef(self) -> float:
        """The weight of the chosen answer's summed cross-entropy, resolved."""
        if [*self.parts] == ["cpo"]:  # which has its own
            return 0.0
        if self.chosen_nll_coef is not None:
            return self.chosen_nll_coef
        return 0.2 if [*self.parts] == ["sigmoid"] else 0.0


def parse_loss(text: str) -> dict[str, float]:
    """Return the weights by name of one loss, or of a sum such as sigmoid=0.8,bco_pair=0.2,sft. Raises UserError."""
    known, weights = PAIR_OPTIONS | SINGLE_OPTIONS, {}
    for term in text.split(","):
        name, equals, factor = (part.strip() for part in term.partition("="))
        if name not in known:
            guess = " DPO is sigmoid." if name.lower() == "dpo" else nearest(name, known)
            raise UserError(f"loss={text!r}: {name!r} is not one of {', '.join(known)}.{guess}")
        try:
            weight = float(factor) if equals else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf") or name in weights:
            raise UserError(f"loss={text!r}: name each loss once, with a positive weight after it, as in sigmoid=0.8,bco_pair=0.2,sft.")
        weights[name] = weight
    if (single := [name for name in weights if name in SINGLE_OPTIONS]) and text != single[0]:
        raise UserError(f"loss={text!r}: {single[0]} is of single answers and cannot be mixed or weighed. Write --loss {single[0]}.")
    return weights


def check_read(parts: Mapping[str, float], given: Mapping[str, Any]) -> None:
    """Raise UserError for an option that none of the losses reads."""
    read = dict.fromkeys(option for name in parts for option in (PAIR_OPTIONS | SINGLE_OPTIONS)[name])
    if unread := [option for option in given if option not in read]:
        takes = f"which takes {', '.join(read)}" if read else "which takes none"
        raise UserError(f"{unread[0]}={given[unread[0]]} is not read by the loss {', '.join(parts)}, {takes}. Leave it out.")
