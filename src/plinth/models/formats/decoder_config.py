"""A decoder's configuration and config.json, in the words of each family that is published."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plinth.config import UserError, from_dict, to_dict
from plinth.models.config import EXTRAS, FAMILY, MULTIPLIERS, DecoderConfig
from plinth.models.formats.decoder_families import BIASES, FAMILIES, Family, published_type
from plinth.models.formats.experts import read_experts, write_experts
from plinth.models.formats.rope import read_rope, write_rope

ACTIVATIONS = {"swiglu": "silu", "relu2": "relu2", "geglu": "gelu_pytorch_tanh", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ROUTER_LOSSES = ("router_aux_loss", "router_z_loss")
SLIDING, FULL = "sliding_attention", "full_attention"
# Fields of config.json that change the arithmetic in ways that no decoder here does: field → values that are fine.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1.0,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "qkv_bias": (True,),
}


def read_config(values: dict[str, Any]) -> DecoderConfig:
    """Read config.json. Raises UserError that names a field whose value the decoder cannot compute, KeyError for one that is missing."""
    kind = values.get("model_type")
    if kind != "plinth" and kind not in FAMILIES:
        raise UserError(f"model_type={kind!r} is not supported. Supported: {', '.join((*FAMILIES, 'plinth'))}.")
    extras = {name: values[f"plinth_{name}"] for name in EXTRAS + FAMILY if f"plinth_{name}" in values}
    if bool(extras) != (kind == "plinth"):
        raise UserError(f"model_type={kind!r} does not go with the extras {sorted(extras)}. Copy the model's own config.json again.")
    family = FAMILIES.get(kind, FAMILIES["qwen3"])
    for name, fine in UNSUPPORTED.items():
        _check_fine(values, name, fine)
    if kind == "gpt2":
        fields = _read_gpt2(values)
    else:
        activation = str(extras.get("activation", family.fixed.get("activation", "swiglu")))
        fields = _read_shape(values, family) | _read_options(values, kind, family, activation)
    if family.has_experts:
        fields |= read_experts(values)
        if fields["expert_intermediate_size"] == fields["intermediate_size"]:  # what is left out means that
            fields["expert_intermediate_size"] = None
    if "num_experts" in extras:
        fields |= {name: float(values[f"plinth_{name}"]) for name in ROUTER_LOSSES if f"plinth_{name}" in values}
    shared: dict[str, Any] = {
        "learnable_norm": values.get("plinth_learnable_norm", True),
        **{name: float(values.get(f"plinth_{name}", 1.0)) for name in MULTIPLIERS},
    }
    config = from_dict(DecoderConfig, fields | shared | extras)
    return config if published_type(config) == kind else replace(config, published_as=kind)


def _check_fine(values: dict[str, Any], name: str, fine: tuple[Any, ...]) -> None:
    if values.get(name) is not None and values[name] not in fine:
        wanted = f"Supported: {', '.join(map(str, fine))}." if fine else "Use a model without it."
        raise UserError(f"{name}={values[name]!r} is not supported. {wanted}")


def _read_shape(values: dict[str, Any], family: Family) -> dict[str, Any]:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": width,
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or family.head_dim or width // heads,
        "intermediate_size": values["intermediate_size"],
        "max_seq_len": values["max_position_embeddings"],
        "norm_eps": values.get("plinth_norm_eps", values.get("rms_norm_eps", family.norm_eps)),
        "tie_embeddings": values.get("tie_word_embeddings", family.ties),
    }


def _read_options(values: dict[str, Any], kind: str, family: Family, activation: str) -> dict[str, Any]:
    """Return the fields that families have in different ways, those with one value in all its models among them."""
    legacy = ("gelu",) if family.scales_embeddings else ()  # the first Gemma said gelu, and meant its approximation
    for name in ("hidden_act", "hidden_activation"):
        _check_fine(values, name, (ACTIVATIONS[activation], *legacy))
    fields = {name: value for name, value in family.fixed.items()}
    if family.scales_embeddings:
        fields["embed_multiplier"] = values["hidden_size"] ** 0.5
    told = family.told
    biases = {"attention_bias": BIASES if set(BIASES) <= set(told) else (), "mlp_bias": ("mlp_bias",) if "mlp_bias" in told else ()}
    for name, ours in biases.items():
        if not ours and name not in family.fixed and kind not in ("qwen2", "qwen2_moe"):
            _check_fine(values, name, (False,))
        fields |= {own: bool(values.get(name)) for own in ours}
    if "sliding_window" in told:
        fields |= _read_window(values, kind)
    else:
        _check_fine(values, "use_sliding_window", (False,))
    fields |= read_rope(values, family.rope_theta, has_local=fields.get("sliding_window") is not None and "local_rope_theta" in told)
    if "query_scale" in told:
        fields |= _read_gemma_scores(values, kind)
    return fields


def _read_gemma_scores(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return caps and scale of Gemma 2 and 3; where config.json is silent they are those of the released Gemma 2, and none."""
    scalar = values.get("query_pre_attn_scalar", 256)
    caps = (50.0, 30.0) if kind == "gemma2" else (None, None)
    return {
        "query_scale": None if scalar == values.get("head_dim", 256) else scalar**-0.5,
        "attention_softcap": values.get("attn_logit_softcapping", caps[0]),
        "logit_softcap": values.get("final_logit_softcapping", caps[1]),
    }


def _read_window(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return sliding_window and window_layers, the latter as the shortest pattern whose repetition gives the blocks."""
    window, depth = values.get("sliding_window"), values["num_hidden_layers"]
    if kind.startswith("qwen") and not values.get("use_sliding_window", False) or window is None:
        return {}
    if kind in ("mistral", "mixtral"):
        return {"sliding_window": window}
    types = values.get("layer_types")
    if types is None:
        slides = _slides_by_default(values, kind, depth)
    else:
        strange = sorted(set(types) - {SLIDING, FULL})
        if strange or len(types) != depth:
            raise UserError(f"layer_types has {len(types)} entries {strange or ''}; it needs {depth} of {SLIDING} and {FULL}.")
        slides = [each == SLIDING for each in types]
    if not any(slides):
        return {}
    length = next(n for n in range(1, depth + 1) if all(slides[i] == slides[i % n] for i in range(depth)))
    return {"sliding_window": window, "window_layers": None if all(slides) else tuple(slides[:length])}


def _slides_by_default(values: dict[str, Any], kind: str, depth: int) -> list[bool]:
    """Return which blocks have the window where config.json does not list them."""
    if kind.startswith("gemma"):
        every = values.get("sliding_window_pattern", 2 if kind == "gemma2" else 6)
        return [bool((i + 1) % every) for i in range(depth)]
    return [i >= values.get("max_window_layers", 28) for i in range(depth)]


def _read_gpt2(values: dict[str, Any]) -> dict[str, Any]:
    _check_fine(values, "activation_function", tuple(GPT2_ACTIVATIONS))
    width, heads = values["n_embd"], values["n_head"]
    return FAMILIES["gpt2"].fixed | {
        "vocab_size": values["vocab_size"],
        "hidden_size": width,
        "num_layers": values["n_layer"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": values.get("n_inner") or 4 * width,
        "max_seq_len": values["n_positions"],
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": values.get("tie_word_embeddings", True),
        "activation": GPT2_ACTIVATIONS[values.get("activation_function", "gelu_new")],
        "query_scale": None if values.get("scale_attn_weights", True) else 1.0,
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """Return the contents of config.json as transformers, vLLM and llama.cpp read it, for weights without multipliers.

    A decoder that no family holds, which they would compute wrongly, is none of theirs: its model_type is "plinth", and they refuse it.
    """
    kind = published_type(config)
    values = _write_gpt2(config) if kind == "gpt2" else _write_shape(config) | write_rope(config, kind)
    values |= {"model_type": kind, "dtype": "float32", "plinth_learnable_norm": config.learnable_norm}
    if config.has_multipliers:
        values |= {"plinth_norm_eps": config.norm_eps} | {f"plinth_{name}": getattr(config, name) for name in MULTIPLIERS}
    if kind == "plinth":
        stored = (*config.extras, *(ROUTER_LOSSES if config.num_experts else ()))
        own = {f"plinth_{name}": value for name, value in to_dict(config).items() if name in stored}
        return values | {"architectures": ["PlinthForCausalLM"], **own}
    family = FAMILIES[kind]
    values["architectures"] = [family.architecture]
    if family.has_experts:
        values |= write_experts(config, kind)
    if "sliding_window" in family.told:
        values |= _write_window(config, kind)
    if family.scales_embeddings:
        values["hidden_activation"] = values["hidden_act"]
    if "query_scale" in family.told and kind != "gpt2":
        values |= {
            "query_pre_attn_scalar": _scalar(config),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    return values


def _write_shape(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps * config.stream_factor**2,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
    }


def _write_window(config: DecoderConfig, kind: str) -> dict[str, Any]:
    slides = [config.slides(i) for i in range(config.num_layers)]
    if kind in ("mistral", "mixtral"):
        return {"sliding_window": config.sliding_window}
    values = {"sliding_window": config.sliding_window, "layer_types": [SLIDING if each else FULL for each in slides]}
    if kind.startswith("gemma"):  # it takes no model without a width
        return values | {"sliding_window": config.sliding_window or config.max_seq_len}
    return values | {"use_sliding_window": config.sliding_window is not None, "max_window_layers": slides.index(True) if any(slides) else 0}


def _scalar(config: DecoderConfig) -> float:
    """Return what Gemma takes to the power -1/2: a whole number where that gives the very scale."""
    if config.query_scale is None:
        return config.head_dim
    scalar = config.query_scale**-2
    return round(scalar) if round(scalar) ** -0.5 == config.query_scale else scalar


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_seq_len,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "scale_attn_weights": config.query_scale is None,
        **{name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
    }
