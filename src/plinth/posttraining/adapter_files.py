"""Adapters in PEFT's file format, out and in, and the models that training with adapters publishes.

A folder holds adapter_config.json and adapter_model.safetensors; the tensors are by published projection, as PEFT has them, whatever
is fused in ours.  Source: PEFT's `LoraConfig` and `get_peft_model_state_dict`, as of version 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from plinth.config import UserError, nearest, read_json, save_json
from plinth.models.formats.tensors import FLOATS
from plinth.models.hub import TokenizerFiles, save_model
from plinth.models.reward import RewardModel
from plinth.models.tensor_file import TensorFiles, save_tensors
from plinth.models.transformer import Transformer
from plinth.posttraining import adapter_wholes
from plinth.posttraining.adapter_wholes import PREFIX, Whole
from plinth.posttraining.lora import (
    AdaptedLinear,
    LoraConfig,
    Projection,
    adaptable,
    adapted_modules,
    add_adapters,
    install,
    merge,
    projections_of,
)
from plinth.run import publish_dir, tree_sha256

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUANTISATION = "quantisation.json"  # beside them where the base was held in 4 bits; other programs do not read it
REWARD = "reward.json"  # beside them where a reward model's head is saved whole: what is added to its scores
WHOLE = {"score", "classifier", "embed_tokens", "wte", "lm_head"}  # PEFT names both heads of classifiers, whichever there is
Adaptable = TypeVar("Adaptable", Transformer, RewardModel)
KINDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# Fields of PEFT's configuration that would change what is computed, and the values with which they do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # others store a base of their own
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "target_parameters",
         "trainable_token_indices", "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
         "velora_config", "monteclora_config"),
        (None, False, {}, []),
    ),
}  # fmt: skip


def with_adapters(model: Adaptable, config: LoraConfig, seed: int) -> Adaptable:
    """Return the model, with fresh adapters where a rank is named; a reward model's are on its trunk, and its head is trained whole."""
    if config.rank is not None:
        add_adapters(decoder_of(model), config, torch.Generator().manual_seed(seed))
    return model


def decoder_of(model: Transformer | RewardModel) -> Transformer:
    """Return the decoder that has the adapters: a reward model's trunk, or the model itself."""
    return model.trunk if isinstance(model, RewardModel) else model


def count_trained(model: nn.Module) -> int:
    """Return how many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def frozen_identity(adapter: LoraConfig, source: Path) -> dict[str, str]:
    """Return what a run with adapters may only be resumed with: the base, whose weights its checkpoints lack; nothing without adapters."""
    return {} if adapter.rank is None else {"base_sha256": tree_sha256(source)}


def publish_model(model: Transformer | RewardModel, tokenizer: TokenizerFiles | None, folder: Path, base: str) -> None:
    """Publish a trained model; adapters are published beside it as `adapter`, and merged into it."""
    if any(True for _ in adapted_modules(model)):
        save_adapter(model, folder.with_name("adapter"), base)
        merge(model)
    save_model(model, tokenizer, folder)


def save_adapter(model: Transformer | RewardModel, folder: Path, base: str | None = None) -> None:
    """Publish the model's adapters as a folder that PEFT loads, by one rename; `base` says what model they belong to.

    What is trained whole is saved whole, of a reward model the head always; what is added to its scores is beside PEFT's files.
    Raises UserError when the model has no adapters.
    """
    modules = [module for _, module in adapted_modules(model)]
    if not modules:
        raise UserError("the model has no adapters to save. Save it as a model.")
    config, tensors, projections = modules[0].adapter.published, {}, []
    whole = [one for one in adapter_wholes.wholes(model).values() if one.name in (adapter_wholes.SCORE, *(config.whole or ()))]
    for module in modules:
        for published, (projection, parts) in module.adapters().items():
            projections.append(projection)
            tensors |= {f"{PREFIX}{published}.{kind}": _published(part, kind, projection) for kind, part in parts.items()}
    tensors |= adapter_wholes.published(whole)
    with publish_dir(folder) as temporary:
        save_json(temporary / CONFIG, _peft_config(config, projections, _target_modules(decoder_of(model), projections), whole, base))
        save_tensors(tensors, temporary / WEIGHTS, {"format": "pt"})
        if config.quantise:
            save_json(temporary / QUANTISATION, {"base": config.quantise})
        if isinstance(model, RewardModel):
            save_json(temporary / REWARD, {"bias": model.config.bias})


def _target_modules(decoder: Transformer, projections: list[Projection]) -> list[str]:
    """Return the last names of the adapted projections, or their whole names where not every projection so called is adapted."""
    adapted = {projection.published for projection in projections}
    targets = {projection.target for projection in projections}
    so_called = {part.published for fused in projections_of(decoder).values() for part in fused if part.target in targets}
    return sorted(targets if so_called == adapted else adapted)


def _published(part: torch.Tensor, kind: str, projection: Projection) -> torch.Tensor:
    """Return a tensor as it is published: where the projection is multiplied by a factor, what is added to it is too."""
    part = part.float().cpu()
    return (part if kind == "lora_A.weight" else part * projection.factor).contiguous().clone()


def _peft_config(
    config: LoraConfig, projections: list[Projection], target_modules: list[str], whole: Sequence[Whole], base: str | None
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if any(one.name == adapter_wholes.SCORE for one in whole) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "use_dora": config.dora,
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": any(projection.is_transposed for projection in projections),
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "modules_to_save": [name for one in whole for name in one.modules] or None,
        "inference_mode": True,
    }


def load_adapter(model: Adaptable, folder: Path, quantise: Literal["nf4"] | None = None) -> Adaptable:
    """Put the adapters of a folder in PEFT's format on the model, in place, all else frozen; returns the model.

    What the folder holds whole is read too: embedding, head, a reward model's score. With `quantise` the matrices below the adapters
    are rounded to 4 bits.
    Raises UserError, before anything is changed, for a kind of adapter that we do not compute, and for tensors that are missing, of
    another shape, or without a place in the model.
    """
    config = replace(read_adapter_config(folder), quantise=quantise)
    files, decoder = TensorFiles([folder / WEIGHTS]), decoder_of(model)
    matrices = adaptable(decoder)
    shapes = dict(files.shapes())
    whole = adapter_wholes.take(model, shapes, folder / WEIGHTS)
    config = replace(config, whole=tuple(one.name for one in whole if one.name != adapter_wholes.SCORE) or None)
    wanted = _check_tensors(decoder, matrices, shapes, config, folder)
    if unusual := [name for name in files.shapes() if files.dtype(name) not in FLOATS]:
        raise UserError(f"{folder / WEIGHTS}: {unusual[0]} holds no floating-point numbers. Save the adapter in fp32, fp16 or bf16.")
    adapter_wholes.fill(whole, files, folder / WEIGHTS)
    install(decoder, matrices, wanted, config, torch.Generator().manual_seed(0))
    adapter_wholes.train_whole(decoder, config.whole)
    for _, module in adapted_modules(decoder):
        _fill(module, files)
    if isinstance(model, RewardModel):
        bias = read_json(folder / REWARD)["bias"] if (folder / REWARD).is_file() else 0.0
        model.config = replace(model.config, bias=float(bias))
    return model


def has_head(folder: Path) -> bool:
    """Whether an adapter's folder holds the head of a reward model."""
    return f"{PREFIX}{adapter_wholes.SCORE}.weight" in TensorFiles([folder / WEIGHTS]).shapes()


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
    if other := set(values.get("modules_to_save") or ()) - WHOLE:
        raise UserError(
            f"{file}: modules_to_save={values['modules_to_save']!r} is not supported, as it has {min(other)}; embedding, head and the "
            "score of a reward model are. Merge it with PEFT first."
        )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(f"{file}: r={rank!r} and lora_alpha={alpha!r} must be numbers. Copy the adapter again.")
    gaussian, dropout = values.get("init_lora_weights") == "gaussian", float(values.get("lora_dropout") or 0.0)
    return LoraConfig(
        rank, float(alpha), bool(values.get("use_rslora")), bool(values.get("use_dora")),
        dropout=dropout, init="gaussian" if gaussian else "uniform",
    )  # fmt: skip


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
