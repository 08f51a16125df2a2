"""Closed forms of published models that read images: towers, pairs of towers, and decoders that look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from plinth.config import UserError
from plinth.models.counts.blocks import Values, Widths, all_heads, attention, either, feed_forward, widths
from plinth.models.counts.encoders import labels, two_way
from plinth.models.counts.ledger import Attending, Ledger, Piece, Stream, linear, lookup, norms, on_stream

CLIP_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "projection_dim": 512,
}  # fmt: skip
CLIP_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 32, "num_channels": 3, "projection_dim": 512,
}  # fmt: skip
LLAMA_TEXT = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
VIT = {**CLIP_VISION, "patch_size": 16}


def filled(values: Values | None, defaults: Mapping) -> dict:
    """Return values with the architecture's defaults where they are absent."""
    return {**defaults, **{name: value for name, value in (values or {}).items() if value is not None}}


def patches(values: Values) -> int:
    """Return the patches of an image. Raises UserError when the image holds no whole patch."""
    count = (values["image_size"] // values["patch_size"]) ** 2
    if count < 1:
        raise UserError(f"config.json: image_size={values['image_size']} is smaller than patch_size={values['patch_size']}.")
    return count


def blocks(size: Widths, num_norms: int) -> list[Piece]:
    """Return blocks with biases throughout and two norms each, and so many norms besides."""
    layers = norms("norms", size.hidden_size, 2 * size.layers + num_norms, bias=True)
    return layers + attention(size, bias=True) + feed_forward(size, gated=False, bias=True)


def image_tower(values: Values, num_norms: int, *, patch_bias: bool) -> tuple[list[Piece], Attending, int]:
    """Return the pieces of a vision transformer on the stream "image", its attention, and its tokens: the patches and one more."""
    size, count = widths(all_heads(values)), patches(values)
    patch = (size.hidden_size, values["num_channels"], values["patch_size"], values["patch_size"])
    pieces = [Piece("class token", (size.hidden_size,), "other"), Piece("patch embedding", patch, "matrix")]
    pieces += [Piece("patch embedding bias", (size.hidden_size,), "other")] if patch_bias else []
    pieces += [lookup("position embedding", count + 1, size.hidden_size), *blocks(size, num_norms)]
    return on_stream(pieces, "image"), two_way(size, "image attention", "image"), count + 1


def vit(values: Values) -> Ledger:
    """Count ViT with its pooler (ViTModel) or its classifier (ViTForImageClassification)."""
    values = filled(values, VIT)
    kind = (values.get("architectures") or ["ViTModel"])[0]
    pieces, attending, tokens = image_tower(values, 1, patch_bias=True)
    hidden = values["hidden_size"]
    if kind == "ViTModel":
        pieces += linear("pooler", hidden, either(values, "pooler_output_size", hidden), bias=True, stream="pooled")
    elif kind == "ViTForImageClassification":
        pieces += linear("classifier", hidden, labels(values), bias=True, stream="pooled")
    else:
        raise UserError(f"architectures={kind!r} cannot be counted. Name ViTModel or ViTForImageClassification in config.json.")
    return Ledger(tuple(pieces), (attending,), (Stream("image", tokens), Stream("pooled", 1, counted=False)))


def clip(values: Values) -> Ledger:
    """Count CLIP: a text and an image tower, a projection of each, and the learnt temperature. A token is a text's or an image's."""
    text, image = filled(values.get("text_config"), CLIP_TEXT), filled(values.get("vision_config"), CLIP_VISION)
    size, longest = widths(all_heads(text)), text["max_position_embeddings"]
    pieces = [lookup("token embedding", text["vocab_size"], size.hidden_size), lookup("position embedding", longest, size.hidden_size)]
    pieces = on_stream(pieces + blocks(size, 1), "text")
    tower, attending, tokens = image_tower(image, 2, patch_bias=False)
    joint = either(values, "projection_dim", 512)
    pieces += tower + linear("text projection", size.hidden_size, joint, stream="pooled")
    pieces += linear("image projection", image["hidden_size"], joint, stream="pooled")
    pieces.append(Piece("temperature", (), "other"))
    causal = Attending("text attention", size.layers, size.heads, 2 * size.head_dim, hidden_size=size.hidden_size)
    streams = (Stream("text", longest), Stream("image", tokens), Stream("pooled", 1, counted=False))
    return Ledger(tuple(pieces), (causal, attending), streams, longest)


def llava(values: Values, count_text: Callable[[Values], Ledger]) -> Ledger:
    """Count LLaVA: CLIP's image tower, a projector of two layers, and a decoder whose context holds the patches too.

    A token is one of the decoder's context; an example has one image.
    """
    image = filled(values.get("vision_config"), {**CLIP_VISION, "hidden_size": 1024, "intermediate_size": 4096,
                   "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14})  # fmt: skip
    tower, attending, tokens = image_tower(image, 2, patch_bias=False)
    text = values.get("text_config") or {}
    inner = count_text(filled(text, LLAMA_TEXT if text.get("model_type", "llama") == "llama" else {}))
    hidden = inner.pieces[0].shape[-1]
    bias = either(values, "multimodal_projector_bias", True)
    projector = linear("projector first", image["hidden_size"], hidden, bias=bias, stream="patches")
    projector += linear("projector second", hidden, hidden, bias=bias, stream="patches")
    streams = (Stream("text"), Stream("image", tokens, counted=False), Stream("patches", tokens - 1, counted=False))
    return replace(inner, pieces=(*tower, *projector, *inner.pieces), attending=(attending, *inner.attending), streams=streams)
