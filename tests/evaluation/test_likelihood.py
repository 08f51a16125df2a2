"""Held-out likelihood against a loop over single tokens, and the laws of windows and units."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.config import UserError
from plinth.data.shards import pack_corpus
from plinth.evaluation.likelihood import document_sums, document_windows, read_heldout, score_corpus, token_sizes, window_batches
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.tokenizer.train import train_tokenizer

TEXTS = ["Copy a file to another.\n" * 3, "naïve café — 日本語 text", "x", "def copyfile(src, dst):\n    return dst\n" * 4]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48,
        max_seq_len=16,
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for split in ("train", "heldout"):
        columns = {"text": TEXTS, "kind": ["text"] * len(TEXTS), "doc_id": [str(i) for i in range(len(TEXTS))]}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    pack_corpus(folder, tokenizer, folder / "shards")
    return folder / "shards"


def loop_nll(model, ids, prefix, seq_len, stride):
    """Sum -ln p token by token, each from the context that its window gives it: the slow twin."""
    sequence, total = [prefix, *ids], 0.0
    for position in range(1, len(sequence)):
        if position <= seq_len:
            start = 0
        else:  # windows after the first score `stride` tokens and end at a multiple of it, or at the document's end
            end = min(len(sequence), seq_len + 1 + stride * math.ceil((position - seq_len) / stride))
            start = max(0, end - seq_len - 1)
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([sequence[start:position]])))[0, -1].double()
        total -= float(torch.log_softmax(logits, -1)[sequence[position]])
    return total


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 8), (16, 16), (8, 3), (16, 1)])
def test_equals_a_loop_over_tokens(model, tokenizer, seq_len, stride):
    documents = [np.array(ids) for ids in tokenizer.encode_batch(TEXTS)]
    sums = document_sums(model, documents, tokenizer, seq_len, stride)
    expected = [loop_nll(model, ids.tolist(), tokenizer.end_of_text_id, seq_len, stride) for ids in documents]
    assert sums.nll_nats == pytest.approx(expected, rel=1e-5)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_windows_score_each_token_once_with_context(length, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    ids = np.arange(1, length + 1)
    windows = list(document_windows(0, ids, 0, seq_len, stride))
    assert np.concatenate([w.tokens[w.first_scored :] for w in windows]).tolist() == ids.tolist()
    for window in windows:
        assert len(window.tokens) - 1 <= seq_len
        assert window.tokens[0] == 0 or window.first_scored >= min(seq_len - stride, seq_len) + 1


def test_batches_hold_every_window_once_and_within_the_limit(tokenizer):
    documents = [np.array(ids) for ids in tokenizer.encode_batch(TEXTS)]
    windows = [w for i, ids in enumerate(documents) for w in document_windows(i, ids, 0, 8, 4)]
    batches = list(window_batches(windows, 40))
    assert sorted(map(id, windows)) == sorted(id(w) for batch in batches for w in batch)
    assert all(len(batch) == 1 or len(batch) * max(len(w.tokens) for w in batch) <= 40 for batch in batches)


def test_the_batch_size_does_not_change_the_scores(model, tokenizer):
    documents = [np.array(ids) for ids in tokenizer.encode_batch(TEXTS)]
    one, all_ = (document_sums(model, documents, tokenizer, 16, 8, batch_tokens) for batch_tokens in (1, 10_000))
    assert one.nll_nats == pytest.approx(all_.nll_nats, rel=1e-6)


def test_units_count_the_text(model, tokenizer):
    documents = [np.array(ids) for ids in tokenizer.encode_batch(TEXTS)]
    sums = document_sums(model, documents, tokenizer, 16, 8)
    assert sums.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert sums.num_chars.tolist() == [len(text) for text in TEXTS]
    num_bytes, _ = token_sizes(tokenizer)
    assert num_bytes[tokenizer.end_of_text_id] == 0


def test_a_uniform_model_has_the_known_scores(tokenizer, model, shards):
    uniform = Transformer(model.config)
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()
    scores = score_corpus(uniform, shards, tokenizer=tokenizer, max_tokens=None)
    num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(TEXTS))
    vocab_size = model.config.vocab_size
    assert scores["loss_nats"].value == pytest.approx(math.log(vocab_size), rel=1e-6)
    assert scores["perplexity"].value == pytest.approx(vocab_size, rel=1e-5)
    total_bits = num_tokens * math.log2(vocab_size)
    assert scores["bits_per_byte"].value == pytest.approx(total_bits / sum(len(t.encode()) for t in TEXTS), rel=1e-6)
    assert scores["bits_per_char"].value == pytest.approx(total_bits / sum(map(len, TEXTS)), rel=1e-6)
    assert all(score.n == len(TEXTS) and score.ci95[0] <= score.value <= score.ci95[1] for score in scores.values())


def test_the_sample_is_seeded_and_cut_at_its_limits(tokenizer, shards):
    documents, available = read_heldout(shards, tokenizer, None, 20, seed=3)
    assert available == len(TEXTS) and sum(map(len, documents)) == 20
    again, _ = read_heldout(shards, tokenizer, None, 20, seed=3)
    assert [d.tolist() for d in documents] == [d.tolist() for d in again]
    assert len(read_heldout(shards, tokenizer, 2, None, seed=0)[0]) == 2
    everything, _ = read_heldout(shards, tokenizer, None, None, seed=0)
    assert sorted(tokenizer.decode(ids.tolist()) for ids in everything) == sorted(TEXTS)


def test_another_tokenizer_is_refused(model, shards):
    other = train_tokenizer(["entirely different text " * 20], 290)
    with pytest.raises(UserError, match="of the model differs from .* that packed"):
        score_corpus(model, shards, tokenizer=other)


def test_a_stride_longer_than_the_window_is_refused(model, tokenizer, shards):
    with pytest.raises(UserError, match="stride=20 must be between 1 and seq_len=16"):
        score_corpus(model, shards, tokenizer=tokenizer, stride=20)


def test_bfloat16_is_close(model, tokenizer, shards):
    import copy

    small = copy.deepcopy(model).to(torch.bfloat16)
    exact = score_corpus(model, shards, tokenizer=tokenizer)["loss_nats"]
    rounded = score_corpus(small, shards, tokenizer=tokenizer)["loss_nats"]
    assert rounded.value == pytest.approx(exact.value, rel=0.02)
    assert rounded.protocol["dtype"] == "bfloat16"
