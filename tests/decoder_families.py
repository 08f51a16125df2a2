"""Small decoders in the shapes of the published families, for the tests of every part that runs decoders."""

from __future__ import annotations

from dataclasses import replace

import torch

from plinth.models.config import DecoderConfig, RopeScaling
from plinth.models.transformer import Transformer

BASE = DecoderConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64, max_seq_len=128,
    learnable_norm=True, tie_embeddings=False,
)  # fmt: skip
LLAMA = replace(BASE, qk_norm=False)
GEMMA = replace(BASE, qk_norm=False, norm_offset=1.0, activation="geglu", embed_multiplier=32**0.5, tie_embeddings=True, head_dim=16)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_seq_len=32)
YARN = RopeScaling("yarn", factor=4.0, original_max_seq_len=32)
FAMILIES: dict[str, DecoderConfig] = {
    "qwen3": BASE,
    "llama": LLAMA,
    "llama 3": replace(LLAMA, rope_scaling=LLAMA3, tie_embeddings=True),
    "llama with biases": replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, rope_scaling=RopeScaling("linear", 4.0)),
    "mistral": replace(LLAMA, sliding_window=9),
    "qwen2": replace(LLAMA, qkv_bias=True, rope_scaling=YARN, sliding_window=9, window_layers=(False, True, True)),
    "gemma": GEMMA,
    "gemma2": replace(
        GEMMA, post_norms=True, sliding_window=9, window_layers=(True, False), attention_softcap=5.0, logit_softcap=3.0, query_scale=0.2
    ),
    "gemma3": replace(
        GEMMA, post_norms=True, qk_norm=True, sliding_window=9, window_layers=(True, True, False), query_scale=0.2, rope_theta=1e6,
        local_rope_theta=1e4, rope_scaling=RopeScaling("linear", 8.0),
    ),
    "gpt2": replace(
        BASE, num_kv_heads=4, norm="layer", norm_eps=1e-5, qk_norm=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        activation="gelu_tanh", position="learned", tie_embeddings=True,
    ),
    "layer norms and gelu": replace(BASE, norm="layer", activation="gelu", learnable_norm=False),
}  # fmt: skip


def random_decoder(config: DecoderConfig, seed: int = 3, deviation: float = 0.3) -> Transformer:
    """Return a decoder none of whose weights is at a neutral value."""
    model, generator = Transformer(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, deviation, generator=generator)
    return model


def some_tokens(rows: int, length: int, vocab_size: int = 96, seed: int = 5) -> torch.Tensor:
    """Return token ids (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
