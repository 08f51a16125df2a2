"""Adapters in PEFT's file format, out and in, and the models that training with adapters publishes.

A folder holds adapter_config.json and adapter_model.safetensors; the tensors are by published projection, as PEFT has them, whatever
is fused in ours.  Source: PEFT's `LoraConfig` and `get_peft_model_state_dict`, as of version 0.21.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from plinth.config import UserError, nearest, read_json, save_json
from plinth.models.formats.tensors import FLOATS
from plinth.models.hub import TokenizerFiles, load_decoder, save_model
from plinth.models.tensor_file import TensorFiles, save_tensors
from plinth.models.transformer import Transformer
from plinth.posttraining.lora import AdaptedLinear, LoraConfig, Projection, adaptable, adapted_modules, add_adapters, install, merge
from plinth.run import find_model, publish_dir, tree_sha256
from plinth.tokenizer.encode import Tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUANTISATION = "quantisation.json"  # beside them where the base was held in 4 bits; other programs do not read it
Onto = Literal["dequantised", "original"]
PREFIX = "base_model.model."
KINDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# Fields of PEFT's configuration that would change what is computed, and the values with which they do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # others store a base of their own
    **dict.fromkeys(
        ("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "target_parameters",
         "trainable_token_indices", "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
         "velora_config", "monteclora_config"),
        (None, False, {}, []),
    ),
}  # fmt: skip


def with_adapters(model: Transformer, config: LoraConfig, seed: int) -> Transformer:
    """Return the model, with fresh adapters where the configuration names a rank."""
    return model if config.rank is None else add_adapters(model, config, torch.Generator().manual_seed(seed))


def count_trained(model: nn.Module) -> int:
    """Return how many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def frozen_identity(adapter: LoraConfig, source: Path) -> dict[str, str]:
    """Return what a run with adapters may only be resumed with: the base, whose weights its checkpoints lack; nothing without adapters."""
    return {} if adapter.rank is None else {"base_sha256": tree_sha256(source)}


def publish_model(model: Transformer, tokenizer: TokenizerFiles | None, folder: Path, base: str) -> None:
    """Publish a trained model; adapters are published beside it as `adapter`, and merged into it."""
    if any(True for _ in adapted_modules(model)):
        save_adapter(model, folder.with_name("adapter"), base)
        merge(model)
    save_model(model, tokenizer, folder)


def save_adapter(model: Transformer, folder: Path, base: str | None = None) -> None:
    """Publish the model's adapters as a folder that PEFT loads, by one rename; `base` says what model they belong to.

    Raises UserError when the model has no adapters.
    """
    modules = [module for _, module in adapted_modules(model)]
    if not modules:
        raise UserError("the model has no adapters to save. Save it as a model.")
    tensors, projections = {}, []
    for module in modules:
        for published, (projection, parts) in module.adapters().items():
            projections.append(projection)
            tensors |= {f"{PREFIX}{published}.{kind}": _published(part, kind, projection) for kind, part in parts.items()}
    with publish_dir(folder) as temporary:
        save_json(temporary / CONFIG, _peft_config(modules[0].adapter, projections, base))
        save_tensors(tensors, temporary / WEIGHTS, {"format": "pt"})
        if modules[0].adapter.quantise:
            save_json(temporary / QUANTISATION, {"base": modules[0].adapter.quantise})


def _published(part: torch.Tensor, kind: str, projection: Projection) -> torch.Tensor:
    """Return a tensor as it is published: where the projection is multiplied by a factor, what is added to it is too."""
    part = part.float().cpu()
    return (part if kind == "lora_A.weight" else part * projection.factor).contiguous().clone()


def _peft_config(config: LoraConfig, projections: list[Projection], base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.rank_stabilised,
        "use_dora": config.dora,
        "target_modules": sorted({projection.target for projection in projections}),
        "bias": "none",
        "fan_in_fan_out": any(projection.is_transposed for projection in projections),
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def load_adapter(model: Transformer, folder: Path, quantise: Literal["nf4"] | None = None) -> Transformer:
    """Put the adapters of a folder in PEFT's format on the model, in place, all else frozen; returns the model.

    With `quantise` the matrices below them are rounded to 4 bits.
    Raises UserError, before anything is changed, for a kind of adapter that we do not compute, and for tensors that are missing, of
    another shape, or without a place in the model.
    """
    config = replace(read_adapter_config(folder), quantise=quantise)
    files = TensorFiles([folder / WEIGHTS])
    matrices = adaptable(model)
    shapes = dict(files.shapes())
    wanted = _check_tensors(model, matrices, shapes, config, folder)
    if unusual := [name for name in shapes if files.dtype(name) not in FLOATS]:
        raise UserError(f"{folder / WEIGHTS}: {unusual[0]} holds no floating-point numbers. Save the adapter in fp32, fp16 or bf16.")
    install(model, matrices, wanted, config, torch.Generator().manual_seed(0))
    for _, module in adapted_modules(model):
        _fill(module, files)
    return model


@torch.no_grad()
def _fill(module: AdaptedLinear, files: TensorFiles) -> None:
    for published, (projection, parts) in module.adapters().items():
        for kind, part in parts.items():
            part.copy_(files.read(f"{PREFIX}{published}.{kind}"))
            if kind != "lora_A.weight":
                part.div_(projection.factor)


def read_adapter_config(folder: Path) -> LoraConfig:
    """Return the configuration of a folder in PEFT's format. Raises UserError for what we do not compute."""
    file = folder / CONFIG
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file} is no table of fields. Copy the adapter again.")
    for name, harmless in HARMLESS.items():
        if name in values and values[name] not in harmless:
            raise UserError(f"{file}: {name}={values[name]!r} is not supported; LoRA, rsLoRA and DoRA are. Merge it with PEFT first.")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(f"{file}: r={rank!r} and lora_alpha={alpha!r} must be numbers. Copy the adapter again.")
    return LoraConfig(rank, float(alpha), bool(values.get("use_rslora")), bool(values.get("use_dora")))


def _check_tensors(
    model: Transformer, matrices: dict[str, list[Projection]], shapes: dict[str, tuple[int, ...]], config: LoraConfig, folder: Path
) -> set[str]:
    """Return the published names of the projections that a file's tensors are for."""
    assert config.rank is not None
    expected: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parts in matrices.items():
        columns = model.get_submodule(name).in_features
        for part in parts:
            sizes = dict(zip(KINDS, ((config.rank, columns), (part.rows, config.rank), (part.rows,))))
            expected[part.published] = {kind: size for kind, size in sizes.items() if config.dora or kind != KINDS[2]}
    wanted = {name.removeprefix(PREFIX).removesuffix(f".{kind}") for name in shapes for kind in KINDS if name.endswith(f".{kind}")}
    places = {f"{PREFIX}{module}.{kind}": size for module in expected if module in wanted for kind, size in expected[module].items()}
    for name in sorted(shapes.keys() - places.keys()):
        guess = nearest(name, (f"{PREFIX}{module}.{KINDS[0]}" for module in expected))
        raise UserError(f"{folder / WEIGHTS} holds {name}, which has no place in this model.{guess} Name the model that it was trained on.")
    for name, size in places.items():
        if shapes.get(name) != size:
            raise UserError(
                f"{folder / WEIGHTS}: {name} is {shapes.get(name, 'absent')}, but this model with r={config.rank} needs {size}. "
                "Name the model that it was trained on."
            )
    if not wanted:
        raise UserError(f"{folder / WEIGHTS} holds no adapter. Copy it again.")
    return wanted


def find_adapter(path: Path) -> Path:
    """Return the adapter's folder that a run or a folder stands for. Raises UserError when there is none."""
    for folder in (path / "adapter", path):
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(f"{path} holds no adapter ({CONFIG}). Name a run of `plinth sft --adapter.rank N`, or a folder that PEFT saved.")


def trained_on(folder: Path) -> Literal["nf4"] | None:
    """Return the format in which an adapter's base was held while it was trained, None for whole weights or where nothing says so."""
    return read_json(folder / QUANTISATION)["base"] if (folder / QUANTISATION).is_file() else None


def merge_adapter(base: Path, adapter: Path, out: Path, onto: Onto | None = None) -> tuple[Path, int]:
    """Write the model of `base` with the adapter of `adapter` merged, in fp32, to `out`; returns the folder and the adapter's parameters.

    An adapter trained on 4 bits fits those: `onto` says whether it is added to the base rounded and read back (dequantised), which
    computes what was trained, or to the original, which does not.
    Raises UserError when `out` holds anything, the adapter does not fit, or it was trained on 4 bits and `onto` is not given.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is not empty. Name a new folder.")
    source, folder = find_model(base), find_adapter(adapter)
    format = trained_on(folder)
    if format is not None and onto is None:
        raise UserError(
            f"{folder} was trained on a base of 4 bits ({format}), and {base} has whole weights: added to them it would compute "
            "something that nobody trained or measured. Pass --onto dequantised for the model that was trained, in whole weights, "
            "or --onto original if you want the sum all the same."
        )
    if format is None and onto == "dequantised":
        raise UserError(f"{folder} was trained on whole weights: leave out --onto dequantised.")
    model = load_adapter(load_decoder(source), folder, format if onto == "dequantised" else None)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    save_model(merge(model), Tokenizer.load(source), out)
    return out, count
