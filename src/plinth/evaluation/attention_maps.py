"""The maps of attention of each family of models: which tokens look, at which, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from plinth.config import UserError
from plinth.data.image_questions import question_tokens
from plinth.data.images import ImageProcessor
from plinth.data.pictures import caption_rows
from plinth.evaluation.zero_shot import ImageTextModel
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.translate import Translator
from plinth.models.config import DecoderConfig
from plinth.models.dual_encoder import DualEncoderConfig
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.models.hub import load_model, read_config
from plinth.models.recurrent_seq2seq import RecurrentSeq2SeqConfig
from plinth.models.vision import VisionConfig
from plinth.models.vision_language import VisionLanguageConfig
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.encoder_tokens import encoder_tokens

TITLES = {
    "self": "self-attention: the text over itself",
    "encoder": "encoder: the source over itself",
    "decoder": "decoder: the target over what stands before",
    "cross": "cross-attention: the target over the source",
    "text": "text tower: the caption over what stands before",
    "vision": "vision tower: the image's patches over each other, by row and column",
}


@dataclass(frozen=True)
class AttentionMap:
    """Weights of one kind of attention."""

    name: str
    """self, encoder, decoder, cross, text, vision"""
    title: str
    """what looks at what"""
    rows: tuple[str, ...]
    """tokens that look; in cross-attention the token that is being written"""
    columns: tuple[str, ...]
    """tokens that are looked at"""
    weights_LHTS: np.ndarray
    """fp32 (layers, heads, rows, columns); each row sums to 1"""


@dataclass(frozen=True)
class Question:
    """What a model is shown."""

    text: str
    """a text, a source, a caption, or a question on the image"""
    target: str | None = None
    """of an encoder-decoder what it writes; its own greedy translation where none is given"""
    image: Path | None = None
    """of a model with a vision tower the image"""
    max_tokens: int = 96
    """tokens of each side; what stands behind them is left out"""


@dataclass(frozen=True)
class Maps:
    """Where a model looks."""

    maps: tuple[AttentionMap, ...]
    """one or more"""
    num_params: int
    """parameters of the model"""
    num_cut: int = 0
    """tokens left out"""
    target: str | None = None
    """the target, given or written"""


def attention_maps(folder: Path, question: Question) -> Maps:
    """Read a model folder and return where it looks. Raises UserError as `view_attention` says."""
    format, config = read_config(folder)
    limit = min(question.max_tokens, getattr(config, "max_seq_len", None) or question.max_tokens)
    for name, kinds in (("target", (EncoderDecoderConfig, RecurrentSeq2SeqConfig)), ("image", (DualEncoderConfig, VisionLanguageConfig))):
        if getattr(question, name) is not None and not isinstance(config, kinds):
            raise UserError(f"{folder} holds a model that takes no {name}; it goes with {format.used_by}. Leave --{name} out.")
    if isinstance(config, (DecoderConfig, EncoderConfig)):
        return _text_maps(load_model(folder).eval(), Tokenizer.load(folder), question.text, limit)
    if isinstance(config, (EncoderDecoderConfig, RecurrentSeq2SeqConfig)):
        return _pair_maps(Translator.load(folder), question, limit)
    if isinstance(config, DualEncoderConfig):
        return _image_maps(ImageTextModel.load(folder), question)
    if isinstance(config, VisionLanguageConfig):
        return _seeing_maps(folder, config, question)
    raise UserError(
        f"{folder} holds a model that does not attend; it goes with {format.used_by}. Name a Transformer, or one with attention."
    )


def _text_maps(model: nn.Module, tokenizer: Tokenizer, text: str, limit: int) -> Maps:
    """Return the self-attention of a decoder, or of an encoder with its marks around the text."""
    ids = _some(tokenizer.encode(text))
    before, behind = tokenizer.prefix_ids, []
    if isinstance(model, EncoderModel):
        tokens = encoder_tokens(tokenizer)
        before, behind = [tokens.cls], [tokens.sep]
    room = limit - len(before) - len(behind)
    row = [*before, *ids[:room], *behind]
    labels = token_labels(tokenizer, row)
    return Maps(_named(model.attention_weights(torch.tensor(row)), {"self": (labels, labels)}), _size(model), max(0, len(ids) - room))


def _pair_maps(translator: Translator, question: Question, limit: int) -> Maps:
    """Return the attention of an encoder-decoder between a source and a target."""
    model, marks, tokenizer = translator.model.eval(), translator.marks, translator.target_tokenizer
    ids = _some(translator.source_tokenizer.encode(question.text))
    source = [*ids[: limit - 1], marks.end_id]
    if question.target is None:
        params = SamplingParams(temperature=0.0, max_tokens=limit - 1)
        written = translator.write([source], params)[0].tokens
    else:
        written = tokenizer.encode(question.target)
    outputs = [*written[: limit - 1], marks.end_id]
    inputs = [marks.start_id, *outputs[:-1]]
    weights = model.attention_weights(torch.tensor(source), torch.tensor(inputs))
    if not weights:
        raise UserError("this encoder-decoder has no attention (attention=none): all that it keeps of a source is one state.")
    sources, outs, ins = (
        token_labels(translator.source_tokenizer, source),
        token_labels(tokenizer, outputs),
        token_labels(tokenizer, inputs),
    )
    sides = {"encoder": (sources, sources), "decoder": (ins, ins), "cross": (outs, sources)}
    cut = max(0, len(ids) - limit + 1) + max(0, len(written) - limit + 1)
    return Maps(
        _named(weights, sides), _size(model), cut, tokenizer.decode(written).strip() if question.target is None else question.target
    )


def _image_maps(towers: ImageTextModel, question: Question) -> Maps:
    """Return the attention of both towers of a CLIP."""
    _some(towers.tokenizer.encode(question.text))
    row = caption_rows(towers.tokenizer, towers.model.config.text, [question.text])[0]
    weights = towers.model.attention_weights(row, towers.processor([_image(question)])[0])
    places = ("image", *patch_labels(towers.model.config.vision))
    captions = token_labels(towers.tokenizer, row.tolist())
    return Maps(_named(weights, {"text": (captions, captions), "vision": (places, places)}), _size(towers.model))


def _seeing_maps(folder: Path, config: VisionLanguageConfig, question: Question) -> Maps:
    """Return the attention of a decoder that sees, over patches and question, and that of its vision tower."""
    tokenizer, processor = Tokenizer.load(folder), ImageProcessor.load(folder)
    processor.check_size(config.vision.image_size)
    pixels = processor([_image(question)])[0]
    _some(tokenizer.encode(question.text))
    row = question_tokens(tokenizer, config, question.text).tokens
    model = load_model(folder).eval()
    places = ("image", *patch_labels(config.vision))
    seen = iter(places if config.class_token else places[1:])
    labels = tuple(next(seen) if token == config.image_id else label for token, label in zip(row, token_labels(tokenizer, row)))
    weights = model.attention_weights(torch.tensor(row), pixels)
    return Maps(_named(weights, {"self": (labels, labels), "vision": (places, places)}), _size(model))


def patch_labels(vision: VisionConfig) -> list[str]:
    """Return how an image's patches are called: row and column, from the upper left."""
    across = vision.image_size // vision.patch_size
    return [f"{i + 1}.{j + 1}" for i in range(across) for j in range(across)]


def _image(question: Question) -> Path:
    if question.image is None:
        raise UserError("a model with a vision tower looks at an image too. Pass --image.")
    return question.image


def _named(weights: dict[str, torch.Tensor], sides: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> tuple[AttentionMap, ...]:
    return tuple(AttentionMap(name, TITLES[name], *sides[name], part.numpy()) for name, part in weights.items())


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise UserError("the text has no tokens. Pass --text with some words.")
    return ids


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def token_labels(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """Return how tokens are shown: a space as an open box, line ends as arrows, bytes that are no text in hexadecimal, marks by name."""
    labels = []
    for token_id in ids:
        data = tokenizer.token_bytes(token_id, skip_special=False)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = "⟨" + data.hex(" ") + "⟩"
        labels.append(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅")
    return tuple(labels)
