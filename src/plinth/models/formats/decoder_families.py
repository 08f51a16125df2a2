"""The families of decoders that others publish: of each, what it always has, and what its config.json tells."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from plinth.config import UserError
from plinth.models.config import EXTRAS, FAMILY, DecoderConfig

BIASES = ("qkv_bias", "out_bias")  # attention_bias stands for both
PLAIN = {option.name: option.default for option in fields(DecoderConfig)}


@dataclass(frozen=True)
class Family:
    """One model_type of transformers."""

    architecture: str
    """the class that computes it"""
    fixed: dict[str, Any] = field(default_factory=dict)
    """field of DecoderConfig → its value in every model of the family, where that is not the default"""
    told: tuple[str, ...] = ()
    """fields that config.json tells; all other options are as in the default decoder"""
    scales_embeddings: bool = False
    """whether the embeddings enter times sqrt(hidden_size)"""
    ties: bool = False
    """whether the embedding is the head too where config.json says nothing"""
    head_dim: int | None = None
    """width of a head where config.json says nothing (None: hidden_size / num_heads)"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies where config.json says nothing"""
    norm_eps: float = 1e-6
    """eps of the normalisations where config.json says nothing"""
    has_experts: bool = False
    """whether blocks are mixtures of experts"""

    def refusal(self, config: DecoderConfig) -> str | None:
        """Return why the family does not hold a decoder, or None when it does."""
        for name in EXTRAS + FAMILY:
            value = getattr(config, name)
            if name == "embed_multiplier" and self.scales_embeddings:
                if value != config.hidden_size**0.5:
                    return f"embed_multiplier={value:g} is not sqrt(hidden_size)={config.hidden_size**0.5:g}"
            elif name not in self.told and value != self.fixed.get(name, PLAIN[name]):
                return f"{name}={value!r} is not {self.fixed.get(name, PLAIN[name])!r}"
        if set(BIASES) <= set(self.told) and config.qkv_bias != config.out_bias:
            return f"qkv_bias={config.qkv_bias} differs from out_bias={config.out_bias}"
        if config.sliding_window is not None and "window_layers" not in self.told and config.window_layers is not None:
            return "window_layers is set, and its window is that of all blocks"
        if config.sliding_window is not None and "local_rope_theta" in self.told and config.local_rope_theta is None:
            return "local_rope_theta is not set"
        if (config.num_experts > 0) != self.has_experts:
            return f"num_experts={config.num_experts}"
        return self._refusal_of_multipliers(config) or self._refusal_of_shape(config)

    def _refusal_of_multipliers(self, config: DecoderConfig) -> str | None:
        foldable = self.architecture == "Qwen3ForCausalLM" and not any(name in config.extras for name in FAMILY)
        return "its weights cannot take output_multiplier or attention_multiplier" if config.has_multipliers and not foldable else None

    def _refusal_of_shape(self, config: DecoderConfig) -> str | None:
        if config.position == "rope":
            return None
        if config.num_kv_heads != config.num_heads:
            return f"num_kv_heads={config.num_kv_heads} is not num_heads={config.num_heads}"
        if config.num_heads * config.head_dim != config.hidden_size:
            return f"num_heads={config.num_heads} times head_dim={config.head_dim} is not hidden_size={config.hidden_size}"
        return None


_EXPERTS_TOLD = ("num_experts", "num_active_experts", "expert_intermediate_size")
_QWEN_EXPERTS_TOLD = (*_EXPERTS_TOLD, "norm_topk_prob", "dense_layers")
_GEMMA = {"norm_offset": 1.0, "activation": "geglu", "qk_norm": False}
_GEMMA_KWARGS: dict[str, Any] = {"scales_embeddings": True, "ties": True, "head_dim": 256}
_GEMMA_2_TOLD = ("sliding_window", "window_layers", "attention_softcap", "logit_softcap", "query_scale", "rope_scaling", *BIASES)
FAMILIES: dict[str, Family] = {  # in the order in which they are tried for a decoder that names none
    "qwen3": Family("Qwen3ForCausalLM", {}, ("rope_scaling", "sliding_window", "window_layers", *BIASES), head_dim=128),
    "llama": Family("LlamaForCausalLM", {"qk_norm": False}, ("rope_scaling", "mlp_bias", *BIASES)),
    "mistral": Family("MistralForCausalLM", {"qk_norm": False}, ("rope_scaling", "sliding_window")),
    "qwen2": Family("Qwen2ForCausalLM", {"qk_norm": False, "qkv_bias": True}, ("rope_scaling", "sliding_window", "window_layers")),
    "gemma": Family("GemmaForCausalLM", _GEMMA, ("rope_scaling", *BIASES), **_GEMMA_KWARGS),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA | {"post_norms": True}, _GEMMA_2_TOLD, **_GEMMA_KWARGS),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _GEMMA | {"post_norms": True, "qk_norm": True}, (*_GEMMA_2_TOLD, "local_rope_theta"), **_GEMMA_KWARGS,
        rope_theta=1_000_000.0,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"norm": "layer", "qk_norm": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "position": "learned"},
        ("activation", "query_scale"),
        ties=True,
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {}, ("rope_scaling", *BIASES, *_QWEN_EXPERTS_TOLD), has_experts=True),
    "mixtral": Family(
        "MixtralForCausalLM", {"qk_norm": False}, ("rope_scaling", "sliding_window", *_EXPERTS_TOLD), rope_theta=1_000_000.0,
        norm_eps=1e-5, has_experts=True,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {"qk_norm": False, "qkv_bias": True, "shared_expert_gate": True},
        ("rope_scaling", "shared_expert_intermediate_size", *_QWEN_EXPERTS_TOLD),
        has_experts=True,
    ),
}  # fmt: skip


def published_type(config: DecoderConfig) -> str:
    """Return the model_type that a decoder is saved as: the one it names, else the first family that holds it, else plinth.

    Raises UserError when the family that it names does not hold it.
    """
    named = config.published_as
    if named is None:
        return next((kind for kind, family in FAMILIES.items() if family.refusal(config) is None), "plinth")
    if named == "plinth":
        return named
    if named not in FAMILIES:
        raise UserError(f"published_as={named!r} is none of {', '.join(FAMILIES)}, plinth. Leave it out to have the first that fits.")
    if reason := FAMILIES[named].refusal(config):
        raise UserError(f"published_as={named} cannot hold this decoder: {reason}. Leave published_as out, or change the option.")
    return named
