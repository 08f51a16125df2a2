"""Which of llama.cpp's architectures computes a decoder, what it is told of it, and how its rows lie there."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import torch

from plinth import __version__
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.rope import scaled_frequencies
from plinth.ops.rope import rope_frequencies

Architecture = Literal["qwen3", "qwen2", "llama"]
# What the three differ in; whatever else differs from the default decoder's arithmetic none of them has.
TOLD = ("qk_norm", "qkv_bias", "rope_scaling")
HARMLESS = ("router_aux_loss", "router_z_loss")


def architecture(config: DecoderConfig) -> Architecture:
    """Return qwen3 (normalised queries and keys), qwen2 (their biases) or llama (neither).

    Raises UserError that names the options which none of them has.
    """
    window = config.sliding_window
    unknown = {name for name in config.extras if name not in (*TOLD, *HARMLESS)}
    if window is not None and window >= config.max_seq_len:
        unknown -= {"sliding_window", "window_layers"}  # it hides nothing
    if config.qk_norm and config.qkv_bias:
        unknown.add("qkv_bias")
    if unknown:
        named = ", ".join(field.name for field in fields(config) if field.name in unknown)
        raise UserError(
            f"{named}: GGUF's llama, qwen2 and qwen3 have no place for these options, and Plinth writes no other. Use --format hf."
        )
    if config.qkv_bias and config.num_heads * config.head_dim != config.hidden_size:
        raise UserError(
            f"num_heads={config.num_heads} times head_dim={config.head_dim} is not hidden_size={config.hidden_size}, as "
            "GGUF's qwen2 has it. Use --format hf."
        )
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def add_shape(writer: Any, gguf: Any, config: DecoderConfig, name: str, weights: str) -> None:
    """Write the fields that tell the model's shape."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_string("plinth.version", __version__)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    _add_scaling(writer, gguf, config)
    writer.add_layer_norm_rms_eps(config.norm_eps * config.stream_factor**2)  # that of weights with the multipliers folded in
    writer.add_vocab_size(config.vocab_size)
    kind = "ALL_F32" if weights == "f32" else f"MOSTLY_{weights.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_scaling(writer: Any, gguf: Any, config: DecoderConfig) -> None:
    """Write how the rotary frequencies are scaled; llama3's way is a tensor of its own (`frequency_factors`)."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if scaling.kind == "linear" else gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        default = (scaling.beta_fast, scaling.beta_slow, scaling.attention_factor, scaling.truncate) == (32.0, 1.0, None, True)
        if not default:
            raise UserError(
                "rope_scaling of kind yarn with beta_fast, beta_slow, attention_factor or truncate of its own: llama.cpp's versions read "
                "these differently. Use --format hf."
            )
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)


def frequency_factors(config: DecoderConfig) -> torch.Tensor | None:
    """Return what llama3's scaling divides each rotary frequency by, fp32 (head_dim / 2,); None without it."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    frequency = rope_frequencies(config.head_dim, config.rope_theta)
    return frequency / scaled_frequencies(frequency, config.rope_scaling, config.rope_theta)


def paired_rows(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the rows of a query or key projection as architecture "llama" rotates them: the two of a pair side by side.

    Ours, as Hugging Face's, has the first halves of a head's pairs and then the second halves.
    """
    halves = tensor.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()
