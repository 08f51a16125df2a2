"""Closed forms of published decoders, each from the values of its config.json; absent values are the architecture's defaults."""

from __future__ import annotations

from dataclasses import replace

from plinth.models.counts.blocks import (
    Values,
    Widths,
    all_heads,
    attention,
    causal_groups,
    either,
    experts,
    feed_forward,
    need,
    widths,
    windows,
)
from plinth.models.counts.ledger import Attending, Ledger, Piece, head, linear, lookup, norms


def decoder(
    values: Values,
    size: Widths,
    layers: list[Piece],
    *,
    tied: bool,
    norm_bias: bool = False,
    final_norm: bool = True,
    positions: int = 0,
    head_bias: bool = False,
    sliding: int = 0,
    window: int | None = None,
    attending: tuple[Attending, ...] | None = None,
    longest: str = "max_position_embeddings",
) -> Ledger:
    """Return the ledger of blocks between an embedding and a head; `tied` where config.json does not say."""
    (vocab_size,) = need(values, "vocab_size")
    pieces = [lookup("token embedding", vocab_size, size.hidden_size)]
    pieces += [lookup("position embedding", positions, size.hidden_size)] if positions else []
    pieces += layers
    pieces += norms("final norm", size.hidden_size, bias=norm_bias) if final_norm else []
    pieces += head(vocab_size, size.hidden_size, tied=either(values, "tie_word_embeddings", tied), bias=head_bias)
    attending = attending or causal_groups(size, windows(values, size.layers, sliding, window))
    return Ledger(tuple(pieces), attending, max_seq_len=values.get(longest), vocab_size=vocab_size)


def llama(values: Values, *, qk_norm: str | None = None, tied: bool = False, num_norms: int = 2, **more) -> Ledger:
    """Count Llama's shape: RMSNorm, rotary positions, gated feed-forward layer, grouped queries; and its many relatives."""
    size = widths(values)
    bias = either(values, "attention_bias", False)
    layers = norms("norms", size.hidden_size, num_norms * size.layers) if num_norms else []
    layers += attention(size, bias=bias, qk_norm=qk_norm) + feed_forward(size, bias=either(values, "mlp_bias", False))
    return decoder(values, size, layers, tied=tied, **more)


def mistral(values: Values) -> Ledger:
    window = values.get("sliding_window")
    return llama(values, sliding=widths(values).layers, window=window)


def qwen2(values: Values) -> Ledger:
    """Count Qwen2 and 2.5: biases on queries, keys and values; the layers from max_window_layers on may slide."""
    size = widths(values)
    layers = norms("norms", size.hidden_size, 2 * size.layers) + attention(size, bias=True, out_bias=False) + feed_forward(size)
    return decoder(values, size, layers, tied=False, **late_window(values, size))


def late_window(values: Values, size: Widths) -> dict[str, int | None]:
    """Return how many of Qwen's last layers slide, and their window."""
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    return {"sliding": max(0, size.layers - either(values, "max_window_layers", 28)), "window": window}


def qwen3(values: Values) -> Ledger:
    """Count Qwen3, and the default decoder, whose shape it is."""
    values = {"head_dim": 128, **values}
    return llama(values, qk_norm="head", **late_window(values, widths(values)))


def plinth(values: Values) -> Ledger:
    """Count a decoder of ours that no published format holds: the options by which families differ, and those that only Plinth reads.

    Scales of norms are counted as they are saved, also where they were not trained.
    """
    size = widths(values)
    own = {name.removeprefix("plinth_"): value for name, value in values.items() if name.startswith("plinth_") and value is not None}
    norm_bias = own.get("norm", "rms") == "layer"
    layers = norms("norms", size.hidden_size, (4 if own.get("post_norms") else 2) * size.layers, bias=norm_bias)
    layers += attention(size, bias=bool(own.get("qkv_bias")), out_bias=bool(own.get("out_bias")))
    if own.get("qk_norm", True):
        layers += norms("query and key norms", size.head_dim, 2 * size.layers, bias=norm_bias)
    layers += plinth_feed_forward(own, size)
    if own.get("residual_scalars"):
        layers.append(Piece("factors on the residual stream", (2,), "other", size.layers))
    if own.get("value_embeddings"):
        count, channels = (size.layers + 1) // 2, min(12, size.hidden_size)
        layers.append(Piece("value embedding", (need(values, "vocab_size")[0], size.kv_width), "lookup", count))
        layers += linear("value gate", channels, size.kv_heads, count)
    pattern = own.get("window_layers") or [True]
    sliding = sum(bool(pattern[i % len(pattern)]) for i in range(size.layers))
    positions = values["max_position_embeddings"] if own.get("position") == "learned" else 0
    window = own.get("sliding_window")
    return decoder(values, size, layers, tied=False, norm_bias=norm_bias, positions=positions, sliding=sliding, window=window)


def plinth_feed_forward(own: Values, size: Widths) -> list[Piece]:
    """Return the feed-forward layers of a decoder of ours, those that are mixtures of experts among them."""
    gated, bias = own.get("activation", "swiglu") in ("swiglu", "geglu"), bool(own.get("mlp_bias"))
    count = own.get("num_experts", 0)
    if not count:
        return feed_forward(size, gated=gated, bias=bias)
    dense = len(own.get("dense_layers", ()))
    inner, shared = own.get("expert_intermediate_size") or size.intermediate_size, own.get("shared_expert_intermediate_size", 0)
    pieces = experts(size, count, own.get("num_active_experts", 2), inner, size.layers - dense, shared_inner=shared)
    pieces += linear("shared expert's gate", size.hidden_size, 1, size.layers - dense) if own.get("shared_expert_gate") else []
    return pieces + (feed_forward(size, gated=gated, bias=bias, layers=dense) if dense else [])


def gemma(values: Values) -> Ledger:
    return llama({"head_dim": 256, **values}, tied=True)


def gemma2(values: Values) -> Ledger:
    """Count Gemma 2: four norms a block; every other layer, from the first on, slides."""
    values = {"head_dim": 256, **values}
    layers = widths(values).layers
    return llama(values, tied=True, num_norms=4, sliding=(layers + 1) // 2, window=either(values, "sliding_window", 4096))


def gemma3(values: Values) -> Ledger:
    """Count Gemma 3's text model: four norms a block, normalised queries and keys; all but every sixth layer slide."""
    values = {"head_dim": 256, **values}
    layers = widths(values).layers
    sliding = layers - layers // either(values, "sliding_window_pattern", 6)
    window = either(values, "sliding_window", 4096)
    return llama(values, tied=True, num_norms=4, qk_norm="head", sliding=sliding, window=window)


def phi3(values: Values) -> Ledger:
    return llama(values, sliding=widths(values).layers, window=values.get("sliding_window"))


def olmo(values: Values) -> Ledger:
    """Count the first OLMo, whose norms have no scales."""
    return llama(values, num_norms=0, final_norm=False)


def olmo2(values: Values) -> Ledger:
    return llama(values, qk_norm="full")


def mixtral(values: Values) -> Ledger:
    size = widths(values)
    count, active = either(values, "num_local_experts", 8), either(values, "num_experts_per_tok", 2)
    layers = norms("norms", size.hidden_size, 2 * size.layers) + attention(size)
    layers += experts(size, count, active, size.intermediate_size, size.layers)
    return decoder(values, size, layers, tied=False, sliding=size.layers, window=values.get("sliding_window"))


def olmoe(values: Values) -> Ledger:
    size = widths(values)
    count, active = either(values, "num_experts", 64), either(values, "num_experts_per_tok", 8)
    layers = norms("norms", size.hidden_size, 2 * size.layers) + attention(size, qk_norm="full")
    return decoder(values, size, layers + experts(size, count, active, size.intermediate_size, size.layers), tied=False)


def sparse_layers(values: Values, layers: int) -> int:
    """Return how many of Qwen's blocks have experts: each decoder_sparse_step-th that mlp_only_layers does not name."""
    step, dense = either(values, "decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    return sum((i + 1) % step == 0 and i not in dense for i in range(layers))


def qwen_moe(values: Values, *, qk_norm: str | None, qkv_bias: bool, shared: bool) -> Ledger:
    """Count Qwen's mixtures: blocks with experts among dense ones; Qwen2's have a shared expert behind a gate of one number."""
    size = widths(values)
    sparse = sparse_layers(values, size.layers)
    count, active, inner = need(values, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    shared_inner = need(values, "shared_expert_intermediate_size")[0] if shared else 0
    layers = norms("norms", size.hidden_size, 2 * size.layers) + attention(size, bias=qkv_bias, out_bias=False, qk_norm=qk_norm)
    layers += experts(size, count, active, inner, sparse, shared_inner=shared_inner)
    layers += linear("shared expert's gate", size.hidden_size, 1, sparse) if shared else []
    layers += feed_forward(size, layers=size.layers - sparse) if sparse < size.layers else []
    return decoder(values, size, layers, tied=False, **late_window(values, size))


def qwen2_moe(values: Values) -> Ledger:
    return qwen_moe(values, qk_norm=None, qkv_bias=either(values, "qkv_bias", True), shared=True)


def qwen3_moe(values: Values) -> Ledger:
    return qwen_moe(values, qk_norm="head", qkv_bias=either(values, "attention_bias", False), shared=False)


def gpt_oss(values: Values) -> Ledger:
    """Count gpt-oss: experts with biases, a learnt sink a head, every other layer slides."""
    size = widths({"head_dim": 64, **values})
    count, active = either(values, "num_local_experts", 128), either(values, "num_experts_per_tok", 4)
    layers = norms("norms", size.hidden_size, 2 * size.layers) + attention(size, bias=either(values, "attention_bias", True))
    layers.append(Piece("attention sinks", (size.heads,), "other", size.layers))
    layers += experts(size, count, active, size.intermediate_size, size.layers, bias=True)
    window = either(values, "sliding_window", 128)
    return decoder(values, size, layers, tied=False, sliding=(size.layers + 1) // 2, window=window)


def deepseek(values: Values) -> Ledger:
    """Count DeepSeek-V2 and V3: multi-head latent attention, dense blocks first, then experts with shared ones.

    Not counted, as transformers does not load it: V3's additional block that predicts one token more.
    """
    size = widths(values)
    count, active, inner = need(values, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    dense = min(size.layers, either(values, "first_k_dense_replace", 3))
    layers = norms("norms", size.hidden_size, 2 * size.layers) + latent_attention(values, size)
    layers += feed_forward(size, layers=dense) if dense else []
    shared = either(values, "n_shared_experts", 0) * inner
    layers += experts(size, count, active, inner, size.layers - dense, shared_inner=shared)
    latent, rope, nope, value = need(values, "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    group = Attending("latent attention", size.layers, size.heads, nope + rope + value, latent + rope, size.hidden_size)
    return decoder(values, size, layers, tied=False, attending=(group,))


def latent_attention(values: Values, size: Widths) -> list[Piece]:
    """Return multi-head latent attention: queries, keys and values from narrow latents; keys share one rotary part."""
    latent, rope, nope, value = need(values, "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    hidden, layers, rank = size.hidden_size, size.layers, values.get("q_lora_rank")
    queries = size.heads * (nope + rope)
    if rank is None:
        pieces = linear("query", hidden, queries, layers)
    else:
        pieces = linear("query down", hidden, rank, layers) + norms("query norm", rank, layers) + linear("query up", rank, queries, layers)
    pieces += linear("key and value down", hidden, latent + rope, layers) + norms("latent norm", latent, layers)
    pieces += linear("key and value up", latent, size.heads * (nope + value), layers)
    return pieces + linear("attention output", size.heads * value, hidden, layers)


def usual_names(values: Values, **names: str) -> dict:
    """Return the values with those of an older architecture under their usual names too."""
    return {**values, **{usual: values.get(old) for usual, old in names.items()}}


def biased(
    values: Values, *, num_norms: int = 2, attention_bias: bool = True, head_bias: bool = False, tied: bool = True, **more
) -> Ledger:
    """Count the older shape: LayerNorm, biases throughout, a feed-forward layer without a gate."""
    size = widths(values)
    layers = norms("norms", size.hidden_size, num_norms * size.layers, bias=True) + attention(size, bias=attention_bias)
    layers += feed_forward(size, gated=False, bias=True)
    return decoder(values, size, layers, tied=tied, norm_bias=True, head_bias=head_bias, **more)


def gpt2_values(values: Values, positions: int) -> dict:
    values = {"n_positions": positions, **values}
    values = usual_names(
        values, num_hidden_layers="n_layer", hidden_size="n_embd", num_attention_heads="n_head", max_position_embeddings="n_positions"
    )
    return {**values, "intermediate_size": values.get("n_inner") or 4 * (values["hidden_size"] or 0)}


def gpt2(values: Values) -> Ledger:
    values = gpt2_values(values, 1024)
    return biased(values, positions=values["max_position_embeddings"])


def gptj(values: Values) -> Ledger:
    """Count GPT-J: one norm a block, attention without biases, a head of its own with one."""
    return biased(gpt2_values(values, 2048), num_norms=1, attention_bias=False, head_bias=True, tied=False)


def gpt_neox(values: Values) -> Ledger:
    return biased(all_heads(values), attention_bias=either(values, "attention_bias", True), tied=False)


def phi(values: Values) -> Ledger:
    return biased(values, num_norms=1, head_bias=True, tied=False)


def starcoder2(values: Values) -> Ledger:
    return biased(values, sliding=widths(values).layers, window=values.get("sliding_window"))


def opt(values: Values) -> Ledger:
    """Count OPT: two positions more than the context; the 350 M model embeds narrower than its blocks and has no last norm."""
    values = {**all_heads(values), "intermediate_size": values.get("ffn_dim")}
    size = widths(values)
    narrow = either(values, "word_embed_proj_dim", size.hidden_size)
    longest = either(values, "max_position_embeddings", 2048)
    before = either(values, "do_layer_norm_before", True) and not values.get("_remove_final_layer_norm", False)
    ledger = biased(values, final_norm=before)
    first, *rest, last = ledger.pieces
    projections = [*linear("projection in", narrow, size.hidden_size), *linear("projection out", size.hidden_size, narrow)]
    pieces = [
        replace(first, shape=(first.shape[0], narrow)),
        lookup("position embedding", longest + 2, size.hidden_size),
        *(projections if narrow != size.hidden_size else []),
        *rest,
        replace(last, shape=(last.shape[0], narrow)),
    ]
    return replace(ledger, pieces=tuple(pieces))


def bloom(values: Values) -> Ledger:
    """Count BLOOM: ALiBi positions, which have no parameters, and a norm on the embedding."""
    hidden = values.get("hidden_size") or values.get("n_embed")
    values = usual_names({**values, "hidden_size": hidden}, num_hidden_layers="n_layer", num_attention_heads="n_head")
    ledger = biased({**values, "intermediate_size": 4 * (hidden or 0)}, longest="seq_length")
    return replace(ledger, pieces=(ledger.pieces[0], *norms("embedding norm", hidden, bias=True), *ledger.pieces[1:]))


def falcon(values: Values) -> Ledger:
    """Count Falcon: one key and value head (7B), groups and two parallel norms (40B), or the older form (RW)."""
    (hidden,) = need(values, "hidden_size")
    grouped, one_head = either(values, "new_decoder_architecture", False), either(values, "multi_query", True)
    heads = values.get("num_attention_heads")
    kv_heads = either(values, "num_kv_heads", heads) if grouped else 1 if one_head else heads
    inner = either(values, "ffn_hidden_size", 4 * hidden)
    size = widths({**values, "num_key_value_heads": kv_heads, "intermediate_size": inner, "head_dim": None})
    bias = either(values, "bias", False)
    parallel_norms = either(values, "num_ln_in_parallel_attn", 2) if grouped else 1
    num_norms = parallel_norms if grouped or either(values, "parallel_attn", True) else 2
    layers = norms("norms", hidden, num_norms * size.layers, bias=True) + attention(size, bias=bias)
    layers += feed_forward(size, gated=False, bias=bias)
    return decoder(values, size, layers, tied=True, norm_bias=True)


def mpt(values: Values) -> Ledger:
    """Count MPT: ALiBi positions, no biases, norms with scales alone."""
    values = usual_names(values, num_hidden_layers="n_layers", hidden_size="d_model", num_attention_heads="n_heads")
    size = widths({**values, "intermediate_size": either(values, "expansion_ratio", 4) * (values["hidden_size"] or 0)})
    layers = norms("norms", size.hidden_size, 2 * size.layers) + attention(size) + feed_forward(size, gated=False)
    return decoder(values, size, layers, tied=True, longest="max_seq_len")


def cohere(values: Values) -> Ledger:
    return llama(values, num_norms=1, tied=True)
