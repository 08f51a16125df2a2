"""CLIP as it is published: Hugging Face's names of the two towers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from plinth.config import UserError
from plinth.models.dual_encoder import FIRST_LOGIT_SCALE, DualEncoder, DualEncoderConfig, TextTowerConfig
from plinth.models.formats.layout import Entry, Format
from plinth.models.tower import PUBLISHED_ACTIVATIONS
from plinth.models.vision import VisionConfig

NORMS = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
MATRICES = {"attention.out": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}
OURS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}

# What a published configuration leaves out has these values.
TOWER_DEFAULTS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
TEXT_DEFAULTS = TOWER_DEFAULTS | {"vocab_size": 49408, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048,
                                  "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}  # fmt: skip
VISION_DEFAULTS = TOWER_DEFAULTS | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_channels": 3,
                                    "image_size": 224, "patch_size": 32}  # fmt: skip


def _tower(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields that both towers have. Raises UserError for an activation that we do not compute."""
    activation = values["hidden_act"]
    if activation not in OURS:
        raise UserError(f"{where}.hidden_act={activation!r} is not supported. Supported: {', '.join(OURS)}.")
    return {
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "intermediate_size": values["intermediate_size"],
        "activation": OURS[activation],
        "norm_eps": values["layer_norm_eps"],
    }


def read_vision(values: Mapping[str, Any]) -> VisionConfig:
    """Read a published vision tower's configuration."""
    values = VISION_DEFAULTS | _present(values)
    sizes = {name: values[name] for name in ("image_size", "patch_size", "num_channels")}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise UserError(f"vision_config.{name}={size!r} is not supported. Supported: one number, for squares.")
    return VisionConfig(**sizes, **_tower(values, "vision_config"))


def write_vision(config: VisionConfig) -> dict[str, Any]:
    """Return a vision tower's configuration as it is published."""
    sizes = {name: getattr(config, name) for name in ("image_size", "patch_size", "num_channels")}
    return {"model_type": "clip_vision_model", **sizes, **_written_tower(config)}


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _written_tower(config: TextTowerConfig | VisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": PUBLISHED_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
    }


def read_config(values: dict[str, Any]) -> DualEncoderConfig:
    """Read config.json; the first published ones keep a second copy of each tower's values, which counts."""
    text, vision = (
        _present(values.get(name) or {}) | _present(values.get(f"{name}_dict") or {}) for name in ("text_config", "vision_config")
    )
    text = TEXT_DEFAULTS | text
    end = text["eos_token_id"]
    return DualEncoderConfig(
        text=TextTowerConfig(
            vocab_size=text["vocab_size"],
            max_seq_len=text["max_position_embeddings"],
            begin_id=text["bos_token_id"],
            end_id=end[0] if isinstance(end, list) else end,
            **_tower(text, "text_config"),
        ),
        vision=read_vision(vision),
        projection_size=values.get("projection_dim") or 512,
    )


def write_config(config: DualEncoderConfig) -> dict[str, Any]:
    """Return the contents of config.json."""
    text = {
        "model_type": "clip_text_model",
        "vocab_size": config.text.vocab_size,
        "max_position_embeddings": config.text.max_seq_len,
        "bos_token_id": config.text.begin_id,
        "eos_token_id": config.text.end_id,
        "projection_dim": config.projection_size,
        **_written_tower(config.text),
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection_size,
        "logit_scale_init_value": FIRST_LOGIT_SCALE,
        "text_config": text,
        "vision_config": write_vision(config.vision) | {"projection_dim": config.projection_size},
    }


def tower_entries(config: TextTowerConfig | VisionConfig, ours: str, published: str) -> Iterator[Entry]:
    """Yield the tensors of a stack of blocks; `ours` and `published` are what their names begin with."""
    width, wide = config.hidden_size, config.intermediate_size
    shapes = {"attention.out": (width, width), "up": (wide, width), "down": (width, wide)}
    for i in range(config.num_layers):
        ours_i, published_i = f"{ours}{i}.", f"{published}{i}."
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            names = tuple(f"{published_i}self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Entry(f"{ours_i}attention.qkv.{kind}", names, (shape,) * 3)
            for name, theirs in MATRICES.items():
                yield Entry(f"{ours_i}{name}.{kind}", (f"{published_i}{theirs}.{kind}",), (shapes[name][: len(shape)],))
            for name, theirs in NORMS.items():
                yield Entry(f"{ours_i}{name}.{kind}", (f"{published_i}{theirs}.{kind}",), ((width,),))


def _norm(ours: str, published: str, width: int) -> Iterator[Entry]:
    for kind in ("weight", "bias"):
        yield Entry(f"{ours}.{kind}", (f"{published}.{kind}",), ((width,),))


def vision_entries(config: VisionConfig, ours: str, published: str) -> Iterator[Entry]:
    """Yield the tensors of a vision tower; `ours` and `published` are what their names begin with."""
    width, edge = config.hidden_size, config.patch_size
    yield Entry(f"{ours}class_embed", (f"{published}embeddings.class_embedding",), ((width,),))
    yield Entry(
        f"{ours}patch_embed.weight", (f"{published}embeddings.patch_embedding.weight",), ((width, config.num_channels, edge, edge),)
    )
    positions = (config.num_patches + 1, width)
    yield Entry(f"{ours}position_embed.weight", (f"{published}embeddings.position_embedding.weight",), (positions,))
    yield from _norm(f"{ours}first_norm", f"{published}pre_layrnorm", width)  # their spelling
    yield from tower_entries(config, f"{ours}layers.", f"{published}encoder.layers.")
    yield from _norm(f"{ours}final_norm", f"{published}post_layernorm", width)


def layout(config: DualEncoderConfig) -> list[Entry]:
    """Return every tensor of the two towers."""
    text, size = config.text, config.projection_size
    return [
        Entry("logit_scale", ("logit_scale",), ((),)),
        Entry("text.embed.weight", ("text_model.embeddings.token_embedding.weight",), ((text.vocab_size, text.hidden_size),)),
        Entry("text.position_embed.weight", ("text_model.embeddings.position_embedding.weight",), ((text.max_seq_len, text.hidden_size),)),
        *tower_entries(text, "text.layers.", "text_model.encoder.layers."),
        *_norm("text.final_norm", "text_model.final_layer_norm", text.hidden_size),
        *vision_entries(config.vision, "vision.", "vision_model."),
        Entry("text_projection.weight", ("text_projection.weight",), ((size, text.hidden_size),)),
        Entry("vision_projection.weight", ("visual_projection.weight",), ((size, config.vision.hidden_size),)),
    ]


FORMAT = Format(
    config=DualEncoderConfig,
    model_types=("clip",),
    read_config=read_config,
    write_config=write_config,
    build=DualEncoder,
    layout=layout,
    ignored=(r".*\.position_ids",),
    used_by="plinth image classify, image retrieve",
)
