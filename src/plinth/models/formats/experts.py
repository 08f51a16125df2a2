"""Layers of experts as they are published: every expert's matrices are tensors of their own."""

from __future__ import annotations

from typing import Any

from plinth.config import UserError
from plinth.models.config import DecoderConfig

# Our name in a layer of experts → the published ones; of the stacked matrices those of one expert, {} its number.
QWEN_NAMES = {
    "router.weight": ("mlp.gate.weight",),
    "gate_up.weight": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "down.weight": ("mlp.experts.{}.down_proj.weight",),
    "shared.gate_up.weight": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    "shared.down.weight": ("mlp.shared_expert.down_proj.weight",),
    "shared_gate.weight": ("mlp.shared_expert_gate.weight",),
}
MIXTRAL_NAMES = {
    "router.weight": ("block_sparse_moe.gate.weight",),
    "gate_up.weight": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    "down.weight": ("block_sparse_moe.experts.{}.w2.weight",),
}


def expert_names(config: DecoderConfig, name: str, model_type: str) -> tuple[str, ...]:
    """Return the published names, within a block, that make one tensor of a layer of experts; of stacked ones expert by expert."""
    names = (MIXTRAL_NAMES if model_type == "mixtral" else QWEN_NAMES)[name]
    if "{}" not in names[0]:
        return names
    return tuple(each.format(x) for x in range(config.num_experts) for each in names)


def read_experts(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a decoder that config.json of mixtral, qwen2_moe or qwen3_moe gives for its experts.

    Raises UserError for a field that is missing.
    """
    is_mixtral = values["model_type"] == "mixtral"
    size_name = "intermediate_size" if is_mixtral else "moe_intermediate_size"
    found = {name: values.get(name) for name in ("num_experts_per_tok", size_name)}
    found["num_experts"] = values.get("num_local_experts", values.get("num_experts"))
    for name, value in found.items():
        if value is None:
            raise UserError(f"config.json lacks {name}; model_type={values['model_type']} needs it.")
    fields = {
        "num_experts": found["num_experts"],
        "num_active_experts": found["num_experts_per_tok"],
        "expert_intermediate_size": found[size_name],
        "norm_topk_prob": is_mixtral or bool(values.get("norm_topk_prob", False)),
        "router_aux_loss": float(values.get("router_aux_loss_coef", 0.001)),
        "router_z_loss": float(values.get("plinth_router_z_loss", 0.0)),
    }
    if values["model_type"] == "qwen2_moe":
        fields |= {"shared_expert_intermediate_size": values["shared_expert_intermediate_size"], "shared_expert_gate": True}
    return fields if is_mixtral else fields | {"dense_layers": _dense_layers(values)}


def _dense_layers(values: dict[str, Any]) -> tuple[int, ...]:
    """Return the blocks without experts: those that are named, and all but every decoder_sparse_step-th."""
    named, every = values.get("mlp_only_layers") or (), values.get("decoder_sparse_step", 1)
    return tuple(i for i in range(values["num_hidden_layers"]) if i in named or (i + 1) % every)


def write_experts(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Return what config.json says of the experts."""
    values: dict[str, Any] = {
        "num_experts_per_tok": config.num_active_experts,
        "router_aux_loss_coef": config.router_aux_loss,
        "output_router_logits": False,
        "plinth_router_z_loss": config.router_z_loss,
    }
    if model_type == "mixtral":
        return values | {"num_local_experts": config.num_experts, "intermediate_size": config.expert_size, "router_jitter_noise": 0.0}
    values |= {
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
    }
    return values | ({"shared_expert_intermediate_size": config.shared_expert_intermediate_size} if model_type == "qwen2_moe" else {})
