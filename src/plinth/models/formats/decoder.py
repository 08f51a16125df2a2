"""Decoders as they are published: Qwen3's names, with the fused projections split, so that transformers, vLLM and llama.cpp read them."""

from __future__ import annotations

import dataclasses
from typing import Any

from plinth.config import UserError
from plinth.models.config import HIDDEN_ACTS, DecoderConfig
from plinth.models.formats.experts import expert_names
from plinth.models.formats.layout import Entry, Format
from plinth.models.meta import on_meta
from plinth.models.transformer import Transformer

# Our name in a block → Qwen3's; the fused ones stand for several, stacked along the first dimension.
LAYER_NAMES = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
    # Of options that only Plinth reads.
    "mlp.up.weight": ("mlp.up_proj.weight",),
    "attention.value_embed.table.weight": ("self_attn.value_embed.weight",),
    "attention.value_embed.gate.weight": ("self_attn.value_gate.weight",),
}
OTHER_NAMES = {
    "embed.weight": ("model.embed_tokens.weight",),
    "final_norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "resid_lambda": ("model.resid_lambda",),
    "x0_lambda": ("model.x0_lambda",),
}

# Fields of config.json that change the arithmetic in ways that the decoder does not have: field → values that are fine.
UNSUPPORTED = {
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (),
    "quantization_config": (),
}


def read_config(values: dict[str, Any]) -> DecoderConfig:
    """Read config.json. Raises UserError that names a field whose value the decoder cannot compute."""
    activation = HIDDEN_ACTS.get(values.get("plinth_activation", "swiglu"), "silu")
    for name, fine in ({"hidden_act": (activation,)} | UNSUPPORTED).items():
        if values.get(name) is not None and values[name] not in fine:
            wanted = f"Supported: {fine[0]}." if fine else "Use a model without it."
            raise UserError(f"{name}={values[name]!r} is not supported. {wanted}")
    rope_type = (values.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type != "default":
        raise UserError(f"rope_type={rope_type!r} is not supported. Supported: default.")
    return DecoderConfig.from_hf(values)


def layout(config: DecoderConfig) -> list[Entry]:
    """Return every tensor of the decoder: the multipliers are folded into the published weights, unlearnt scales published as 1."""
    model = on_meta(lambda: Transformer(dataclasses.replace(config, learnable_norm=True)))
    fused, entries = model.matrix_parts(), []
    for name, tensor in model.state_dict().items():
        rows, constant = fused.get(name, (tensor.shape[0],)), None
        if name.endswith("norm.weight") and not config.learnable_norm:
            constant = fold_factor(config, name)[0]  # a norm that stands for 1 carries its factor
        shapes = tuple((count, *tensor.shape[1:]) for count in rows)
        factors = fold_factor(config, name) if config.has_multipliers else ()
        entries.append(Entry(name, _published_names(config, name), shapes, factors=factors, constant=constant))
    return entries


def _published_names(config: DecoderConfig, name: str) -> tuple[str, ...]:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    if rest.startswith("mlp.") and config.has_experts(int(layer)):
        names = expert_names(config, rest.removeprefix("mlp."), "qwen3_moe")
        return tuple(f"model.layers.{layer}.{published}" for published in names)
    return tuple(f"model.layers.{layer}.{published}" for published in LAYER_NAMES[rest])


def fold_factor(config: DecoderConfig, name: str) -> tuple[float, ...]:
    """Return what a weight's parts are multiplied by so that the decoder computes the same without its multipliers.

    A head of its own takes the output multiplier. An embedding that is the head too shrinks as a whole, and with it the residual
    stream: whatever writes to the stream shrinks alike, the norms do not see it (their eps shrinks by the square), and so that
    the norms of queries and keys, which share that eps, do not see it either, the rows that feed them shrink too.
    """
    stream = config.stream_factor
    if name.endswith("q_norm.weight"):
        return (config.attention_multiplier,)
    if not config.tie_embeddings and name == "head.weight":
        return (config.output_multiplier,)
    if name in ("embed.weight", "x0_lambda") or name.endswith(("attention.out.weight", "mlp.down.weight", "mlp.shared.down.weight")):
        return (stream,) * len(_published_names(config, name))
    if name.endswith("attention.qkv.weight"):
        return (stream, stream, 1.0)
    return (1.0,) * len(_published_names(config, name))


def aliases(config: DecoderConfig) -> dict[str, str]:
    """Return the head that is the embedding, which some publish all the same."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}


FORMAT = Format(
    config=DecoderConfig,
    model_types=("qwen3", "plinth"),
    read_config=read_config,
    write_config=DecoderConfig.to_hf,
    build=Transformer,
    layout=layout,
    ignored=(r".*rotary_emb\.inv_freq",),
    aliases=aliases,
    used_by="plinth generate, chat, serve, sft, prefer, evaluate",
    generates=True,
)
