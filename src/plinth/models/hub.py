"""Models in Hugging Face's format: safetensors, config.json, the tokenizer; out and in, checked.

Weights are published under Qwen3's names, with the fused projections split, so that transformers, vLLM and llama.cpp read them.
`plinth.json` beside them records the SHA-256 of each file, and `load_model` refuses a folder that no longer matches it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch

from plinth import __version__
from plinth.config import UserError, nearest, read_json, save_json
from plinth.models.config import HIDDEN_ACTS, DecoderConfig
from plinth.models.meta import on_meta
from plinth.models.tensor_file import save_tensors
from plinth.models.transformer import Transformer
from plinth.run import file_sha256, publish_dir

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIDECAR = "plinth.json"

# Our name in a block → Qwen3's; the fused ones stand for several, stacked along the first dimension.
LAYER_NAMES = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "mlp_norm.weight": ["post_attention_layernorm.weight"],
    "mlp.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
    # Of options that only Plinth reads.
    "mlp.up.weight": ["mlp.up_proj.weight"],
    "attention.value_embed.table.weight": ["self_attn.value_embed.weight"],
    "attention.value_embed.gate.weight": ["self_attn.value_gate.weight"],
}
OTHER_NAMES = {
    "embed.weight": ["model.embed_tokens.weight"],
    "final_norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
    "resid_lambda": ["model.resid_lambda"],
    "x0_lambda": ["model.x0_lambda"],
}

# Fields of config.json that change the arithmetic in ways that the decoder does not have: field → values that are fine.
UNSUPPORTED = {
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (),
    "quantization_config": (),
}


class TokenizerFiles(Protocol):
    """What a model folder needs of a tokenizer; `plinth.tokenizer.encode.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text_id(self) -> int | None: ...

    @property
    def end_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    def save(self, path: Path) -> None: ...


def save_model(model: Transformer, tokenizer: TokenizerFiles | None, out_dir: Path, dtype: torch.dtype = torch.float32) -> None:
    """Publish a model folder by one rename: safetensors in `dtype`, config.json, generation_config.json, tokenizer, plinth.json.

    A model folder already at `out_dir` is replaced. Raises UserError when something else is there, or when the tokenizer has more
    entries than the model.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir / "config.json").is_file() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} holds files, but no model. Name a new folder.")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model vocab_size={model.config.vocab_size}. "
            "Save the model with the tokenizer that it was trained with."
        )
    with publish_dir(out_dir) as folder:
        tensors = {name: tensor.to(dtype) for name, tensor in export_tensors(model).items()}
        save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
        special = _special_ids(tokenizer)
        save_json(folder / "config.json", model.config.to_hf() | {"dtype": str(dtype).removeprefix("torch.")} | special)
        save_json(folder / "generation_config.json", special | {"max_length": model.config.max_seq_len})
        if tokenizer is not None:
            tokenizer.save(folder)
        names = sorted(file.name for file in folder.iterdir())
        save_json(folder / SIDECAR, {"plinth": __version__, "sha256": {name: file_sha256(folder / name) for name in names}})


def _special_ids(tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """Return the ids that generation stops at, pads with and starts documents with: both ends, of a document and of a message."""
    if tokenizer is None:
        return {}
    ends = [i for i in (tokenizer.end_of_text_id, tokenizer.end_id) if i is not None]
    ids = {"bos_token_id": tokenizer.end_of_text_id, "eos_token_id": ends or None, "pad_token_id": tokenizer.pad_id}
    return {name: value for name, value in ids.items() if value is not None}


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Read a model folder, ours or any in Qwen3's format, with its parameters in `dtype`.

    Raises UserError for another architecture, a file that is absent, truncated or differs from its recorded hash, and a tensor that is
    missing, superfluous or of the wrong shape.
    """
    path = Path(path)
    values = read_json(path / "config.json")
    _check_supported(values, path)
    config = DecoderConfig.from_hf(values)
    _check_hashes(path)
    state = import_tensors(config, _read_tensors(path), where=str(path))
    model = on_meta(lambda: Transformer(config))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model


def export_tensors(model: Transformer) -> dict[str, torch.Tensor]:
    """Return the weights in fp32 under Qwen3's names: fused projections split, multipliers folded in, unlearnt scales written as 1."""
    tensors, state = {}, model.state_dict()
    for name, (shape, rows) in _layout(model.config).items():
        tensor = state[name].detach().to("cpu", torch.float32) if name in state else torch.ones(shape)
        if model.config.has_multipliers:
            tensor = tensor * fold_factor(model.config, name)
        tensors |= {published: part.contiguous() for published, part in zip(_published_names(name), tensor.split(rows))}
    return tensors


def import_tensors(config: DecoderConfig, tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Return the decoder's state from tensors under Qwen3's names, the projections fused. Inverse of `export_tensors`.

    Raises UserError for a tensor that is missing, superfluous or of the wrong shape; `where` begins its text.
    """
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in left:
        _check_tied(left.pop("lm_head.weight"), left.get("model.embed_tokens.weight"), where)
    state = {}
    for name, (shape, rows) in _layout(config).items():
        parts = [_take(left, published, (count, *shape[1:]), where) for published, count in zip(_published_names(name), rows)]
        state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        if config.has_multipliers:
            state[name] = state[name] / fold_factor(config, name)
        if name.endswith("norm.weight") and not config.learnable_norm:
            _check_ones(state.pop(name), _published_names(name)[0], where)
    if left:
        raise UserError(f"{where} holds {len(left)} tensor(s) that its config.json has no place for: {', '.join(sorted(left)[:3])}.")
    return state


def _layout(config: DecoderConfig) -> dict[str, tuple[torch.Size, tuple[int, ...]]]:
    """Return, of each tensor of ours that a published model has, its shape and the rows of the projections fused in it.

    They are those of a decoder that learns its scales: a published model always has them.
    """
    model = on_meta(lambda: Transformer(dataclasses.replace(config, learnable_norm=True)))
    fused = model.matrix_parts()
    return {name: (tensor.shape, fused.get(name, (tensor.shape[0],))) for name, tensor in model.state_dict().items()}


def fold_factor(config: DecoderConfig, name: str) -> float | torch.Tensor:
    """Return what a weight is multiplied by so that the decoder computes the same without its multipliers.

    A head of its own takes the output multiplier. An embedding that is the head too shrinks as a whole, and with it the residual
    stream: whatever writes to the stream shrinks alike, the norms do not see it (their eps shrinks by the square), and so that
    the norms of queries and keys, which share that eps, do not see it either, the rows that feed them shrink too.
    """
    if name.endswith("q_norm.weight"):
        return config.attention_multiplier
    if not config.tie_embeddings:
        return config.output_multiplier if name == "head.weight" else 1.0
    if name in ("embed.weight", "x0_lambda") or name.endswith(("attention.out.weight", "mlp.down.weight")):
        return config.stream_factor
    if name.endswith("attention.qkv.weight"):
        factors = torch.ones((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, 1)
        factors[: (config.num_heads + config.num_kv_heads) * config.head_dim] = config.stream_factor
        return factors
    return 1.0


def _published_names(name: str) -> list[str]:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return [f"model.layers.{layer}.{published}" for published in LAYER_NAMES[rest]]


def _take(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...], where: str) -> torch.Tensor:
    if name not in tensors:
        raise UserError(f"{where} lacks the tensor {name}.{nearest(name, tensors)} Copy the model again.")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape:
        raise UserError(f"{where}: {name} has shape {tuple(tensor.shape)}; its config.json says {shape}.")
    if not tensor.is_floating_point():
        raise UserError(f"{where}: {name} holds {tensor.dtype}; quantised weights are not supported. Use the fp32 or bf16 weights.")
    return tensor


def _check_tied(head: torch.Tensor, embedding: torch.Tensor | None, where: str) -> None:
    if embedding is None or not torch.equal(head, embedding):
        raise UserError(f"{where}: tie_word_embeddings is true, but lm_head.weight differs from the embedding. Set it to false.")


def _check_ones(scale: torch.Tensor, name: str, where: str) -> None:
    if not bool((scale == 1).all()):
        raise UserError(f"{where}: plinth_learnable_norm is false, but {name} is not all 1. Set it to true in config.json.")


def _check_supported(values: dict[str, Any], path: Path) -> None:
    activation = HIDDEN_ACTS.get(values.get("plinth_activation", "swiglu"), "silu")
    for name, fine in ({"hidden_act": (activation,)} | UNSUPPORTED).items():
        if values.get(name) is not None and values[name] not in fine:
            wanted = f"Supported: {fine[0]}." if fine else "Use a model without it."
            raise UserError(f"{path / 'config.json'}: {name}={values[name]!r} is not supported. {wanted}")
    rope_type = (values.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type != "default":
        raise UserError(f"{path / 'config.json'}: rope_type={rope_type!r} is not supported. Supported: default.")


def _check_hashes(path: Path) -> None:
    """Compare each file that plinth.json names with its recorded hash; a folder without plinth.json (an import) passes."""
    if not (path / SIDECAR).is_file():
        return
    recorded = read_json(path / SIDECAR).get("sha256", {})
    for name, expected in recorded.items():
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing, and {SIDECAR} names it. Copy the model again.")
        found = file_sha256(path / name)
        if found != expected:
            raise UserError(
                f"{path / name} was damaged or changed: its SHA-256 is {found[:12]}..., {SIDECAR} recorded {expected[:12]}.... "
                f"Copy the model again; if you changed it on purpose, delete {path / SIDECAR}."
            )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read model.safetensors, or the files that its index names."""
    files = [WEIGHTS]
    if not (path / WEIGHTS).is_file() and (path / INDEX).is_file():
        files = sorted(set(read_json(path / INDEX)["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if not (path / file).is_file():
            raise UserError(f"{path / file} does not exist. Name a model folder with safetensors weights.")
        try:
            tensors |= safetensors.torch.load_file(path / file)
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{path / file} is truncated or not a safetensors file: {error}. Copy the model again.") from None
    return tensors
