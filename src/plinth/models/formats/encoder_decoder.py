"""Encoder-decoders as they are published: T5 and mT5 under T5's names, the Transformer of 2017 under Marian's."""

from __future__ import annotations

from typing import Any

from plinth.config import UserError
from plinth.models.encoder_decoder import EncoderDecoder
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.models.formats.layout import Entry, Format

T5_ACTS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "geglu": "gated-gelu"}  # activation → feed_forward_proj
MARIAN_ACTS = {"relu": "relu", "gelu": "gelu", "silu": "swish"}  # activation → activation_function
READ_ACTS = {"swish": "silu", "gated-gelu_new": "geglu"}  # other spellings


def read_config(values: dict[str, Any]) -> EncoderDecoderConfig:
    """Read config.json. Raises UserError that names a field whose value we cannot compute."""
    if values.get("quantization_config"):
        raise UserError("quantization_config is not supported. Use the fp32 or bf16 weights.")
    return _read_marian(values) if values["model_type"] == "marian" else _read_t5(values)


def write_config(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Return the contents of config.json as transformers reads it."""
    shape = {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.end_id,
        "decoder_start_token_id": config.start_id,
    }
    return shape | (_write_t5(config) if config.is_t5 else _write_marian(config))


def layout(config: EncoderDecoderConfig) -> list[Entry]:
    """Return every tensor of the model."""
    return _t5_layout(config) if config.is_t5 else _marian_layout(config)


def aliases(config: EncoderDecoderConfig) -> dict[str, str]:
    """Return the embeddings that are published more than once."""
    if config.is_t5:
        tied = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
        return tied | ({"lm_head.weight": "shared.weight"} if config.tie_embeddings else {})
    names = _marian_tables(config)
    tied = {f"model.{side}.embed_tokens.weight": names[0] for side in ("encoder", "decoder")} if len(names) == 1 else {}
    return tied | ({"lm_head.weight": names[-1]} if config.tie_embeddings else {})


def _act(values: dict[str, Any], name: str, default: str, known: dict[str, str]) -> str:
    found = values.get(name, default)
    ours = {theirs: own for own, theirs in known.items()} | {theirs: own for theirs, own in READ_ACTS.items() if own in known}
    if known is MARIAN_ACTS:
        ours["silu"] = "silu"
    if found not in ours:
        raise UserError(f"{name}={found!r} is not supported. Supported: {', '.join(sorted(ours))}.")
    return ours[found]


def _ids(values: dict[str, Any]) -> dict[str, int]:
    end = values["eos_token_id"]
    pad = values["pad_token_id"]
    start = values.get("decoder_start_token_id")
    return {"pad_id": pad, "start_id": pad if start is None else start, "end_id": end[0] if isinstance(end, list) else end}


def _unless_same(decoder: int | None, encoder: int) -> int | None:
    return None if decoder == encoder else decoder


def _read_t5(values: dict[str, Any]) -> EncoderDecoderConfig:
    tied = values.get("tie_word_embeddings", values["model_type"] == "t5")
    return EncoderDecoderConfig(
        style="t5",
        vocab_size=values["vocab_size"],
        hidden_size=values["d_model"],
        num_layers=values["num_layers"],
        num_decoder_layers=_unless_same(values.get("num_decoder_layers"), values["num_layers"]),
        num_heads=values["num_heads"],
        head_dim=values["d_kv"],
        intermediate_size=values["d_ff"],
        activation=_act(values, "feed_forward_proj", "relu", T5_ACTS),  # type: ignore[arg-type]
        max_seq_len=values.get("n_positions", 512),
        dropout=values.get("dropout_rate", 0.1),
        norm_eps=values.get("layer_norm_epsilon", 1e-6),
        # transformers 5 writes tie_word_embeddings=true always, and in a field of its own what it meant.
        tie_embeddings=bool(values.get("scale_decoder_outputs", tied)),
        relative_buckets=values.get("relative_attention_num_buckets", 32),
        relative_max_distance=values.get("relative_attention_max_distance", 128),
        **_ids(values),
    )


def _write_t5(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "feed_forward_proj": T5_ACTS[config.activation],
        "n_positions": config.max_seq_len,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
    }


def _t5_layout(config: EncoderDecoderConfig) -> list[Entry]:
    D, W, F = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    small = config.query_scale  # what T5 does not scale the scores by
    entries = [Entry("embed.weight", ("shared.weight",), ((config.vocab_size, D),))]
    for side, count in (("encoder", config.num_layers), ("decoder", config.decoder_layers)):
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        entries.append(Entry(f"{side}.bias.table.weight", (bias,), ((config.relative_buckets, config.num_heads),)))
        entries.append(Entry(f"{side}.final_norm.weight", (f"{side}.final_layer_norm.weight",), ((D,),)))
        for i in range(count):
            ours, theirs, last = f"{side}.layers.{i}", f"{side}.block.{i}.layer", 2 if side == "decoder" else 1
            norms = {"attention_norm": 0, "cross_norm": 1, "mlp_norm": 2} if last == 2 else {"attention_norm": 0, "mlp_norm": 1}
            entries += [Entry(f"{ours}.{norm}.weight", (f"{theirs}.{place}.layer_norm.weight",), ((D,),)) for norm, place in norms.items()]
            own = f"{theirs}.0.SelfAttention"
            entries.append(
                Entry(
                    f"{ours}.attention.qkv.weight",
                    tuple(f"{own}.{part}.weight" for part in "qkv"),
                    ((W, D),) * 3,
                    factors=(small, 1.0, 1.0),
                )
            )
            entries.append(Entry(f"{ours}.attention.out.weight", (f"{own}.o.weight",), ((D, W),)))
            if last == 2:
                cross = f"{theirs}.1.EncDecAttention"
                entries.append(Entry(f"{ours}.cross.q.weight", (f"{cross}.q.weight",), ((W, D),), factors=(small,)))
                entries.append(Entry(f"{ours}.cross.kv.weight", (f"{cross}.k.weight", f"{cross}.v.weight"), ((W, D),) * 2))
                entries.append(Entry(f"{ours}.cross.out.weight", (f"{cross}.o.weight",), ((D, W),)))
            mlp = f"{theirs}.{last}.DenseReluDense"
            rows = ("gate_up", ("wi_0", "wi_1")) if config.is_gated else ("up", ("wi",))
            entries.append(Entry(f"{ours}.mlp.{rows[0]}.weight", tuple(f"{mlp}.{w}.weight" for w in rows[1]), ((F, D),) * len(rows[1])))
            entries.append(Entry(f"{ours}.mlp.down.weight", (f"{mlp}.wo.weight",), ((D, F),)))
    if not config.tie_embeddings:
        entries.append(Entry("head.weight", ("lm_head.weight",), ((config.vocab_size, D),)))
    return entries


def _read_marian(values: dict[str, Any]) -> EncoderDecoderConfig:
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = values[f"encoder_{name}"], values[f"decoder_{name}"]
        if encoder != decoder:
            raise UserError(f"encoder_{name}={encoder} and decoder_{name}={decoder} differ; that is not supported.")
    heads, shared = values["encoder_attention_heads"], values.get("share_encoder_decoder_embeddings", True)
    return EncoderDecoderConfig(
        style="transformer",
        vocab_size=values["vocab_size"],
        target_vocab_size=None if shared else values["decoder_vocab_size"],
        hidden_size=values["d_model"],
        num_layers=values["encoder_layers"],
        num_decoder_layers=_unless_same(values["decoder_layers"], values["encoder_layers"]),
        num_heads=heads,
        head_dim=values["d_model"] // heads,
        intermediate_size=values["encoder_ffn_dim"],
        activation=_act(values, "activation_function", "gelu", MARIAN_ACTS),  # type: ignore[arg-type]
        max_seq_len=values.get("max_position_embeddings", 1024),
        dropout=values.get("dropout", 0.1),
        tie_embeddings=values.get("tie_word_embeddings", True),
        scale_embedding=values.get("scale_embedding", False),
        output_bias=values.get("plinth_output_bias", True),
        **_ids(values),
    )


def _write_marian(config: EncoderDecoderConfig) -> dict[str, Any]:
    if config.activation not in MARIAN_ACTS:
        raise UserError(f"activation={config.activation!r} has no place in Marian's format. Use one of {', '.join(MARIAN_ACTS)}.")
    if config.norm_eps != 1e-5:
        raise UserError(f"norm_eps={config.norm_eps} has no place in Marian's format, which has 1e-5.")
    each = {"encoder": config.num_layers, "decoder": config.decoder_layers}
    return {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "decoder_vocab_size": config.output_size,
        "share_encoder_decoder_embeddings": config.target_vocab_size is None,
        **{f"{side}_layers": count for side, count in each.items()},
        **{f"{side}_attention_heads": config.num_heads for side in each},
        **{f"{side}_ffn_dim": config.intermediate_size for side in each},
        "activation_function": MARIAN_ACTS[config.activation],
        "max_position_embeddings": config.max_seq_len,
        "dropout": config.dropout,
        "scale_embedding": config.scale_embedding,
        "forced_eos_token_id": None,
        "plinth_output_bias": config.output_bias,
    }


def _marian_tables(config: EncoderDecoderConfig) -> tuple[str, ...]:
    """Return the published names of the embeddings: one for both sides, or the source's and the target's."""
    if config.target_vocab_size is None:
        return ("model.shared.weight",)
    return ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")


def _marian_layout(config: EncoderDecoderConfig) -> list[Entry]:
    D, F, tables = config.hidden_size, config.intermediate_size, _marian_tables(config)
    entries = [Entry("embed.weight", (tables[0],), ((config.vocab_size, D),))]
    if len(tables) == 2:
        entries.append(Entry("target_embed.weight", (tables[1],), ((config.output_size, D),)))
    for side, count in (("encoder", config.num_layers), ("decoder", config.decoder_layers)):
        for i in range(count):
            ours, theirs = f"{side}.layers.{i}", f"model.{side}.layers.{i}"
            entries += _affine(f"{ours}.attention.qkv", [f"{theirs}.self_attn.{part}_proj" for part in "qkv"], (D, D))
            entries += _affine(f"{ours}.attention.out", [f"{theirs}.self_attn.out_proj"], (D, D))
            entries += _affine(f"{ours}.attention_norm", [f"{theirs}.self_attn_layer_norm"], (D,))
            if side == "decoder":
                cross = f"{theirs}.encoder_attn"
                entries += _affine(f"{ours}.cross.q", [f"{cross}.q_proj"], (D, D))
                entries += _affine(f"{ours}.cross.kv", [f"{cross}.k_proj", f"{cross}.v_proj"], (D, D))
                entries += _affine(f"{ours}.cross.out", [f"{cross}.out_proj"], (D, D))
                entries += _affine(f"{ours}.cross_norm", [f"{cross}_layer_norm"], (D,))
            entries += _affine(f"{ours}.mlp.up", [f"{theirs}.fc1"], (F, D))
            entries += _affine(f"{ours}.mlp.down", [f"{theirs}.fc2"], (D, F))
            entries += _affine(f"{ours}.mlp_norm", [f"{theirs}.final_layer_norm"], (D,))
    if not config.tie_embeddings:
        entries.append(Entry("head.weight", ("lm_head.weight",), ((config.output_size, D),)))
    fixed = None if config.output_bias else 0.0
    return [*entries, Entry("head_bias", ("final_logits_bias",), ((1, config.output_size),), constant=fixed)]


def _affine(ours: str, theirs: list[str], shape: tuple[int, ...]) -> list[Entry]:
    """Return the entries of a matrix or norm and its bias; several published ones make a fused one."""
    count = len(theirs)
    return [
        Entry(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), (shape,) * count),
        Entry(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), (shape[:1],) * count),
    ]


FORMAT = Format(
    config=EncoderDecoderConfig,
    model_types=("t5", "mt5", "marian"),
    read_config=read_config,
    write_config=write_config,
    build=EncoderDecoder,
    layout=layout,
    ignored=(
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # old T5 files hold it; nothing reads it
        r"model\.(encoder|decoder)\.embed_positions\.weight",  # sinusoids
    ),
    aliases=aliases,
    used_by="plinth translate",
    generates=True,
)
