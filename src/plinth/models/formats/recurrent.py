"""Recurrent models as Plinth saves them: no other program has a format for them, so the names are our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn

from plinth.config import from_dict, to_dict
from plinth.models.formats.layout import Entry, Format
from plinth.models.meta import on_meta
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.models.recurrent_seq2seq import RecurrentSeq2Seq, RecurrentSeq2SeqConfig

HUB_FIELDS = {"tie_embeddings": "tie_word_embeddings", "num_layers": "num_hidden_layers"}  # ours → what config.json calls it


def own_format(config: type, model_type: str, architecture: str, build: Callable[[Any], nn.Module], used_by: str) -> Format:
    """Return the format of a family whose tensors are saved under our own names and whose config.json has our own fields."""

    def read_config(values: dict[str, Any]) -> Any:
        mine = {}
        for field in fields(config):
            name = HUB_FIELDS.get(field.name, field.name)
            if name not in values:
                raise KeyError(name)
            mine[field.name] = values[name]
        return from_dict(config, mine)

    def write_config(values: Any) -> dict[str, Any]:
        mine = {HUB_FIELDS.get(name, name): value for name, value in to_dict(values).items()}
        return {"architectures": [architecture], "model_type": model_type, **mine}

    def layout(values: Any) -> list[Entry]:
        state = on_meta(lambda: build(values)).state_dict()
        return [Entry(name, (name,), (tuple(tensor.shape),)) for name, tensor in state.items()]

    return Format(config, (model_type,), read_config, write_config, build, layout, used_by=used_by)


AWD_LSTM = own_format(AwdLstmConfig, "plinth_awd_lstm", "PlinthAwdLstm", AwdLstm, "plinth generate, transfer")
SEQ2SEQ = own_format(
    RecurrentSeq2SeqConfig, "plinth_recurrent_seq2seq", "PlinthRecurrentSeq2Seq", RecurrentSeq2Seq, "plinth translate, attend"
)
