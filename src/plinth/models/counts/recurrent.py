"""Closed forms of recurrent models, which Plinth saves under names of its own."""

from __future__ import annotations

from dataclasses import replace

from plinth.config import UserError
from plinth.models.counts.blocks import Values, either, need
from plinth.models.counts.ledger import Attending, Ledger, Piece, Stream, head, linear, lookup

GATES = {"lstm": 4, "gru": 3}


def cells(name: str, cell: str, sizes: list[tuple[int, int]], *, directions: int = 1, stream: str = "text") -> list[Piece]:
    """Return layers of cells, of each (input width, output width): gates (i h + h h + 2 h), as in PyTorch."""
    if cell not in GATES:
        raise UserError(f"config.json: cell={cell!r} is unknown. Use lstm or gru.")
    pieces = []
    for i, (width, out) in enumerate(sizes, 1):
        rows = GATES[cell] * out
        pieces += [
            Piece(f"{name} {i} input gates", (rows, width), "matrix", directions, stream=stream),
            Piece(f"{name} {i} recurrent gates", (rows, out), "matrix", directions, stream=stream),
            Piece(f"{name} {i} biases", (rows,), "other", 2 * directions, stream=stream),
        ]
    return pieces


def awd_lstm(values: Values) -> Ledger:
    """Count the AWD-LSTM; with a tied head its last layer is as wide as the embedding."""
    vocab_size, width, hidden, layers = need(values, "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers")
    tied = either(values, "tie_word_embeddings", True)
    outs = [hidden] * (layers - 1) + [width if tied else hidden]
    pieces = [lookup("token embedding", vocab_size, width), *cells("layer", "lstm", list(zip([width, *outs], outs)))]
    return Ledger((*pieces, *head(vocab_size, outs[-1], tied=tied, bias=True)), (), vocab_size=vocab_size)


def seq2seq(values: Values) -> Ledger:
    """Count a recurrent encoder and decoder, without attention, with additive and with multiplicative attention."""
    names = ("source_vocab_size", "target_vocab_size", "embedding_size", "hidden_size", "num_hidden_layers")
    source_vocab, vocab_size, width, hidden, layers = need(values, *names)
    cell, kind, two = either(values, "cell", "gru"), either(values, "attention", "additive"), either(values, "bidirectional", True)
    memory = hidden * (2 if two else 1)
    context = (hidden if either(values, "repeat_context", True) else 0) if kind == "none" else memory
    fed = (hidden if values.get("input_feeding") else 0) if kind == "multiplicative" else context
    pieces = [
        lookup("source embedding", source_vocab, width, stream="source"),
        lookup("target embedding", vocab_size, width, stream="target"),
    ]
    encoder = [(width, hidden)] + [(memory, hidden)] * (layers - 1)
    pieces += cells("encoder", cell, encoder, directions=2 if two else 1, stream="source")
    states = 2 if cell == "lstm" else 1
    pieces += linear("bridge", memory, hidden, layers * states, bias=True, stream="once") if two else []
    pieces += cells("decoder", cell, [(width + fed, hidden)] + [(hidden, hidden)] * (layers - 1), stream="target")
    looks, attending = look(kind, either(values, "score", "general"), hidden, memory)
    read = hidden if kind == "multiplicative" or not context else hidden + context + width
    pieces += looks + linear("head", read, vocab_size, bias=True, stream="target")
    streams = (Stream("source"), Stream("target"), Stream("once", 1, counted=False))
    return Ledger(tuple(pieces), attending, streams, vocab_size=vocab_size)


def look(kind: str, score: str, hidden: int, memory: int) -> tuple[list[Piece], tuple[Attending, ...]]:
    """Return attention's pieces and what it costs: the source's keys (where they differ from its values) and values are kept."""
    group = Attending("cross-attention", 1, 1, hidden + memory, hidden + memory, causal=False, stream="target", keys="source")
    if kind == "additive":
        pieces = linear("attention query", hidden, hidden, stream="target") + linear(
            "attention key", memory, hidden, bias=True, stream="source"
        )
        return [*pieces, Piece("attention score", (1, hidden), "other", stream="target")], (group,)
    if kind == "multiplicative":
        keys = linear("attention key", memory, hidden, stream="source") if score == "general" else []
        combine = linear("attention combination", memory + hidden, hidden, stream="target")
        return keys + combine, (group if score == "general" else replace(group, cached=memory),)
    return [], ()
