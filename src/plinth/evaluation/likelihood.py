"""Held-out likelihood: cross-entropy, perplexity, bits per byte and bits per character, with intervals over documents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.shards import open_split, read_manifest
from plinth.evaluation.statistics import Score, bootstrap_ratio, map_score
from plinth.models.transformer import Transformer
from plinth.run import Progress
from plinth.tokenizer.encode import Tokenizer

HEAD_ROWS = 1024  # positions whose logits exist at a time


@dataclass(frozen=True)
class Window:
    """A stretch of one document; the tokens before `first_scored` are context only."""

    document: int
    """index of the document in the sample"""
    tokens: np.ndarray
    """ids, of which tokens[:-1] go in and tokens[first_scored:] are predicted"""
    first_scored: int
    """position of the first predicted token, at least 1"""


@dataclass(frozen=True)
class DocumentSums:
    """What each sampled document adds to the totals."""

    nll_nats: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    num_chars: np.ndarray


def score_corpus(
    model: Transformer,
    shards: Path,
    *,
    tokenizer: Tokenizer,
    seq_len: int | None = None,
    stride: int | None = None,
    max_documents: int | None = 256,
    max_tokens: int | None = 40_000,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> dict[str, Score]:
    """Score the held-out documents of a shards folder; returns loss_nats, perplexity, bits_per_byte and bits_per_char.

    Documents stand alone: the first token is predicted from <|endoftext|>, as in training, and <|endoftext|> itself is not scored,
    since it has no bytes. Windows of `seq_len` predicted tokens (default: the model's max_seq_len) move on by `stride` (default:
    half), and each token is scored once, with at least seq_len - stride tokens before it but at a document's start.
    A seeded sample of `max_documents` documents is scored, up to `max_tokens` tokens, the last one cut there.
    Raises UserError when the shards were packed with another tokenizer, or hold no held-out text.
    """
    seq_len = min(seq_len or model.config.max_seq_len, model.config.max_seq_len)
    stride = stride or max(1, seq_len // 2)
    if not 1 <= stride <= seq_len:
        raise UserError(f"stride={stride} must be between 1 and seq_len={seq_len}.")
    documents, num_available = read_heldout(shards, tokenizer, max_documents, max_tokens, seed)
    sums = document_sums(model, documents, tokenizer, seq_len, stride, batch_tokens)
    protocol = {
        "documents": len(documents),
        "documents_available": num_available,
        "tokens": int(sums.num_tokens.sum()),
        "bytes": int(sums.num_bytes.sum()),
        "seq_len": seq_len,
        "stride": stride,
        "prefix": "<|endoftext|>",
        "documents_joined": False,
        "dtype": str(model.output_weight.dtype).removeprefix("torch."),
        "seed": seed,
        "interval": "percentile bootstrap over documents",
        "shards_sha256": read_manifest(shards)["sha256"]["heldout.bin"],
    }
    return corpus_scores(sums, seed, protocol)


def corpus_scores(sums: DocumentSums, seed: int, protocol: dict[str, Any]) -> dict[str, Score]:
    """Return the four scores from the sums over documents: each a ratio of totals, never a mean of ratios."""
    loss = bootstrap_ratio(sums.nll_nats, sums.num_tokens, seed, protocol=protocol)
    bits = sums.nll_nats / math.log(2)
    return {
        "loss_nats": loss,
        "perplexity": map_score(loss, _exp, _exp(loss.value)),
        "bits_per_byte": bootstrap_ratio(bits, sums.num_bytes, seed, protocol=protocol),
        "bits_per_char": bootstrap_ratio(bits, sums.num_chars, seed, protocol=protocol),
    }


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def read_heldout(
    shards: Path, tokenizer: Tokenizer, max_documents: int | None, max_tokens: int | None, seed: int
) -> tuple[list[np.ndarray], int]:
    """Return a seeded sample of held-out documents as ids without their end, in random order, and how many there are."""
    packed_with = read_manifest(shards)["tokenizer_sha256"]
    if packed_with != tokenizer.sha256:
        raise UserError(
            f"tokenizer {tokenizer.sha256[:8]}... of the model differs from {packed_with[:8]}... that packed {shards}. "
            "Pack the corpus again with the model's tokenizer."
        )
    split = open_split(shards, "heldout")
    order = np.random.default_rng(seed).permutation(split.num_documents)
    documents: list[np.ndarray] = []
    left = max_tokens if max_tokens is not None else split.num_tokens
    for index in order:
        if left <= 0 or len(documents) == max_documents:
            break
        ids = split.document(index)[:-1][:left].astype(np.int64)
        if len(ids):
            documents.append(ids)
            left -= len(ids)
    if not documents:
        raise UserError(f"{shards} holds no held-out document. Curate with a larger held-out share, or pass --questions alone.")
    return documents, split.num_documents


def document_sums(
    model: Transformer, documents: list[np.ndarray], tokenizer: Tokenizer, seq_len: int, stride: int, batch_tokens: int = 4096
) -> DocumentSums:
    """Return negative log-likelihood, tokens, bytes and characters of each document."""
    nll_nats = np.zeros(len(documents))
    prefix_id = tokenizer.start_id or 0
    windows = [window for i, ids in enumerate(documents) for window in document_windows(i, ids, prefix_id, seq_len, stride)]
    with Progress(len(windows), "held-out likelihood", "windows") as progress:
        for batch in window_batches(windows, batch_tokens):
            losses = window_losses(model, batch)
            for window, loss in zip(batch, losses):
                nll_nats[window.document] += loss
            progress.update(len(batch))
    num_bytes, num_chars = token_sizes(tokenizer)
    return DocumentSums(
        nll_nats,
        np.array([len(ids) for ids in documents]),
        np.array([num_bytes[ids].sum() for ids in documents]),
        np.array([num_chars[ids].sum() for ids in documents]),
    )


def token_sizes(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return for each id how many bytes it stands for, and how many characters begin in it (bytes but continuation bytes)."""
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    num_chars = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in table]
    return np.array([len(piece) for piece in table]), np.array(num_chars)


def document_windows(document: int, ids: np.ndarray, prefix_id: int, seq_len: int, stride: int) -> Iterator[Window]:
    """Cut one document in windows that score each of its tokens exactly once.

    Source: the strided evaluation of fixed-length models (Baevski and Auli 2019, arXiv:1809.10853, section 4.3).
    """
    sequence = np.concatenate([[prefix_id], ids])
    scored = 1
    while scored < len(sequence):
        end = min(len(sequence), seq_len + 1 if scored == 1 else scored + stride)
        start = max(0, end - seq_len - 1)
        yield Window(document, sequence[start:end], scored - start)
        scored = end


def window_batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Group windows of like length, so that little is padded; a batch has at most `batch_tokens` positions, or one window."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda w: -len(w.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.no_grad()
def window_losses(model: Transformer, batch: list[Window]) -> np.ndarray:
    """Return the summed negative log-likelihood of each window's scored tokens, nats in float64, shape (B,).

    Padding stands on the right, where a causal model does not look. Logits exist for HEAD_ROWS positions at a time.
    """
    device = model.output_weight.device
    length = max(len(window.tokens) for window in batch) - 1
    tokens_BT = torch.zeros(len(batch), length + 1, dtype=torch.int64)
    scored_BT = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, window in enumerate(batch):
        tokens_BT[row, : len(window.tokens)] = torch.from_numpy(window.tokens)
        scored_BT[row, window.first_scored - 1 : len(window.tokens) - 1] = True
    hidden_BTD = model(tokens_BT[:, :-1].to(device))
    hidden_ND, targets_N = hidden_BTD[scored_BT.to(device)], tokens_BT[:, 1:][scored_BT].to(device)
    nll_N = torch.cat([_token_losses(model, h, t) for h, t in zip(hidden_ND.split(HEAD_ROWS), targets_N.split(HEAD_ROWS))])
    rows_N = scored_BT.nonzero()[:, 0]
    return torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows_N, nll_N.cpu()).numpy()


def _token_losses(model: Transformer, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    logits_NV = model.logits(hidden_ND).float()
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").double()
