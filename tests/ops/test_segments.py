"""Several documents in a row: with segments, each gives what it gives alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.files import write_shards
from plinth.data.loader import TokenLoader
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.segments import positions_in_segments, segment_mask
from plinth.training.objectives import causal_lm_loss

VOCAB = 400


def make_model(**changes):
    config = DecoderConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
        max_seq_len=64, **changes,
    )  # fmt: skip
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return model


def test_positions_and_mask_worked_by_hand():
    segments = torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, 1, 1, 1, 0]])
    assert positions_in_segments(segments).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 0]]
    assert segment_mask(segments)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=3))
def test_positions_count_from_each_start(lengths):
    width = max(map(sum, lengths))
    rows = [[i for i, n in enumerate([*row, width - sum(row)]) for _ in range(n)] for row in lengths]
    expected = [[p for n in [*row, width - sum(row)] for p in range(n)] for row in lengths]
    assert positions_in_segments(torch.tensor(rows)).tolist() == expected


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("changes", [{}, {"learnable_norm": True}, {"attention_multiplier": 0.5}])
def test_a_packed_row_gives_the_losses_and_gradients_of_its_documents_alone(tmp_path, packing, changes):
    loader = TokenLoader(write_shards(tmp_path / "s", [5, 9, 3, 20, 8, 0, 11, 2]), 24, 3, 0, packing=packing, mask_documents=True)
    model = make_model(**changes)
    inputs, targets, segments = loader.batch(0)
    loss, count, _ = causal_lm_loss(model, (inputs, targets, segments))
    alone_loss, alone_count = 0.0, 0
    for row, pieces in enumerate(loader.documents(0)):
        begin = 0
        for piece in pieces:
            here = slice(begin, begin + piece.length)
            part, n, _ = causal_lm_loss(model, (inputs[row : row + 1, here], targets[row : row + 1, here]))
            alone_loss, alone_count, begin = alone_loss + part, alone_count + n, begin + piece.length
    assert count == alone_count
    torch.testing.assert_close(loss, alone_loss, rtol=1e-6, atol=1e-5)
    for together, alone in zip(*(torch.autograd.grad(total, list(model.parameters())) for total in (loss, alone_loss))):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_one_segment_is_the_plain_causal_model():
    model = make_model()
    tokens = torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(tokens, torch.zeros_like(tokens)), model(tokens), rtol=1e-5, atol=1e-5)


def test_without_segments_a_row_does_look_across_documents(tmp_path):
    loader = TokenLoader(write_shards(tmp_path / "s", [5, 9, 3, 2]), 24, 1, seed=0, packing="best_fit", mask_documents=True)
    model, (inputs, targets, segments) = make_model(), loader.batch(0)
    masked, plain = (causal_lm_loss(model, batch)[0].item() for batch in ((inputs, targets, segments), (inputs, targets)))
    assert abs(masked - plain) > 1e-3
