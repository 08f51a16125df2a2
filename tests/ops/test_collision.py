"""The logarithm of a distribution's sum of squares, by chunks."""

import torch

from plinth.ops import collision
from plinth.ops.softcap import softcap


def test_it_is_the_sum_of_squares_of_the_softmax_whatever_the_chunk(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 4), (11, 4)))
    for cap in (None, 5.0):
        logits = hidden @ weight.t()
        expected = (logits if cap is None else softcap(logits, cap)).softmax(-1).square().sum(-1).log()
        for elements in (1, 30, 1 << 20):
            monkeypatch.setattr(collision, "CHUNK_ELEMENTS", elements)
            torch.testing.assert_close(
                collision.log_sum_squares(hidden, weight, cap), expected, rtol=1e-12 if cap is None else 1e-6, atol=1e-12
            )
