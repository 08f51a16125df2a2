"""Models as GGUF, the one file that llama.cpp reads: architectures qwen3, qwen2 and llama, weights as they are or quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.gguf_architecture import add_shape, architecture, frequency_factors, paired_rows
from plinth.models.hub import export_tensors
from plinth.models.transformer import Transformer

WeightFormat = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
BLOCK = 32  # weights of a row that share a scale in Q8_0 and Q4_0
HEADS = ("token_embd.weight", "output.weight")  # read by every token's logits: an error there is not averaged out by later layers


class Vocabulary(Protocol):
    """What the file needs of a tokenizer; `plinth.tokenizer.gguf.GgufVocabulary` has it."""

    @property
    def model(self) -> str: ...

    @property
    def scores(self) -> list[float]: ...

    @property
    def blank_first(self) -> bool: ...

    @property
    def begins(self) -> bool: ...

    @property
    def tokens(self) -> list[str]: ...

    @property
    def kinds(self) -> list[int]: ...

    @property
    def merges(self) -> list[str]: ...

    @property
    def cut(self) -> str: ...

    @property
    def special(self) -> dict[str, int]: ...

    @property
    def chat_template(self) -> str | None: ...


def gguf_library() -> Any:
    """Return the module `gguf`. Raises UserError when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"--format gguf needs the package gguf ({error}). Install it: pip install 'plinth-fm[export]'.") from None
    return gguf


def check_gguf(config: DecoderConfig, weights: str) -> None:
    """Raise UserError for a decoder that none of our architectures can hold, or rows that no whole block fits."""
    if weights not in get_args(WeightFormat):
        raise UserError(f"quantise={weights!r} is not one of {', '.join(get_args(WeightFormat))}.")
    architecture(config)
    if weights not in ("q8_0", "q4_0"):
        return
    widths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    for name, width in (widths | {"num_heads * head_dim": config.num_heads * config.head_dim}).items():
        if width % BLOCK:
            raise UserError(f"{name}={width} is not a multiple of {BLOCK}, the block of {weights}. Use --quantise bf16 or f16.")


def write_gguf(model: Transformer, vocabulary: Vocabulary, path: Path, *, weights: WeightFormat, name: str, pure: bool = False) -> None:
    """Write the model and its tokenizer into one file.

    Matrices are in `weights`, norms in f32. With q4_0 the embedding and the head stay at q8_0, unless `pure`: an error in them goes
    into the logits undiluted. Raises UserError for a model or a format that does not go, and when `gguf` is not installed.
    """
    gguf = gguf_library()
    check_gguf(model.config, weights)
    config, kind = model.config, architecture(model.config)
    writer = gguf.GGUFWriter(path, kind)
    try:
        add_shape(writer, gguf, config, name, weights)
        _add_vocabulary(writer, vocabulary)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_layers)
        if (factors := frequency_factors(config)) is not None:
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        for published, tensor in export_tensors(model).items():
            target = names.get_name(published, try_suffixes=(".weight", ".bias"))
            if kind == "llama" and target.endswith(("attn_q.weight", "attn_k.weight")):
                tensor = paired_rows(tensor, config.num_heads if "attn_q" in target else config.num_kv_heads)
            data, kept = encode_weights(tensor, "q8_0" if weights == "q4_0" and target in HEADS and not pure else weights)
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[kept.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def encode_weights(tensor: torch.Tensor, weights: str) -> tuple[np.ndarray, str]:
    """Return the bytes of a tensor as GGUF stores it, and the format: a vector stays in f32."""
    if tensor.dim() < 2 or weights == "f32":
        return tensor.numpy(), "f32"
    if weights == "f16":
        if not bool(torch.isfinite(half := tensor.half()).all()):
            raise UserError("a weight is above 65504, the largest number of f16. Use --quantise bf16.")
        return half.numpy(), "f16"
    gguf = gguf_library()
    return gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType[weights.upper()]), weights


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.blank_first)
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
    }
    for name, i in vocabulary.special.items():
        adders[name](i)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
