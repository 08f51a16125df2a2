"""Text classifiers on a language model, as Plinth saves them: the trunk under its family's names behind "trunk.", the head under ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plinth.config import UserError, from_dict, to_dict
from plinth.models.formats import decoder, recurrent
from plinth.models.formats.layout import Entry, Format
from plinth.models.meta import on_meta
from plinth.models.text_classifier import LANGUAGE_MODEL_ONLY, PooledHeadConfig, TextClassifier, TextClassifierConfig

MODEL_TYPE = "plinth_text_classifier"
TRUNKS = (decoder.FORMAT, recurrent.AWD_LSTM)


def read_config(values: dict[str, Any]) -> TextClassifierConfig:
    """Return the configuration of a config.json."""
    kind = values["trunk"]["model_type"]
    format = next((format for format in TRUNKS if kind in format.model_types), None)
    if format is None:
        raise UserError(f"the trunk's model_type={kind!r} is not supported.")
    head = from_dict(PooledHeadConfig, values["head"], "head.")
    return TextClassifierConfig(format.read_config(values["trunk"]), tuple(values["labels"]), head)


def write_config(config: TextClassifierConfig) -> dict[str, Any]:
    """Return what config.json says; the trunk's own is under "trunk"."""
    return {
        "architectures": ["PlinthTextClassifier"],
        "model_type": MODEL_TYPE,
        "trunk": _trunk(config).write_config(config.trunk),
        "labels": list(config.labels),
        "head": to_dict(config.head),
    }


def layout(config: TextClassifierConfig) -> list[Entry]:
    """Return the trunk's entries, but for its scores of the vocabulary, and the head's parameters and statistics."""
    trunk = [
        replace(entry, name=f"trunk.{entry.name}", published=tuple(f"trunk.{name}" for name in entry.published))
        for entry in _trunk(config).layout(config.trunk)
        if entry.name not in LANGUAGE_MODEL_ONLY
    ]
    head = on_meta(lambda: TextClassifier(config)).head.state_dict(prefix="head.")
    return trunk + [Entry(name, (name,), (tuple(tensor.shape),)) for name, tensor in head.items()]


def _trunk(config: TextClassifierConfig) -> Format:
    return next(format for format in TRUNKS if format.config is type(config.trunk))


FORMAT = Format(TextClassifierConfig, (MODEL_TYPE,), read_config, write_config, TextClassifier, layout, used_by="plinth predict")
