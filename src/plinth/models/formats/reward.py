"""Reward models as they are published: transformers' <family>ForSequenceClassification with one label, without a bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plinth.config import UserError
from plinth.models.formats import decoder
from plinth.models.formats.layout import Entry, Format
from plinth.models.reward import RewardConfig, RewardModel

TASK = "ForSequenceClassification"
OTHER_NAMES = {"Gemma3ForCausalLM": f"Gemma3Text{TASK}"}  # the plain name is that of the one that sees images
BIAS = "plinth_reward_bias"


def read_config(values: dict[str, Any]) -> RewardConfig:
    """Return the configuration; raises UserError for a classifier of more labels than one."""
    labels = values.get("num_labels") or len(values.get("id2label") or "01")
    if labels != 1:
        raise UserError(f"a classifier of {labels} labels is not supported. Use a reward model, which has num_labels=1.")
    return RewardConfig(decoder.FORMAT.read_config(values), float(values.get(BIAS, 0.0)))


def write_config(config: RewardConfig) -> dict[str, Any]:
    """Return the contents of config.json; what is added to every score is a field of ours, which leaves comparisons as they are."""
    values = decoder.FORMAT.write_config(config.decoder)
    causal = values["architectures"][0]
    name = OTHER_NAMES.get(causal) or causal.replace("ForCausalLM", TASK).replace("LMHeadModel", TASK)
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}
    return values | {"architectures": [name], BIAS: config.bias} | labels


def layout(config: RewardConfig) -> list[Entry]:
    """Return every tensor: the decoder's but its head, and the head of one number, which takes the output multiplier."""
    width, factor = config.decoder.hidden_size, config.decoder.output_multiplier
    entries = [replace(entry, name=f"trunk.{entry.name}") for entry in decoder.layout(config.decoder) if entry.name != "head.weight"]
    folds = any(entry.factors for entry in entries)
    return [*entries, Entry("score.weight", ("score.weight",), ((1, width),), factors=(factor,) if folds else ())]


FORMAT = Format(
    config=RewardConfig,
    model_types=decoder.FORMAT.model_types,
    architecture=TASK,
    read_config=read_config,
    write_config=write_config,
    build=RewardModel,
    layout=layout,
    ignored=decoder.IGNORED,
    renamed=decoder.RENAMED,
    used_by="plinth reward score",
)
