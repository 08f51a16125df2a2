"""Closed forms of published encoders and encoder-decoders; what stands on top follows from `architectures` in config.json."""

from __future__ import annotations

from dataclasses import replace

from plinth.config import UserError
from plinth.models.counts.blocks import Values, Widths, all_heads, attention, either, feed_forward, need, widths
from plinth.models.counts.ledger import Attending, Ledger, Piece, Stream, head, linear, lookup, norms, on_stream

POOLED = Stream("pooled", 1, counted=False)  # the first token alone


def architecture(values: Values, default: str) -> str:
    """Return the class that config.json names, which says what stands on top; without its family's name."""
    return (values.get("architectures") or [default])[0]


def two_way(size: Widths, name: str = "attention", stream: str = "text", window: int | None = None, layers: int | None = None):
    """Return the attention of an encoder: every position sees all, or those around it; nothing is cached."""
    return Attending(
        name, size.layers if layers is None else layers, size.heads, 2 * size.head_dim,
        hidden_size=size.hidden_size, window=window, causal=False, stream=stream,
    )  # fmt: skip


def encoder(values: Values, size: Widths, pieces: list[Piece], attending: tuple[Attending, ...]) -> Ledger:
    streams = (Stream("text"), POOLED) if any(piece.stream == "pooled" for piece in pieces) else (Stream("text"),)
    scored = any(piece.name.startswith("head (") for piece in pieces)
    longest = values.get("max_position_embeddings")
    return Ledger(tuple(pieces), attending, streams, longest, need(values, "vocab_size")[0] if scored else 0)


def bert_body(values: Values, *, positions: int, types: int, width: int | None = None) -> tuple[Widths, list[Piece]]:
    """Return BERT's embeddings and blocks: learnt positions, biases throughout, a norm after each sum."""
    size = widths(all_heads(values))
    width = width or size.hidden_size
    pieces = [lookup("token embedding", need(values, "vocab_size")[0], width), lookup("position embedding", positions, width)]
    pieces += [lookup("segment embedding", types, width)] if types else []
    pieces += norms("embedding norm", width, bias=True)
    pieces += linear("projection of the embedding", width, size.hidden_size, bias=True) if width != size.hidden_size else []
    pieces += attention(size, bias=True) + feed_forward(size, gated=False, bias=True)
    return size, pieces + norms("norms", size.hidden_size, 2 * size.layers, bias=True)


def masked_head(values: Values, hidden: int, width: int | None = None) -> list[Piece]:
    """Return BERT's head for masked tokens: a dense layer, a norm, and the embedding again with a bias."""
    width = width or hidden
    vocab_size = need(values, "vocab_size")[0]
    return [
        *linear("head dense", hidden, width, bias=True),
        *norms("head norm", width, bias=True),
        *head(vocab_size, width, tied=either(values, "tie_word_embeddings", True), bias=True),
    ]


def labels(values: Values) -> int:
    """Return how many classes config.json names; 2 where it names none."""
    return len(values["id2label"]) if values.get("id2label") else either(values, "num_labels", 2)


def classifier(values: Values, kind: str, hidden: int) -> list[Piece]:
    """Return the head of an architecture that classifies tokens or finds spans; raises UserError for an unknown one."""
    if kind.endswith("ForTokenClassification"):
        return linear("classifier", hidden, labels(values), bias=True)
    if kind.endswith("ForQuestionAnswering"):
        return linear("span head", hidden, 2, bias=True)
    raise UserError(
        f"architectures={kind!r} cannot be counted for model_type={values.get('model_type')!r}. Name its plain model, its masked language "
        "model, or its SequenceClassification, TokenClassification or QuestionAnswering class in config.json."
    )


def bert(values: Values) -> Ledger:
    """Count BERT with the pooler or the head that its architecture has."""
    kind = architecture(values, "BertModel")
    types = either(values, "type_vocab_size", 2)
    size, pieces = bert_body(values, positions=either(values, "max_position_embeddings", 512), types=types)
    hidden = size.hidden_size
    pooler = linear("pooler", hidden, hidden, bias=True, stream="pooled")
    if kind == "BertModel":
        pieces += pooler
    elif kind == "BertForPreTraining":
        pieces += pooler + masked_head(values, hidden) + linear("next sentence head", hidden, 2, bias=True, stream="pooled")
    elif kind in ("BertForMaskedLM", "BertLMHeadModel"):
        pieces += masked_head(values, hidden)
    elif kind == "BertForSequenceClassification":
        pieces += pooler + linear("classifier", hidden, labels(values), bias=True, stream="pooled")
    else:
        pieces += classifier(values, kind, hidden)
    return encoder(values, size, pieces, (two_way(size),))


def roberta(values: Values) -> Ledger:
    """Count RoBERTa and XLM-R: BERT's body; two positions more than the context, as config.json has them."""
    family = "XLMRoberta" if values.get("model_type") == "xlm-roberta" else "Roberta"
    kind = architecture(values, f"{family}Model")
    types = either(values, "type_vocab_size", 2)
    size, pieces = bert_body(values, positions=either(values, "max_position_embeddings", 512), types=types)
    hidden = size.hidden_size
    if kind == f"{family}Model":
        pieces += linear("pooler", hidden, hidden, bias=True, stream="pooled")
    elif kind == f"{family}ForMaskedLM":
        pieces += masked_head(values, hidden)
    elif kind == f"{family}ForSequenceClassification":
        pieces += dense_classifier(values, hidden)
    else:
        pieces += classifier(values, kind, hidden)
    return encoder(values, size, pieces, (two_way(size),))


def dense_classifier(values: Values, hidden: int) -> list[Piece]:
    """Return a classifier of the first token with a dense layer of its own."""
    dense = linear("classifier dense", hidden, hidden, bias=True, stream="pooled")
    return dense + linear("classifier", hidden, labels(values), bias=True, stream="pooled")


def electra(values: Values) -> Ledger:
    """Count ELECTRA: the discriminator (ElectraForPreTraining), or the generator (ElectraForMaskedLM); narrow embeddings."""
    kind = architecture(values, "ElectraModel")
    width = either(values, "embedding_size", 128)
    types = either(values, "type_vocab_size", 2)
    size, pieces = bert_body(values, positions=either(values, "max_position_embeddings", 512), types=types, width=width)
    hidden = size.hidden_size
    if kind == "ElectraForPreTraining":
        pieces += linear("replaced-token dense", hidden, hidden, bias=True) + linear("replaced-token head", hidden, 1, bias=True)
    elif kind == "ElectraForMaskedLM":
        pieces += masked_head(values, hidden, width)
    elif kind == "ElectraForSequenceClassification":
        pieces += dense_classifier(values, hidden)
    elif kind != "ElectraModel":
        pieces += classifier(values, kind, hidden)
    return encoder(values, size, pieces, (two_way(size),))


def distilbert(values: Values) -> Ledger:
    """Count DistilBERT: BERT without segments and pooler."""
    kind = architecture(values, "DistilBertModel")
    names = {"num_hidden_layers": "n_layers", "hidden_size": "dim", "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"}
    values = {**values, **{usual: values.get(old) for usual, old in names.items()}}
    size, pieces = bert_body(values, positions=either(values, "max_position_embeddings", 512), types=0)
    if kind == "DistilBertForMaskedLM":
        pieces += masked_head(values, size.hidden_size)
    elif kind == "DistilBertForSequenceClassification":
        pieces += dense_classifier(values, size.hidden_size)
    elif kind != "DistilBertModel":
        pieces += classifier(values, kind, size.hidden_size)
    return encoder(values, size, pieces, (two_way(size),))


def modernbert(values: Values) -> Ledger:
    """Count ModernBERT: rotary positions, no biases, gated; the first layer has no norm before attention, every third sees all."""
    kind = architecture(values, "ModernBertModel")
    size = widths(all_heads(values))
    hidden = size.hidden_size
    pieces = [lookup("token embedding", need(values, "vocab_size")[0], hidden), *norms("embedding norm", hidden)]
    pieces += norms("norms", hidden, 2 * size.layers - 1) + attention(size, bias=either(values, "attention_bias", False))
    pieces += feed_forward(size, bias=either(values, "mlp_bias", False)) + norms("final norm", hidden)
    if kind == "ModernBertForMaskedLM":
        pieces += linear("head dense", hidden, hidden) + norms("head norm", hidden)
        tied, bias = either(values, "tie_word_embeddings", True), either(values, "decoder_bias", True)
        pieces += head(need(values, "vocab_size")[0], hidden, tied=tied, bias=bias)
    elif kind != "ModernBertModel":
        raise UserError(f"architectures={kind!r} cannot be counted. Name ModernBertModel or ModernBertForMaskedLM in config.json.")
    every = either(values, "global_attn_every_n_layers", 3)
    whole = -(-size.layers // every)
    local = two_way(size, "local attention", window=either(values, "local_attention", 128), layers=size.layers - whole)
    return encoder(values, size, pieces, (two_way(size, layers=whole), local))


def esm(values: Values) -> Ledger:
    """Count ESM-2, an encoder of proteins: rotary positions, norms before each sum, a regression of contacts from attention."""
    kind = architecture(values, "EsmForMaskedLM")
    size = widths(all_heads(values))
    hidden, vocab_size = size.hidden_size, need(values, "vocab_size")[0]
    pieces = [lookup("token embedding", vocab_size, hidden)]
    if either(values, "position_embedding_type", "absolute") == "absolute":
        pieces.append(lookup("position embedding", either(values, "max_position_embeddings", 1026), hidden))
    pieces += norms("embedding norm", hidden, bias=True) if values.get("emb_layer_norm_before") else []
    pieces += norms("norms", hidden, 2 * size.layers + 1, bias=True) + attention(size, bias=True)
    pieces += feed_forward(size, gated=False, bias=True)
    contacts = size.layers * size.heads
    pieces += [Piece("contact regression", (1, contacts), "other"), Piece("contact regression bias", (1,), "other")]
    if kind == "EsmForMaskedLM":
        pieces += masked_head(values, hidden)
    elif kind == "EsmModel":
        pieces += linear("pooler", hidden, hidden, bias=True, stream="pooled")
    else:
        raise UserError(f"architectures={kind!r} cannot be counted. Name EsmModel or EsmForMaskedLM in config.json.")
    return encoder(values, size, pieces, (two_way(size),))


def pair_of_stacks(source: Widths, target: Widths) -> tuple[Attending, ...]:
    """Return the attention of an encoder-decoder; a decoder's layer caches its own keys and values and those of the source."""
    cache = 2 * target.kv_width
    return (
        two_way(source, "encoder attention", "source"),
        Attending("decoder attention", target.layers, target.heads, 2 * target.head_dim, cache, target.hidden_size, stream="target"),
        Attending("cross-attention", target.layers, target.heads, 2 * target.head_dim, cache, causal=False, stream="target", keys="source"),
    )


def cross_attention(size: Widths, *, bias: bool) -> list[Piece]:
    """Return a decoder's attention to the source: its keys and values are made of the source's positions."""
    pieces = attention(size, bias=bias, name="cross-attention")
    on_source = ("cross-attention key", "cross-attention value")
    return [replace(p, stream="source" if p.name.startswith(on_source) else "target") for p in pieces]


def t5(values: Values) -> Ledger:
    """Count T5 and its relatives: shared embedding, buckets of relative positions in the first block of each stack, no biases."""
    layers, hidden, heads, inner, vocab_size = need(values, "num_layers", "d_model", "num_heads", "d_ff", "vocab_size")
    source = Widths(layers, hidden, heads, heads, either(values, "d_kv", hidden // heads), inner)
    target = replace(source, layers=either(values, "num_decoder_layers", layers))
    gated = str(either(values, "feed_forward_proj", "relu")).startswith("gated")
    buckets = either(values, "relative_attention_num_buckets", 32)
    pieces = [lookup("token embedding", vocab_size, hidden, stream="source")]
    for stream, size, num_norms in (("source", source, 2), ("target", target, 3)):
        stack = [Piece("relative positions", (buckets, heads), "other"), *norms("norms", hidden, num_norms * size.layers + 1)]
        pieces += on_stream(stack + attention(size) + feed_forward(size, gated=gated), stream)
    pieces += cross_attention(target, bias=False)
    tied = either(values, "tie_word_embeddings", True)
    pieces += head(vocab_size, hidden, tied=tied, stream="target")
    return Ledger(tuple(pieces), pair_of_stacks(source, target), (Stream("source"), Stream("target")), vocab_size=vocab_size)


def sided(values: Values) -> list[Widths]:
    """Return the sizes of an encoder's and a decoder's stack under BART's names."""
    (hidden,) = need(values, "d_model")
    sizes = []
    for side in ("encoder", "decoder"):
        layers, heads, inner = need(values, f"{side}_layers", f"{side}_attention_heads", f"{side}_ffn_dim")
        sizes.append(Widths(layers, hidden, heads, heads, hidden // heads, inner))
    return sizes


def post_norm_stacks(sizes: list[Widths], extra: list[Piece]) -> list[Piece]:
    """Return an encoder's and a decoder's blocks with biases and a norm after each sum, and `extra` pieces on each side."""
    pieces = []
    for stream, size, num_norms in (("source", sizes[0], 2), ("target", sizes[1], 3)):
        stack = [*extra, *norms("norms", size.hidden_size, num_norms * size.layers, bias=True)]
        pieces += on_stream(stack + attention(size, bias=True) + feed_forward(size, gated=False, bias=True), stream)
    return pieces + cross_attention(sizes[1], bias=True)


def bart(values: Values) -> Ledger:
    """Count BART: learnt positions (two more than the context), biases throughout, norms after each sum and on the embedding."""
    hidden, vocab_size, longest = need(values, "d_model", "vocab_size", "max_position_embeddings")
    sizes = sided(values)
    extra = [lookup("position embedding", longest + 2, hidden), *norms("embedding norm", hidden, bias=True)]
    pieces = [lookup("token embedding", vocab_size, hidden, stream="source"), *post_norm_stacks(sizes, extra)]
    pieces += head(vocab_size, hidden, tied=either(values, "tie_word_embeddings", True), stream="target")
    return Ledger(tuple(pieces), pair_of_stacks(*sizes), (Stream("source"), Stream("target")), longest, vocab_size)


def marian(values: Values) -> Ledger:
    """Count Marian, the Transformer of 2017: one embedding for all, or one a side. Its sinusoidal positions are fixed: no parameters."""
    hidden, vocab_size = need(values, "d_model", "vocab_size")
    shared = either(values, "share_encoder_decoder_embeddings", True)
    targets = vocab_size if shared else either(values, "decoder_vocab_size", vocab_size)
    sizes = sided(values)
    pieces = [lookup("token embedding", vocab_size, hidden, stream="source")]
    pieces += [] if shared else [lookup("target embedding", targets, hidden, stream="target")]
    pieces += post_norm_stacks(sizes, []) + head(targets, hidden, tied=either(values, "tie_word_embeddings", True), stream="target")
    longest = either(values, "max_position_embeddings", 1024)
    return Ledger(tuple(pieces), pair_of_stacks(*sizes), (Stream("source"), Stream("target")), longest, targets)
