"""What the league compares: two sizes, and arms, each a change to the same default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model, its batch, and how long the default arm trains."""

    model: dict[str, Any]
    sequences: int
    steps: int
    """updates of the default arm; the time that these take is what every arm gets"""
    rates: dict[str, dict[str, float]]
    """learning rates and weight decay found best for each optimizer by the sweep"""
    vocab_size: int = 4096
    seq_len: int = 256


@dataclass(frozen=True)
class Arm:
    """A change to the default: fields of DecoderConfig and of OptimizerConfig, and the shape of the batch."""

    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    sequences: float = 1.0
    """sequences an update, as a multiple of the size's"""
    intermediate: float = 1.0
    """width of the feed-forward layer, as a multiple of the size's"""
    stages: tuple[tuple[float, float, float], ...] = ()
    """(share of the tokens, multiple of the sequence length, multiple of the number of sequences)"""
    decay_fraction: float = 0.4
    warmup_steps: int = 10

    def model_fields(self, size: str) -> dict[str, Any]:
        """Return the fields of DecoderConfig that differ from the size's."""
        if self.intermediate == 1.0:
            return self.model
        return self.model | {"intermediate_size": int(SIZES[size].model["intermediate_size"] * self.intermediate)}


SIZES = {
    "1M": Size(
        model=dict(hidden_size=128, num_layers=5, num_heads=4, num_kv_heads=4, head_dim=32, intermediate_size=384),
        sequences=16, steps=200,
        rates={"adamw": dict(lr=4e-3, weight_decay=0.3), "muon": dict(lr=4e-3, muon_lr=0.01, newton_schulz_steps=5)},
    ),
    "10M": Size(
        model=dict(hidden_size=384, num_layers=6, num_heads=6, num_kv_heads=6, head_dim=64, intermediate_size=1024),
        sequences=16, steps=60,
        rates={"adamw": dict(lr=1e-3, weight_decay=0.3), "muon": dict(lr=4e-3, muon_lr=0.01, newton_schulz_steps=5)},
    ),
}  # fmt: skip

BASELINE = "muon"  # what the arms change; not the package's defaults, which follow from the league

ARMS = {
    "muon": Arm(),
    "adamw": Arm(optimizer={"name": "adamw"}, sequences=0.5),
    "muon at twice the rate": Arm(optimizer={"muon_lr": 0.02}),
    "muon at half the rate": Arm(optimizer={"muon_lr": 0.005}),
    "muon, 4 iterations": Arm(optimizer={"newton_schulz_steps": 4}),
    "muon, 3 iterations": Arm(optimizer={"newton_schulz_steps": 3}),
    "polar express": Arm(optimizer={"polynomials": "polar-express"}),
    "polar express, 4 iterations": Arm(optimizer={"polynomials": "polar-express", "newton_schulz_steps": 4}),
    "normuon": Arm(optimizer={"normuon_beta2": 0.95}),
    "cautious decay": Arm(optimizer={"cautious_decay": True}),
    "momentum warm-up": Arm(optimizer={"momentum_warmup_steps": 60}),
    "decay over 70 %": Arm(decay_fraction=0.7),
    "half the batch": Arm(sequences=0.5),
    "quarter of the batch": Arm(sequences=0.25),
    "adamw, quarter of the batch": Arm(optimizer={"name": "adamw"}, sequences=0.25),
    "short sequences first": Arm(stages=((0.4, 0.25, 4.0), (0.6, 1.0, 1.0))),
    "logit soft cap": Arm(model={"logit_softcap": 15.0}),
    "relu²": Arm(model={"activation": "relu2"}, intermediate=1.5),  # two matrices half as wide again: as many parameters as three
    "residual scalars": Arm(model={"residual_scalars": True}),
    "value embeddings": Arm(model={"value_embeddings": True}),
    "what helped at both sizes": Arm(  # what the package's defaults are now
        optimizer={"newton_schulz_steps": 3, "momentum_warmup_steps": 60}, stages=((0.4, 0.25, 4.0), (0.6, 1.0, 1.0))
    ),
    "adamw at a lower rate": Arm(optimizer={"name": "adamw", "lr": 0.0028}, sequences=0.5),
    "small batches first": Arm(stages=((0.3, 1.0, 0.5), (0.7, 1.0, 1.0))),
}


def adamw(lr: float, weight_decay: float = 0.1, beta2: float = 0.98, sequences: float = 1.0) -> Arm:
    return Arm(optimizer={"name": "adamw", "lr": lr, "weight_decay": weight_decay, "beta2": beta2}, sequences=sequences)


def muon(muon_lr: float) -> Arm:
    return Arm(optimizer={"muon_lr": muon_lr, "lr": 4e-3, "weight_decay": 0.1})


# What tuned both optimizers, on a seed that the comparison does not use; the best is written into SIZES and the arm "adamw".
SWEEPS = {
    "1M": {
        "sweep adamw lr=0.0014": adamw(0.0014),
        "sweep adamw lr=0.0028": adamw(0.0028),
        "sweep adamw lr=0.004": adamw(0.004),
        "sweep adamw lr=0.0056": adamw(0.0056),
        "sweep adamw lr=0.0112": adamw(0.0112),
        "sweep adamw weight_decay=0.0": adamw(0.004, weight_decay=0.0),
        "sweep adamw weight_decay=0.3": adamw(0.004, weight_decay=0.3),
        "sweep adamw beta2=0.95": adamw(0.004, beta2=0.95),
        "sweep adamw half the batch": adamw(0.004, sequences=0.5),
        "sweep adamw half the batch lr=0.0014": adamw(0.0014, weight_decay=0.3, sequences=0.5),
        "sweep adamw half the batch lr=0.002": adamw(0.002, weight_decay=0.3, sequences=0.5),
        "sweep adamw half the batch lr=0.0028": adamw(0.0028, weight_decay=0.3, sequences=0.5),
        "sweep muon muon_lr=0.01": muon(0.01),
        "sweep muon muon_lr=0.02": muon(0.02),
        "sweep muon muon_lr=0.04": muon(0.04),
    },
    "10M": {
        "sweep adamw lr=0.0014": adamw(0.0014),
        "sweep adamw lr=0.0028": adamw(0.0028),
        "sweep adamw half the batch": adamw(0.002, sequences=0.5),
        "sweep adamw half the batch lr=0.0005": adamw(0.0005, weight_decay=0.3, sequences=0.5),
        "sweep adamw half the batch lr=0.0007": adamw(0.0007, weight_decay=0.3, sequences=0.5),
        "sweep adamw half the batch lr=0.001": adamw(0.001, weight_decay=0.3, sequences=0.5),
        "sweep adamw half the batch lr=0.0014": adamw(0.0014, weight_decay=0.3, sequences=0.5),
        "sweep muon muon_lr=0.01": muon(0.01),
        "sweep muon muon_lr=0.02": muon(0.02),
    },
}
