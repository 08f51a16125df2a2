"""Decoders as they are published: each family's names, the fused projections split, so that transformers, vLLM and llama.cpp read them."""

from __future__ import annotations

import dataclasses

import torch

from plinth.models.config import FAMILY, DecoderConfig
from plinth.models.formats.decoder_config import read_config, write_config
from plinth.models.formats.decoder_families import FAMILIES, published_type
from plinth.models.formats.experts import expert_names
from plinth.models.formats.layout import Entry, Format
from plinth.models.meta import on_meta
from plinth.models.transformer import Transformer

# Our module in a block → the published ones; the fused ones stand for several, stacked along the first dimension.
LAYER_NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
    # Of options that only Plinth reads.
    "attention.value_embed.table": ("self_attn.value_embed",),
    "attention.value_embed.gate": ("self_attn.value_gate",),
}
POST_NORM_NAMES = {  # where what attention gives is normalised, that norm has the name of the one before the feed-forward layer
    "post_attention_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "post_mlp_norm": ("post_feedforward_layernorm",),
}
OTHER_NAMES = {
    "embed": "model.embed_tokens",
    "position_embed": "model.embed_positions",
    "final_norm": "model.norm",
    "head": "lm_head",
    "resid_lambda": "model.resid_lambda",
    "x0_lambda": "model.x0_lambda",
}
GPT2_LAYER_NAMES = {
    "attention_norm": ("ln_1",),
    "attention.qkv": ("attn.c_attn",),
    "attention.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}
GPT2_OTHER_NAMES = {
    "embed": "transformer.wte",
    "position_embed": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
IGNORED = (r".*rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")  # tables that some publish beside the weights

RENAMED = (  # folders saved without the head lack what the other names begin with
    (r"^(h\.\d|wte\.|wpe\.|ln_f\.)", r"transformer.\1"),
    (r"^(layers\.\d|embed_tokens\.|norm\.)", r"model.\1"),
)


def layout(config: DecoderConfig) -> list[Entry]:
    """Return every tensor of the decoder: the multipliers are folded into the published weights, unlearnt scales published as 1."""
    model = on_meta(lambda: Transformer(dataclasses.replace(config, learnable_norm=True)))
    fused = model.matrix_parts()
    return [_entry(config, name, tensor, fused) for name, tensor in model.state_dict().items()]


def _entry(config: DecoderConfig, name: str, tensor: torch.Tensor, fused: dict[str, tuple[int, ...]]) -> Entry:
    """Return one tensor's entry. `fused` are the rows of the projections fused in each matrix, those of its bias too."""
    names, kind = published_names(config, name), published_type(config)
    transpose = kind == "gpt2" and "embed" not in name and tensor.dim() == 2 and name != "head.weight"
    rows = fused.get(name.removesuffix("bias") + "weight" if name.endswith("bias") else name, (tensor.shape[0],))
    rows = (tensor.shape[0],) if len(names) == 1 else rows
    shapes = tuple((count, *tensor.shape[1:])[:: -1 if transpose else 1] for count in rows)
    folds = config.has_multipliers and not any(option in config.extras for option in FAMILY)
    factors, constant = fold_factor(config, name) if folds else (), None
    if "norm." in name and not config.learnable_norm:  # a norm that stands for 1 carries its factor
        constant = 0.0 if name.endswith("bias") else (factors or (1.0,))[0]
    return Entry(name, names, shapes, transpose=transpose, factors=factors, constant=constant)


def published_names(config: DecoderConfig, name: str) -> tuple[str, ...]:
    """Return the names of the published tensors that make one of ours, in order."""
    gpt2 = published_type(config) == "gpt2"
    module, dot, kind = name.rpartition(".")
    others = GPT2_OTHER_NAMES if gpt2 else OTHER_NAMES
    if not module.startswith("layers."):
        return (f"{others[module or kind]}{dot}{kind if module else ''}",)
    _, layer, rest = module.split(".", 2)
    if rest.startswith("mlp.") and config.has_experts(int(layer)):
        inside = expert_names(config, f"{rest.removeprefix('mlp.')}.{kind}", published_type(config))
        return tuple(f"model.layers.{layer}.{published}" for published in inside)
    within = GPT2_LAYER_NAMES if gpt2 else LAYER_NAMES | (POST_NORM_NAMES if config.post_norms else {})
    prefix = f"transformer.h.{layer}" if gpt2 else f"model.layers.{layer}"
    return tuple(f"{prefix}.{published}.{kind}" for published in within[rest])


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
    if name in ("embed.weight", "x0_lambda") or name.endswith(("attention.out.weight", "mlp.down.weight")):
        return (stream,)
    if name.endswith("attention.qkv.weight"):
        return (stream, stream, 1.0)
    return (1.0,) * len(published_names(config, name))


def aliases(config: DecoderConfig) -> dict[str, str]:
    """Return the head that is the embedding, which some publish all the same."""
    return {"lm_head.weight": published_names(config, "embed.weight")[0]} if config.tie_embeddings else {}


FORMAT = Format(
    config=DecoderConfig,
    model_types=(*FAMILIES, "plinth"),
    read_config=read_config,
    write_config=write_config,
    build=Transformer,
    layout=layout,
    ignored=IGNORED,
    aliases=aliases,
    renamed=RENAMED,
    used_by="plinth generate, chat, serve, sft, prefer, evaluate",
    generates=True,
)
