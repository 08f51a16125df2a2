"""Parametrisations under which the best learning rate of a narrow, shallow model is the best of a wide, deep one too.

Rates are tuned once at a base width and depth; at any other the rules here say by how much each parameter's initialisation,
learning rate, weight decay and AdamW eps differ. Constant factors in front of weights (the multipliers of the papers) are folded
into those numbers where the weight stands alone: for AdamW, f · W with (deviation, lr, decay, eps) moves exactly as a weight with
(f · deviation, f · lr, decay / f, eps / f). So a trained model is an ordinary one, with nothing to be done at export. Only the
embedding that serves as head too cannot carry two factors: it gets `DecoderConfig.output_multiplier`.

Sources: Yang et al. 2022, arXiv:2203.03466, table 8 (muP, tied embeddings) and appendix B.3 (decay, eps); Dey et al. 2025,
arXiv:2505.01618, table 1 and eq. 40 (CompleteP, alpha = 1); Everett et al. 2024, arXiv:2407.05872 (eps falls as gradients do);
Yang et al. 2023, arXiv:2310.17813 (spectral condition, which Muon's update meets by itself).
Differs: queries and keys are normalised, so attention's 1/head_dim concerns their bounded cosine; no layer has a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.training.optim import Scale

Name = Literal["standard", "mup", "completep"]
WRITES = ("attention.out.weight", "mlp.down.weight")  # matrices that write to the residual stream
READS = ("attention.qkv.weight", "mlp.gate_up.weight")  # matrices that read it
HEAD_NORMS = ("q_norm.weight", "k_norm.weight")


@dataclass(frozen=True)
class Parametrization:
    """Which rules hold, and the shape at which the rates were tuned."""

    name: Name = "standard"
    base_width: int | None = None
    """hidden_size of the tuned model; its heads and feed-forward layer are taken to be narrower in proportion"""
    base_depth: int | None = None
    """num_layers of the tuned model (completep)"""
    base_head_dim: int | None = None
    """head_dim of the tuned model (default: the model's own; wider models then have more heads)"""

    def __post_init__(self) -> None:
        needed = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_depth")}[self.name]
        for name in ("base_width", "base_depth", "base_head_dim"):
            value = getattr(self, name)
            flag = "--" + name.replace("_", "-")
            if value is None and name in needed:
                raise UserError(f"parametrization={self.name} needs {name}, that of the model whose rates were tuned. Pass {flag}.")
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
            if value is not None and name not in (*needed, *(["base_head_dim"] if needed else [])):
                raise UserError(f"{name}={value} has no meaning with parametrization={self.name}. Leave {flag} out, or name another.")

    def width_ratio(self, config: DecoderConfig) -> float:
        return config.hidden_size / self.base_width if self.base_width else 1.0

    def branch_factor(self, config: DecoderConfig) -> float:
        """Return the factor of each residual branch, (num_layers / base_depth)^-1 with CompleteP's alpha of 1."""
        return self.base_depth / config.num_layers if self.base_depth else 1.0

    def apply(self, config: DecoderConfig) -> DecoderConfig:
        """Return the decoder with the multipliers that cannot be folded into its weights.

        Attention's scale becomes sqrt(base_head_dim) / head_dim: queries and keys, correlated once trained, have products that
        grow as head_dim; with QK-norm head_dim is even their bound. Raises UserError when the decoder has multipliers already.
        """
        if self.name == "standard":
            return config
        if config.extras:
            raise UserError(
                f"parametrization={self.name} has no rule for {', '.join(config.extras)}. "
                "Leave these options of the model out, or use parametrization=standard."
            )
        if config.has_multipliers:
            raise UserError(
                f"output_multiplier={config.output_multiplier} and attention_multiplier={config.attention_multiplier} are set by "
                f"parametrization={self.name}. Leave them at 1."
            )
        return replace(
            config,
            output_multiplier=1.0 / self.width_ratio(config) if config.tie_embeddings else 1.0,
            attention_multiplier=((self.base_head_dim or config.head_dim) / config.head_dim) ** 0.5,
        )


def init_scale(name: str, config: DecoderConfig, parametrization: Parametrization) -> float:
    """Return the factor on a parameter's usual initial deviation (1/sqrt(fan_in) for matrices, constant for the embedding)."""
    if name == "head.weight":  # a constant deviation, times the output factor base_width / hidden_size
        return parametrization.width_ratio(config) ** -0.5
    return parametrization.branch_factor(config) if name.endswith(WRITES) else 1.0


def update_scale(name: str, config: DecoderConfig, parametrization: Parametrization, *, muon: bool) -> Scale:
    """Return the factors on learning rate, weight decay and eps of one parameter; `muon` says which optimizer moves it.

    The product of learning rate and weight decay stays that of the base model. Muon's update has singular values near 1, times
    sqrt(max(1, rows / columns)): the spectral size that a matrix of any width needs, so its rate needs no factor for width.
    Raises UserError for a parameter that no rule covers.
    """
    width, branch = parametrization.width_ratio(config), parametrization.branch_factor(config)
    if name.endswith(READS):
        return Scale() if muon else Scale(1 / width, width, branch / width)
    if name.endswith(WRITES):
        return Scale(branch, 1 / branch) if muon else Scale(branch / width, width / branch, 1 / width)
    if name == "head.weight":
        return Scale(1 / width, width)
    if name in ("embed.weight", "final_norm.weight"):
        return Scale(eps=1 / width)
    if name.endswith(HEAD_NORMS):  # shared by all heads, so their gradients do not fall with width
        return Scale(eps=branch * (parametrization.base_head_dim or config.head_dim) / config.head_dim)
    if name.endswith("_norm.weight"):
        return Scale(eps=branch / width)
    raise UserError(f"parametrization={parametrization.name} has no rule for {name}. Leave that option of the model out, or use standard.")


def scales(model: Transformer, parametrization: Parametrization, optimizer: str) -> dict[str, Scale] | None:
    """Return the factors of every parameter for `build_optimizer`, None for the standard parametrisation."""
    if parametrization.name == "standard":
        return None
    matrices = model.matrix_parts() if optimizer == "muon" else {}
    return {name: update_scale(name, model.config, parametrization, muon=name in matrices) for name, _ in model.named_parameters()}


def init_model(config: DecoderConfig, parametrization: Parametrization, generator: torch.Generator) -> Transformer:
    """Make a decoder with initial weights under a parametrisation; at the base shape it is the standard one."""
    model = Transformer(parametrization.apply(config))
    with torch.no_grad():
        for name, tensor in initial_weights(model, parametrization, generator):
            model.get_parameter(name).copy_(tensor)
    return model


@torch.no_grad()
def initial_weights(model: Transformer, parametrization: Parametrization, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Give (name, fp32 tensor) of each initial weight of a decoder, which may lie on the meta device, one at a time."""
    for name, parameter in list(model.named_parameters()):
        tensor = torch.empty(parameter.shape)
        model.init_parameter(name, tensor, generator)
        factor = init_scale(name, model.config, parametrization)
        yield name, tensor * factor if factor != 1.0 and tensor.dim() >= 2 else tensor
