"""Published models as the values of their config.json, as far as their size goes.

Sizes are those that their makers publish. tests/models compare each count with the one that transformers gives for the same values, and
with published totals where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plinth.config import UserError, nearest

LLAMA_3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # fmt: skip


def _decoder(
    kind: str, layers: int, width: int, heads: int, kv_heads: int, inner: int, vocab: int, longest: int, *,
    tied: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return a decoder's values under the names that most architectures use."""
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": longest,
        "tie_word_embeddings": tied,
        **more,
    }


def _gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024, "vocab_size": 50257}


def _opt(layers: int, width: int, heads: int, narrow: int | None = None) -> dict[str, Any]:
    return {
        "model_type": "opt", "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "ffn_dim": 4 * width,
        "word_embed_proj_dim": narrow or width, "do_layer_norm_before": narrow is None, "vocab_size": 50272,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    }  # fmt: skip


def _neox(layers: int, width: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    return _decoder("gpt_neox", layers, width, heads, heads, 4 * width, vocab, 2048)


def _bloom(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"model_type": "bloom", "n_layer": layers, "hidden_size": width, "n_head": heads, "vocab_size": 250880, "seq_length": 2048}


def _falcon(layers: int, width: int, heads: int, vocab: int = 65024, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "falcon", "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "vocab_size": vocab,
        "bias": False, "max_position_embeddings": 2048, **more,
    }  # fmt: skip


def _mpt(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "mpt", "n_layers": layers, "d_model": width, "n_heads": heads, "expansion_ratio": 4, "vocab_size": 50432,
        "max_seq_len": 2048,
    }  # fmt: skip


def _encoder(kind: str, layers: int, width: int, heads: int, vocab: int, top: str, **more: Any) -> dict[str, Any]:
    values = {"intermediate_size": 4 * width, "max_position_embeddings": 512, "type_vocab_size": 2, **more}
    return {
        "model_type": kind, "architectures": [top], "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "vocab_size": vocab, **values,
    }  # fmt: skip


def _t5(kind: str, layers: int, width: int, heads: int, head_dim: int, inner: int, vocab: int = 32128, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "architectures": ["T5ForConditionalGeneration" if kind == "t5" else "MT5ForConditionalGeneration"],
        "num_layers": layers, "num_decoder_layers": layers, "d_model": width, "num_heads": heads, "d_kv": head_dim, "d_ff": inner,
        "vocab_size": vocab, "feed_forward_proj": "relu", "tie_word_embeddings": True, **more,
    }  # fmt: skip


def _bart(layers: int, width: int, heads: int, vocab: int) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))
    }
    top = ["BartForConditionalGeneration"]
    return {"model_type": "bart", "architectures": top, "d_model": width, "vocab_size": vocab, "max_position_embeddings": 1024, **sides}


def _clip(text: tuple[int, int], image: tuple[int, int, int], patch: int, joint: int, pixels: int = 224) -> dict[str, Any]:
    """Return CLIP's values from (width, heads) of the text tower and (layers, width, heads) of the image tower."""
    return {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": joint,
        "text_config": {"num_hidden_layers": 12, "hidden_size": text[0], "num_attention_heads": text[1], "intermediate_size": 4 * text[0],
                        "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": joint},
        "vision_config": {"num_hidden_layers": image[0], "hidden_size": image[1], "num_attention_heads": image[2],
                          "intermediate_size": 4 * image[1], "patch_size": patch, "image_size": pixels, "projection_dim": joint},
    }  # fmt: skip


def _llava(layers: int, width: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000,
        "tie_word_embeddings": False,
        "text_config": _decoder("llama", layers, width, heads, heads, inner, 32064, 4096),
        "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
                          "intermediate_size": 4096, "patch_size": 14, "image_size": 336, "projection_dim": 768},
    }  # fmt: skip


def _deepseek(
    kind: str, layers: int, width: int, heads: int, inner: int, expert: int, experts: int, active: int, shared: int, dense: int,
    rank: int | None, vocab: int,
) -> dict[str, Any]:  # fmt: skip
    return _decoder(
        kind, layers, width, heads, heads, inner, vocab, 163840, moe_intermediate_size=expert, n_routed_experts=experts,
        num_experts_per_tok=active, n_shared_experts=shared, first_k_dense_replace=dense, q_lora_rank=rank, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    )  # fmt: skip


PRESETS: Mapping[str, dict[str, Any]] = {
    # GPT-2 and the first open decoders after it
    "gpt-2": _gpt2(12, 768, 12),
    "gpt-2-medium": _gpt2(24, 1024, 16),
    "gpt-2-large": _gpt2(36, 1280, 20),
    "gpt-2-xl": _gpt2(48, 1600, 25),
    "gpt-j-6b": {"model_type": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400,
                 "n_positions": 2048, "tie_word_embeddings": False},
    "gpt-neox-20b": _neox(44, 6144, 64, 50432),
    "pythia-70m": _neox(6, 512, 8),
    "pythia-160m": _neox(12, 768, 12),
    "pythia-410m": _neox(24, 1024, 16),
    "pythia-1.4b": _neox(24, 2048, 16),
    "pythia-6.9b": _neox(32, 4096, 32, 50432),
    "pythia-12b": _neox(36, 5120, 40, 50688),
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, 512),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-30b": _opt(48, 7168, 56),
    "bloom-560m": _bloom(24, 1024, 16),
    "bloom-7b": _bloom(30, 4096, 32),
    "bloom-176b": _bloom(70, 14336, 112),
    "falcon-rw-1b": _falcon(24, 2048, 32, 50304, bias=True, multi_query=False, parallel_attn=False, alibi=True),
    "falcon-7b": _falcon(32, 4544, 71, multi_query=True, parallel_attn=True),
    "falcon-40b": _falcon(60, 8192, 128, new_decoder_architecture=True, num_kv_heads=8),
    "mpt-7b": _mpt(32, 4096, 32),
    "mpt-30b": _mpt(48, 7168, 64),
    # Llama and its shape
    "llama-1-7b": _decoder("llama", 32, 4096, 32, 32, 11008, 32000, 2048),
    "llama-1-13b": _decoder("llama", 40, 5120, 40, 40, 13824, 32000, 2048),
    "llama-1-65b": _decoder("llama", 80, 8192, 64, 64, 22016, 32000, 2048),
    "llama-2-7b": _decoder("llama", 32, 4096, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": _decoder("llama", 40, 5120, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": _decoder("llama", 80, 8192, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": _decoder("llama", 32, 4096, 32, 8, 14336, 128256, 8192),
    "llama-3-70b": _decoder("llama", 80, 8192, 64, 8, 28672, 128256, 8192),
    "llama-3.1-8b": _decoder("llama", 32, 4096, 32, 8, 14336, 128256, 131072, rope_scaling=LLAMA_3_ROPE),
    "llama-3.1-70b": _decoder("llama", 80, 8192, 64, 8, 28672, 128256, 131072, rope_scaling=LLAMA_3_ROPE),
    "llama-3.1-405b": _decoder("llama", 126, 16384, 128, 8, 53248, 128256, 131072, rope_scaling=LLAMA_3_ROPE),
    "llama-3.2-1b": _decoder("llama", 16, 2048, 32, 8, 8192, 128256, 131072, tied=True, head_dim=64),
    "llama-3.2-3b": _decoder("llama", 28, 3072, 24, 8, 8192, 128256, 131072, tied=True, head_dim=128),
    "codellama-34b": _decoder("llama", 48, 8192, 64, 8, 22016, 32000, 16384),
    "tinyllama-1.1b": _decoder("llama", 22, 2048, 32, 4, 5632, 32000, 2048),
    "yi-6b": _decoder("llama", 32, 4096, 32, 4, 11008, 64000, 4096),
    "yi-34b": _decoder("llama", 60, 7168, 56, 8, 20480, 64000, 4096),
    "smollm-135m": _decoder("llama", 30, 576, 9, 3, 1536, 49152, 2048, tied=True),
    "smollm-360m": _decoder("llama", 32, 960, 15, 5, 2560, 49152, 2048, tied=True),
    "smollm-1.7b": _decoder("llama", 24, 2048, 32, 32, 8192, 49152, 2048, tied=True),
    "smollm3-3b": _decoder("smollm3", 36, 2048, 16, 4, 11008, 128256, 65536, tied=True),
    "mistral-7b": _decoder("mistral", 32, 4096, 32, 8, 14336, 32000, 32768, sliding_window=4096),
    "mistral-7b-v0.3": _decoder("mistral", 32, 4096, 32, 8, 14336, 32768, 32768, sliding_window=None),
    "mistral-nemo-12b": _decoder("mistral", 40, 5120, 32, 8, 14336, 131072, 131072, head_dim=128, sliding_window=None),
    "phi-2": _decoder("phi", 32, 2560, 32, 32, 10240, 51200, 2048),
    "phi-3-mini": _decoder("phi3", 32, 3072, 32, 32, 8192, 32064, 4096, sliding_window=2047),
    "phi-3-medium": _decoder("phi3", 40, 5120, 40, 10, 17920, 32064, 4096, sliding_window=2047),
    "phi-4": _decoder("phi3", 40, 5120, 40, 10, 17920, 100352, 16384, sliding_window=None),
    "starcoder2-3b": _decoder("starcoder2", 30, 3072, 24, 2, 12288, 49152, 16384, tied=True, sliding_window=4096),
    "starcoder2-15b": _decoder("starcoder2", 40, 6144, 48, 4, 24576, 49152, 16384, sliding_window=4096),
    "command-r": _decoder("cohere", 40, 8192, 64, 64, 22528, 256000, 131072, tied=True),
    "granite-3.0-2b": _decoder("granite", 40, 2048, 32, 8, 8192, 49155, 4096, tied=True),
    # Qwen
    "qwen2-0.5b": _decoder("qwen2", 24, 896, 14, 2, 4864, 151936, 131072, tied=True),
    "qwen2.5-1.5b": _decoder("qwen2", 28, 1536, 12, 2, 8960, 151936, 131072, tied=True),
    "qwen2.5-7b": _decoder("qwen2", 28, 3584, 28, 4, 18944, 152064, 131072),
    "qwen2.5-32b": _decoder("qwen2", 64, 5120, 40, 8, 27648, 152064, 131072),
    "qwen2.5-72b": _decoder("qwen2", 80, 8192, 64, 8, 29568, 152064, 131072),
    "qwen3-0.6b": _decoder("qwen3", 28, 1024, 16, 8, 3072, 151936, 40960, tied=True, head_dim=128),
    "qwen3-1.7b": _decoder("qwen3", 28, 2048, 16, 8, 6144, 151936, 40960, tied=True, head_dim=128),
    "qwen3-4b": _decoder("qwen3", 36, 2560, 32, 8, 9728, 151936, 40960, tied=True, head_dim=128),
    "qwen3-8b": _decoder("qwen3", 36, 4096, 32, 8, 12288, 151936, 40960, head_dim=128),
    "qwen3-14b": _decoder("qwen3", 40, 5120, 40, 8, 17408, 151936, 40960, head_dim=128),
    "qwen3-32b": _decoder("qwen3", 64, 5120, 64, 8, 25600, 151936, 40960, head_dim=128),
    # Gemma
    "gemma-2b": _decoder("gemma", 18, 2048, 8, 1, 16384, 256000, 8192, tied=True, head_dim=256),
    "gemma-7b": _decoder("gemma", 28, 3072, 16, 16, 24576, 256000, 8192, tied=True, head_dim=256),
    "gemma-2-2b": _decoder("gemma2", 26, 2304, 8, 4, 9216, 256000, 8192, tied=True, head_dim=256, sliding_window=4096),
    "gemma-2-9b": _decoder("gemma2", 42, 3584, 16, 8, 14336, 256000, 8192, tied=True, head_dim=256, sliding_window=4096),
    "gemma-2-27b": _decoder("gemma2", 46, 4608, 32, 16, 36864, 256000, 8192, tied=True, head_dim=128, sliding_window=4096),
    "gemma-3-270m": _decoder("gemma3_text", 18, 640, 4, 1, 2048, 262144, 32768, tied=True, head_dim=256, sliding_window=512),
    "gemma-3-1b": _decoder("gemma3_text", 26, 1152, 4, 1, 6912, 262144, 32768, tied=True, head_dim=256, sliding_window=512),
    # OLMo
    "olmo-1b": _decoder("olmo", 16, 2048, 16, 16, 8192, 50304, 2048, tied=True),
    "olmo-7b": _decoder("olmo", 32, 4096, 32, 32, 11008, 50304, 2048),
    "olmo-2-7b": _decoder("olmo2", 32, 4096, 32, 32, 11008, 100352, 4096),
    "olmo-2-13b": _decoder("olmo2", 40, 5120, 40, 40, 13824, 100352, 4096),
    "olmo-2-32b": _decoder("olmo2", 64, 5120, 40, 8, 27648, 100352, 4096),
    # Mixtures of experts
    "mixtral-8x7b": _decoder("mixtral", 32, 4096, 32, 8, 14336, 32000, 32768, num_local_experts=8, num_experts_per_tok=2),
    "mixtral-8x22b": _decoder("mixtral", 56, 6144, 48, 8, 16384, 32000, 65536, num_local_experts=8, num_experts_per_tok=2),
    "olmoe-1b-7b": _decoder("olmoe", 16, 2048, 16, 16, 1024, 50304, 4096, num_experts=64, num_experts_per_tok=8),
    "qwen1.5-moe-a2.7b": _decoder("qwen2_moe", 24, 2048, 16, 16, 5632, 151936, 8192, num_experts=60, num_experts_per_tok=4,
                                  moe_intermediate_size=1408, shared_expert_intermediate_size=5632),
    "qwen3-30b-a3b": _decoder("qwen3_moe", 48, 2048, 32, 4, 6144, 151936, 40960, head_dim=128, num_experts=128, num_experts_per_tok=8,
                              moe_intermediate_size=768),
    "qwen3-235b-a22b": _decoder("qwen3_moe", 94, 4096, 64, 4, 12288, 151936, 40960, head_dim=128, num_experts=128, num_experts_per_tok=8,
                                moe_intermediate_size=1536),
    "deepseek-v2-lite": _deepseek("deepseek_v2", 27, 2048, 16, 10944, 1408, 64, 6, 2, 1, None, 102400),
    "deepseek-v2": _deepseek("deepseek_v2", 60, 5120, 128, 12288, 1536, 160, 6, 2, 1, 1536, 102400),
    "deepseek-v3": _deepseek("deepseek_v3", 61, 7168, 128, 18432, 2048, 256, 8, 1, 3, 1536, 129280),
    "gpt-oss-20b": _decoder("gpt_oss", 24, 2880, 64, 8, 2880, 201088, 131072, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
                            sliding_window=128, attention_bias=True),
    "gpt-oss-120b": _decoder("gpt_oss", 36, 2880, 64, 8, 2880, 201088, 131072, head_dim=64, num_local_experts=128,
                             num_experts_per_tok=4, sliding_window=128, attention_bias=True),
    # Encoders
    "bert-base-uncased": _encoder("bert", 12, 768, 12, 30522, "BertForMaskedLM"),
    "bert-base-cased": _encoder("bert", 12, 768, 12, 28996, "BertForMaskedLM"),
    "bert-large-uncased": _encoder("bert", 24, 1024, 16, 30522, "BertForMaskedLM"),
    "roberta-base": _encoder("roberta", 12, 768, 12, 50265, "RobertaForMaskedLM", max_position_embeddings=514, type_vocab_size=1),
    "roberta-large": _encoder("roberta", 24, 1024, 16, 50265, "RobertaForMaskedLM", max_position_embeddings=514, type_vocab_size=1),
    "xlm-roberta-base": _encoder("xlm-roberta", 12, 768, 12, 250002, "XLMRobertaForMaskedLM", max_position_embeddings=514,
                                 type_vocab_size=1),
    "distilbert-base-uncased": {"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "n_layers": 6, "dim": 768,
                                "n_heads": 12, "hidden_dim": 3072, "vocab_size": 30522, "max_position_embeddings": 512},
    "electra-small": _encoder("electra", 12, 256, 4, 30522, "ElectraForPreTraining", embedding_size=128),
    "electra-small-generator": _encoder("electra", 12, 256, 4, 30522, "ElectraForMaskedLM", embedding_size=128),
    "electra-base": _encoder("electra", 12, 768, 12, 30522, "ElectraForPreTraining", embedding_size=768),
    "electra-base-generator": _encoder("electra", 12, 256, 4, 30522, "ElectraForMaskedLM", embedding_size=768),
    "electra-large": _encoder("electra", 24, 1024, 16, 30522, "ElectraForPreTraining", embedding_size=1024),
    "modernbert-base": _encoder("modernbert", 22, 768, 12, 50368, "ModernBertForMaskedLM", intermediate_size=1152,
                                max_position_embeddings=8192),
    "modernbert-large": _encoder("modernbert", 28, 1024, 16, 50368, "ModernBertForMaskedLM", intermediate_size=2624,
                                 max_position_embeddings=8192),
    "esm2-8m": _encoder("esm", 6, 320, 20, 33, "EsmForMaskedLM", max_position_embeddings=1026, position_embedding_type="rotary",
                        mask_token_id=32, pad_token_id=1),
    "esm2-650m": _encoder("esm", 33, 1280, 20, 33, "EsmForMaskedLM", max_position_embeddings=1026, position_embedding_type="rotary",
                          mask_token_id=32, pad_token_id=1),
    # Encoder-decoders
    "t5-small": _t5("t5", 6, 512, 8, 64, 2048),
    "t5-base": _t5("t5", 12, 768, 12, 64, 3072),
    "t5-large": _t5("t5", 24, 1024, 16, 64, 4096),
    "t5-11b": _t5("t5", 24, 1024, 128, 128, 65536),
    "flan-t5-base": _t5("t5", 12, 768, 12, 64, 2048, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5-small": _t5("mt5", 8, 512, 6, 64, 1024, 250112, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart-base": _bart(6, 768, 12, 50265),
    "bart-large": _bart(12, 1024, 16, 50265),
    "opus-mt-en-de": {**_bart(6, 512, 8, 58101), "model_type": "marian", "architectures": ["MarianMTModel"],
                      "max_position_embeddings": 512, "pad_token_id": 58100, "decoder_start_token_id": 58100, "eos_token_id": 0},
    # Text and image
    "vit-base-patch16": {"model_type": "vit", "architectures": ["ViTModel"], "num_hidden_layers": 12, "hidden_size": 768,
                         "num_attention_heads": 12, "intermediate_size": 3072, "patch_size": 16, "image_size": 224},
    "clip-vit-b-32": _clip((512, 8), (12, 768, 12), 32, 512),
    "clip-vit-b-16": _clip((512, 8), (12, 768, 12), 16, 512),
    "clip-vit-l-14": _clip((768, 12), (24, 1024, 16), 14, 768),
    "clip-vit-l-14-336": _clip((768, 12), (24, 1024, 16), 14, 768, 336),
    "llava-1.5-7b": _llava(32, 4096, 32, 11008),
    "llava-1.5-13b": _llava(40, 5120, 40, 13824),
}  # fmt: skip


def find_preset(name: str) -> dict[str, Any]:
    """Return the values of a published model's config.json. Raises UserError with the nearest name and the way to all."""
    if name.lower() not in PRESETS:
        raise UserError(
            f"{name!r} is neither a published model that is known here nor a folder or file.{nearest(name.lower(), PRESETS)} "
            "`plinth params --list` names the models; any other is counted from its config.json."
        )
    return PRESETS[name.lower()]
