"""A shape without weights costs neither memory nor the second that drawing on the meta device takes."""

import subprocess
import sys

import torch
from torch import nn

from plinth.models.meta import on_meta


def test_nothing_is_drawn_and_nothing_kept():
    before = torch.get_rng_state()
    model = on_meta(lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LSTM(3, 2), nn.Conv2d(3, 4, 2)))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model[1].weight.shape == (3, 4) and isinstance(model[1].weight, nn.Parameter)
    assert torch.equal(torch.get_rng_state(), before)
    assert nn.Linear(4, 3).weight.abs().sum() > 0  # outside, modules draw as ever


def test_the_library_of_symbols_is_not_imported():
    code = (
        "import sys\nfrom plinth.models.config import DecoderConfig\nfrom plinth.models.meta import on_meta\n"
        "from plinth.models.transformer import Transformer\non_meta(lambda: Transformer(DecoderConfig()))\n"
        "assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
