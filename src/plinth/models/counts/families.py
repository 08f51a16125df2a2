"""Which published architectures are counted: model_type of config.json → its closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from plinth.config import UserError, nearest
from plinth.models.counts import decoders, encoders, images, recurrent
from plinth.models.counts.blocks import Values
from plinth.models.counts.ledger import Ledger

COUNTED: Mapping[str, Callable[[Values], Ledger]] = {
    "bart": encoders.bart,
    "bert": encoders.bert,
    "bloom": decoders.bloom,
    "clip": images.clip,
    "cohere": decoders.cohere,
    "deepseek_v2": decoders.deepseek,
    "deepseek_v3": decoders.deepseek,
    "distilbert": encoders.distilbert,
    "electra": encoders.electra,
    "esm": encoders.esm,
    "falcon": decoders.falcon,
    "gemma": decoders.gemma,
    "gemma2": decoders.gemma2,
    "gemma3_text": decoders.gemma3,
    "gpt2": decoders.gpt2,
    "gpt_neox": decoders.gpt_neox,
    "gpt_oss": decoders.gpt_oss,
    "gptj": decoders.gptj,
    "granite": decoders.llama,
    "llama": decoders.llama,
    "llava": lambda values: images.llava(values, count),
    "marian": encoders.marian,
    "mistral": decoders.mistral,
    "mixtral": decoders.mixtral,
    "modernbert": encoders.modernbert,
    "mpt": decoders.mpt,
    "mt5": encoders.t5,
    "olmo": decoders.olmo,
    "olmo2": decoders.olmo2,
    "olmoe": decoders.olmoe,
    "opt": decoders.opt,
    "phi": decoders.phi,
    "phi3": decoders.phi3,
    "plinth": decoders.plinth,
    "plinth_awd_lstm": recurrent.awd_lstm,
    "plinth_recurrent_seq2seq": recurrent.seq2seq,
    "qwen2": decoders.qwen2,
    "qwen2_moe": decoders.qwen2_moe,
    "qwen3": decoders.qwen3,
    "qwen3_moe": decoders.qwen3_moe,
    "roberta": encoders.roberta,
    "smollm3": decoders.llama,
    "starcoder2": decoders.starcoder2,
    "t5": encoders.t5,
    "vit": images.vit,
    "xlm-roberta": encoders.roberta,
}


def count(values: Values) -> Ledger:
    """Return the ledger of the model that a config.json describes.

    Raises UserError for an architecture that is not counted, with the list of those that are, and for a size that is missing or no size.
    """
    kind = str(values.get("model_type"))
    if kind not in COUNTED:
        raise UserError(f"model_type={kind!r} is not counted.{nearest(kind, COUNTED)} Counted: {', '.join(COUNTED)}.")
    return COUNTED[kind](values)
