"""BERT and ELECTRA as they are published, with each of their heads."""

from __future__ import annotations

from typing import Any

from plinth.config import UserError
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.formats.layout import Entry, Format
from plinth.models.meta import on_meta

ARCHITECTURES = {  # family → architecture → head
    "bert": {
        "BertModel": "none",
        "BertForMaskedLM": "mlm",
        "BertForPreTraining": "mlm",
        "BertForSequenceClassification": "classify",
        "BertForTokenClassification": "tag",
        "BertForQuestionAnswering": "answer",
    },
    "electra": {
        "ElectraModel": "none",
        "ElectraForMaskedLM": "mlm",
        "ElectraForPreTraining": "rtd",
        "ElectraForSequenceClassification": "classify",
        "ElectraForTokenClassification": "tag",
        "ElectraForQuestionAnswering": "answer",
    },
}
HIDDEN_ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
PUBLISHED_ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
UNSUPPORTED = {  # fields that change the arithmetic in ways that the encoder does not have → values that are fine
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "quantization_config": (),
    "problem_type": ("single_label_classification",),
}

# Our module → the published one, within a block and outside; the fused projection stands for three.
BLOCK_NAMES = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
BODY_NAMES = {
    "encoder.embed.tokens": "embeddings.word_embeddings",
    "encoder.embed.positions": "embeddings.position_embeddings",
    "encoder.embed.segments": "embeddings.token_type_embeddings",
    "encoder.embed.norm": "embeddings.LayerNorm",
    "encoder.project": "embeddings_project",
    "pooler": "pooler.dense",
}
HEAD_NAMES = {
    ("bert", "mlm"): {
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.decoder": "cls.predictions.decoder",
        "head": "cls.predictions",
    },
    ("electra", "mlm"): {
        "head.dense": "generator_predictions.dense",
        "head.norm": "generator_predictions.LayerNorm",
        "head.decoder": "generator_lm_head",
        "head": "generator_lm_head",
    },
    ("electra", "rtd"): {"head.dense": "discriminator_predictions.dense", "head.out": "discriminator_predictions.dense_prediction"},
    ("bert", "classify"): {"head.out": "classifier"},
    ("electra", "classify"): {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
    ("bert", "tag"): {"head": "classifier"},
    ("electra", "tag"): {"head": "classifier"},
    ("bert", "answer"): {"head": "qa_outputs"},
    ("electra", "answer"): {"head": "qa_outputs"},
}


def read_config(values: dict[str, Any]) -> EncoderConfig:
    """Read config.json. Raises UserError that names a field whose value the encoder cannot compute."""
    family = values["model_type"]
    for name, fine in UNSUPPORTED.items():
        if values.get(name) is not None and values[name] not in fine:
            raise UserError(f"{name}={values[name]!r} is not supported. {f'Supported: {fine[0]}.' if fine else 'Use a model without it.'}")
    head = _head(values, family)
    activation = values.get("hidden_act", "gelu")
    if activation not in HIDDEN_ACTS:
        raise UserError(f"hidden_act={activation!r} is not supported. Supported: {', '.join(HIDDEN_ACTS)}.")
    is_labelled = head in ("classify", "tag")
    try:
        return EncoderConfig(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            intermediate_size=values["intermediate_size"],
            max_seq_len=values["max_position_embeddings"],
            num_segments=values.get("type_vocab_size", 2),
            embedding_size=values.get("embedding_size") if family == "electra" else None,
            activation=HIDDEN_ACTS[activation],
            norm_eps=values.get("layer_norm_eps", 1e-12),
            tie_embeddings=values.get("tie_word_embeddings", True),
            pad_id=values.get("pad_token_id") or 0,
            pooler=family == "bert" and head in ("none", "classify") and values.get("plinth_pooler", True),
            head=head,
            labels=_labels(values) if is_labelled else (),
            published_as=family,
        )
    except KeyError as error:
        raise UserError(f"config.json lacks {error}; a configuration of {family} needs it.") from None


def _head(values: dict[str, Any], family: str) -> Any:
    known = ARCHITECTURES[family]
    name = (values.get("architectures") or [next(iter(known))])[0]
    if name not in known:
        raise UserError(f"architectures={name!r} is not supported. Supported for model_type {family}: {', '.join(known)}.")
    return known[name]


def _labels(values: dict[str, Any]) -> tuple[str, ...]:
    names = values.get("id2label")
    if names:
        return tuple(names[key] for key in sorted(names, key=int))
    return tuple(f"LABEL_{i}" for i in range(values.get("num_labels", 2)))


def write_config(config: EncoderConfig) -> dict[str, Any]:
    """Return the contents of config.json."""
    family = config.published_as
    name = next(name for name, head in ARCHITECTURES[family].items() if head == config.head)
    values: dict[str, Any] = {
        "architectures": [name],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_seq_len,
        "type_vocab_size": config.num_segments,
        "hidden_act": PUBLISHED_ACTS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "pad_token_id": config.pad_id,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if family == "electra":
        values["embedding_size"] = config.embedding_width
    elif config.head == "none":
        values["plinth_pooler"] = config.pooler
    if config.labels:
        values["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        values["label2id"] = {label: i for i, label in enumerate(config.labels)}
    return values | ({"problem_type": "single_label_classification"} if config.head == "classify" else {})


def layout(config: EncoderConfig) -> list[Entry]:
    """Return every tensor of the encoder and its head."""
    model = on_meta(lambda: EncoderModel(config))
    fused, entries = model.matrix_parts(), []
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        rows = fused.get(f"{module}.weight", ()) if module.endswith("qkv") else (tensor.shape[0],)
        published = tuple(f"{each}.{kind}" for each in _published(config, module))
        if name == "head.bias" and config.head == "mlm" and not config.tie_embeddings:
            published = tuple(each.replace("cls.predictions.bias", "cls.predictions.decoder.bias") for each in published)
        entries.append(Entry(name, published, tuple((count, *tensor.shape[1:]) for count in rows)))
    return entries


def _published(config: EncoderConfig, module: str) -> tuple[str, ...]:
    prefix = "" if config.head == "none" else f"{config.published_as}."
    if module.startswith("encoder.layers."):
        _, _, layer, rest = module.split(".", 3)
        return tuple(f"{prefix}encoder.layer.{layer}.{name}" for name in BLOCK_NAMES[rest])
    if module in BODY_NAMES:
        return (prefix + BODY_NAMES[module],)
    return (HEAD_NAMES[config.published_as, config.head][module],)


def aliases(config: EncoderConfig) -> dict[str, str]:
    """Return what is published twice where the masked-token head is tied to the embeddings."""
    if config.head != "mlm" or not config.tie_embeddings:
        return {}
    family = config.published_as
    embedding = f"{family}.embeddings.word_embeddings.weight"
    if family == "electra":
        return {"generator_lm_head.weight": embedding}
    return {"cls.predictions.decoder.weight": embedding, "cls.predictions.decoder.bias": "cls.predictions.bias"}


FORMAT = Format(
    config=EncoderConfig,
    model_types=tuple(ARCHITECTURES),
    read_config=read_config,
    write_config=write_config,
    build=EncoderModel,
    layout=layout,
    # BERT was published with the head of next-sentence prediction, which has no use after pretraining.
    ignored=(r"(.*\.)?embeddings\.position_ids", r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r"cls\.predictions\.bias"),
    aliases=aliases,
    renamed=((r"(.*LayerNorm)\.gamma", r"\1.weight"), (r"(.*LayerNorm)\.beta", r"\1.bias")),  # as the first checkpoints have it
    used_by="plinth fill, embed, finetune, predict",
)
