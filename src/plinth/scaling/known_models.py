"""Shapes of published decoders, for planning: the default decoder's exact costs, corrected for what each architecture has more or less."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from plinth.config import UserError, read_json
from plinth.models import cost
from plinth.models.config import DecoderConfig


@dataclass(frozen=True)
class ModelShape:
    """A decoder as far as its cost goes: the default decoder's fields and how it differs from that one."""

    name: str
    """what `--model` takes, or the path that it was read from"""
    decoder: DecoderConfig
    """sizes; learnt norm scales"""
    gated: bool = True
    """whether the feed-forward layer has a gate beside its up projection (SwiGLU)"""
    qk_norm: str = "none"
    """norm of queries and keys: none, head (a scale of head_dim), or full (a scale over all heads)"""
    qkv_bias: bool = False
    """whether the query, key and value projections have biases"""
    all_biases: bool = False
    """whether every linear layer and norm has a bias, and positions are learnt (GPT-2)"""
    seq_len: int | None = None
    """context that it was pretrained with, tokens"""

    @property
    def _mlp_correction(self) -> int:
        """Matrix parameters of a block that the default decoder has and this one has not."""
        return 0 if self.gated else self.decoder.hidden_size * self.decoder.intermediate_size

    @cached_property
    def layer_matrix_params(self) -> int:
        """Parameters of one block's matrices."""
        return cost.count_params(self.decoder)["matrix"] // self.decoder.num_layers - self._mlp_correction

    @cached_property
    def head_params(self) -> int:
        """Parameters of the output head, which are the embedding's where they are tied."""
        return self.decoder.vocab_size * self.decoder.hidden_size

    @cached_property
    def num_params(self) -> int:
        """All parameters, exactly."""
        decoder = self.decoder
        heads, kv_heads, width = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim, decoder.hidden_size
        layer = {"head": 0, "none": -2 * decoder.head_dim, "full": heads + kv_heads - 2 * decoder.head_dim}[self.qk_norm]
        layer -= self._mlp_correction
        if self.qkv_bias or self.all_biases:
            layer += heads + 2 * kv_heads
        other = 0
        if self.all_biases:
            layer += 2 * width + decoder.intermediate_size * (1 + self.gated) + 2 * width
            other = width + decoder.max_seq_len * width
        return cost.count_params(decoder)["total"] + decoder.num_layers * layer + other

    def attention_flops_per_token(self, seq_len: int, *, causal: bool = True) -> int:
        """Return the operations of attention in a forward pass a token, all blocks."""
        linear = 2 * (cost.count_params(self.decoder)["matrix"] + self.head_params)
        return cost.forward_flops_per_token(self.decoder, seq_len, causal=causal) - linear

    def train_flops_per_token(self, seq_len: int, *, causal: bool = True) -> int:
        """Return the operations of a training step a token, nothing recomputed; `causal` as in `plinth.models.cost`."""
        removed = 6 * self.decoder.num_layers * self._mlp_correction
        return cost.train_flops_per_token(self.decoder, seq_len, causal=causal) - removed


def _shape(
    name: str, layers: int, width: int, heads: int, kv_heads: int, feed_forward: int, vocab: int, seq_len: int, *,
    head_dim: int | None = None, tied: bool = False, **differences: Any,
) -> ModelShape:  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or width // heads,
        intermediate_size=feed_forward,
        max_seq_len=seq_len,
        tie_embeddings=tied,
        learnable_norm=True,
    )
    return ModelShape(name, decoder, seq_len=seq_len, **differences)


def _gpt2(name: str, layers: int, width: int, heads: int, vocab: int = 50257, seq_len: int = 1024) -> ModelShape:
    return _shape(name, layers, width, heads, heads, 4 * width, vocab, seq_len, tied=True, gated=False, all_biases=True)


# Sizes as in the config.json that their makers publish; the tests compare the counts with published ones and with transformers.
KNOWN_MODELS: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _gpt2("gpt-2", 12, 768, 12),
        _gpt2("gpt-2-medium", 24, 1024, 16),
        _gpt2("gpt-2-large", 36, 1280, 20),
        _gpt2("gpt-2-xl", 48, 1600, 25),
        _shape("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096),
        _shape("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096),
        _shape("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096),
        _shape("llama-3-8b", 32, 4096, 32, 8, 14336, 128256, 8192),
        _shape("llama-3-70b", 80, 8192, 64, 8, 28672, 128256, 8192),
        _shape("llama-3-405b", 126, 16384, 128, 8, 53248, 128256, 8192),
        _shape("llama-3.2-1b", 16, 2048, 32, 8, 8192, 128256, 8192, tied=True),
        _shape("llama-3.2-3b", 28, 3072, 24, 8, 8192, 128256, 8192, tied=True),
        _shape("mistral-7b", 32, 4096, 32, 8, 14336, 32000, 8192),
        _shape("olmo-2-7b", 32, 4096, 32, 32, 11008, 100352, 4096, qk_norm="full"),
        _shape("olmo-2-13b", 40, 5120, 40, 40, 13824, 100352, 4096, qk_norm="full"),
        _shape("olmo-2-32b", 64, 5120, 40, 8, 27648, 100352, 4096, qk_norm="full"),
        _shape("qwen3-0.6b", 28, 1024, 16, 8, 3072, 151936, 4096, head_dim=128, tied=True, qk_norm="head"),
        _shape("qwen3-8b", 36, 4096, 32, 8, 12288, 151936, 4096, qk_norm="head"),
        _shape("qwen3-32b", 64, 5120, 64, 8, 25600, 151936, 4096, head_dim=128, qk_norm="head"),
        _gpt2("mpt-1b", 24, 2048, 16, 50368, 2048),
        _gpt2("mpt-3b", 32, 2560, 20, 50368, 2048),
        _gpt2("mpt-7b", 32, 4096, 32, 50368, 2048),
        _gpt2("mpt-13b", 40, 5120, 40, 50368, 2048),
        _gpt2("mpt-30b", 48, 7168, 56, 50368, 2048),
        _gpt2("mpt-70b", 80, 8192, 64, 50368, 2048),
    )
}
HF_DIFFERENCES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "full"},
    "gpt2": {"gated": False, "all_biases": True},
}
GPT2_FIELDS = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def find_model(name: str) -> ModelShape:
    """Return a published shape, or that of a config.json (or of the folder that holds one).

    Raises UserError that lists the nearest names, or says what of the file is missing or not supported.
    """
    if name.lower() in KNOWN_MODELS:
        return KNOWN_MODELS[name.lower()]
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        return shape_from_hf(read_json(file), str(file))
    close = difflib.get_close_matches(name.lower(), list(KNOWN_MODELS), n=3, cutoff=0.4) or list(KNOWN_MODELS)
    raise UserError(
        f"model={name!r} is neither a known model nor a config.json. Nearest: {', '.join(close)}. "
        "Name one of them, or the path of a config.json in Hugging Face's format."
    )


def shape_from_hf(values: dict[str, Any], where: str) -> ModelShape:
    """Read config.json of a dense Llama, Mistral, Qwen2, Qwen3, OLMo 2 or GPT-2. Raises UserError for another architecture."""
    kind = str(values.get("model_type"))
    if kind not in HF_DIFFERENCES:
        raise UserError(f"{where}: model_type={kind!r} cannot be planned. Supported: {', '.join(HF_DIFFERENCES)}.")
    if kind == "gpt2":
        values = values | {name: values.get(old) for name, old in GPT2_FIELDS.items()}
        values.setdefault("tie_word_embeddings", True)
        values["intermediate_size"] = values.get("n_inner") or 4 * (values["hidden_size"] or 0)
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")
    missing = [name for name in needed if not values.get(name)]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; the size of the model follows from them. Copy the model's own config.json.")
    heads = values["num_attention_heads"]
    shape = _shape(
        where,
        values["num_hidden_layers"],
        values["hidden_size"],
        heads,
        values.get("num_key_value_heads") or heads,
        values["intermediate_size"],
        values["vocab_size"],
        values["max_position_embeddings"],
        head_dim=values.get("head_dim"),
        tied=values.get("tie_word_embeddings", False),
        **HF_DIFFERENCES[kind],
    )
    return replace(shape, seq_len=None)
