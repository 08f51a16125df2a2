"""LLaVA as it is published: a CLIP vision tower and a decoder under names of their own, between them the projector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plinth.config import UserError
from plinth.models.formats import clip, decoder
from plinth.models.formats.layout import Entry, Format
from plinth.models.tower import PUBLISHED_ACTIVATIONS
from plinth.models.vision_language import VisionLanguageConfig, VisionLanguageModel

STRATEGIES = {"default": False, "full": True}  # whether the class token stays
TEXT_DEFAULTS = {  # what a published text_config leaves out
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
VISION_DEFAULTS = {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14, "image_size": 336, "num_hidden_layers": 24,
                   "num_attention_heads": 16}  # fmt: skip


def read_config(values: dict[str, Any]) -> VisionLanguageConfig:
    """Read config.json. Raises UserError for another vision tower, several layers, or a decoder that we do not compute."""
    text, vision = dict(values.get("text_config") or {}), dict(values.get("vision_config") or {})
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(f"vision_config.model_type={vision['model_type']!r} is not supported. Supported: clip_vision_model.")
    layer, strategy = values.get("vision_feature_layer", -2), values.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer={layer!r} is not supported. Supported: one layer.")
    if strategy not in STRATEGIES:
        raise UserError(f"vision_feature_select_strategy={strategy!r} is not one of {', '.join(STRATEGIES)}.")
    activation = values.get("projector_hidden_act", "gelu")
    if activation not in clip.OURS:
        raise UserError(f"projector_hidden_act={activation!r} is not supported. Supported: {', '.join(clip.OURS)}.")
    if "tie_word_embeddings" in values:
        text.setdefault("tie_word_embeddings", values["tie_word_embeddings"])
    kind = text.get("model_type", "llama")
    if kind not in decoder.FORMAT.model_types:
        raise UserError(f"text_config.model_type={kind!r} is not supported. Supported: {', '.join(decoder.FORMAT.model_types)}.")
    return VisionLanguageConfig(
        vision=clip.read_vision(VISION_DEFAULTS | vision),
        decoder=decoder.FORMAT.read_config((TEXT_DEFAULTS if kind == "llama" else {}) | text),
        image_id=values.get("image_token_index", values.get("image_token_id", 32000)),
        vision_layer=layer,
        class_token=STRATEGIES[strategy],
        projector_activation=clip.OURS[activation],
        projector_bias=values.get("multimodal_projector_bias", True),
    )


def write_config(config: VisionLanguageConfig) -> dict[str, Any]:
    """Return the contents of config.json."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_id,
        "image_seq_length": config.image_tokens,
        "vision_feature_layer": config.vision_layer,
        "vision_feature_select_strategy": "full" if config.class_token else "default",
        "projector_hidden_act": PUBLISHED_ACTIVATIONS[config.projector_activation],
        "multimodal_projector_bias": config.projector_bias,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "text_config": decoder.FORMAT.write_config(config.decoder),
        "vision_config": clip.write_vision(config.vision),
    }


def _name(published: str) -> str:
    """Return the name of a decoder's tensor within the whole."""
    return f"language_model.{published}"


def layout(config: VisionLanguageConfig) -> list[Entry]:
    """Return every tensor of the three parts."""
    width, seen = config.decoder.hidden_size, config.vision.hidden_size
    entries = list(clip.vision_entries(config.vision, "vision.", "vision_tower.vision_model."))
    for name, theirs, shape in (("first", "linear_1", (width, seen)), ("second", "linear_2", (width, width))):
        for kind in ("weight", "bias") if config.projector_bias else ("weight",):
            entries.append(Entry(f"projector.{name}.{kind}", (f"multi_modal_projector.{theirs}.{kind}",), (shape[: 2 - (kind == "bias")],)))
    for entry in decoder.FORMAT.layout(config.decoder):
        entries.append(replace(entry, name=f"decoder.{entry.name}", published=tuple(map(_name, entry.published))))
    return entries


def aliases(config: VisionLanguageConfig) -> dict[str, str]:
    """Return what the decoder's own format publishes twice."""
    return {_name(name): _name(other) for name, other in decoder.FORMAT.aliases(config.decoder).items()}


FORMAT = Format(
    config=VisionLanguageConfig,
    model_types=("llava",),
    read_config=read_config,
    write_config=write_config,
    build=VisionLanguageModel,
    layout=layout,
    ignored=(r".*\.position_ids", *decoder.FORMAT.ignored),
    renamed=(
        (r"^model\.(language_model)\.", r"\1.model."),  # transformers 4.52 to 4.57
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),  # transformers 5
    ),
    aliases=aliases,
    used_by="plinth image ask",
    generates=True,
)
