"""The coordinate check on real models of real sizes: muP and CompleteP are flat, what they replace is not."""

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch

from plinth.config import UserError, read_json
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.recipes.coordinate_check import QUANTITIES, CoordinateConfig, activations, coordinate_check, slope
from plinth.recipes.transfer import Family


def run(shards, out, **changes):
    config = CoordinateConfig(**{"seeds": 1, **changes})
    return coordinate_check(shards, out, config)


def test_along_the_width_mup_passes_and_the_standard_parametrization_fails(shards, tmp_path):
    said = []
    result = coordinate_check(shards, tmp_path, CoordinateConfig(widths=(512, 64, 128, 256), seeds=1), said.append)
    assert result["sizes"] == [64, 128, 256, 512]
    standard, mup = result["parametrizations"]["standard"], result["parametrizations"]["mup"]
    assert mup["passes"] and not standard["passes"]
    assert not standard["flat"]["stream"] and standard["slopes"]["stream"] > 0.6
    for q in QUANTITIES:  # at the base the two are one
        assert standard["changes"][q][-1][0] == mup["changes"][q][-1][0]
    assert "8 models, 4 updates each: about" in said[0]
    assert read_json(tmp_path / "coordinates.json") == result
    assert len(list(ElementTree.parse(tmp_path / "coordinates.svg").iter("{http://www.w3.org/2000/svg}polyline"))) == 14


def test_along_the_depth_completep_passes_and_mup_fails(shards, tmp_path):
    result = run(shards, tmp_path, along="depth", depths=(4, 8, 16))
    completep = result["parametrizations"]["completep"]
    assert all(abs(completep["slopes"][q]) < 0.2 for q in ("stream", "logits", "first feed-forward", "last feed-forward"))
    mup = result["parametrizations"]["mup"]
    assert mup["slopes"]["stream"] > 0.9 and not mup["flat"]["stream"] and not mup["passes"]


def test_muons_update_moves_activations_alike_at_every_width(shards, tmp_path):
    family = Family(seq_len=64, sequences_per_step=4, optimizer="muon")
    found = run(shards, tmp_path, widths=(64, 128, 256), parametrizations=("mup",), family=family)["parametrizations"]["mup"]
    assert found["passes"]
    assert all(abs(found["slopes"][q]) < 0.25 for q in QUANTITIES if q != "logits")


def test_the_quantities_are_those_of_the_forward_pass():
    config = DecoderConfig(vocab_size=40, hidden_size=32, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.out.weight.normal_(0, 0.2)
            layer.mlp.down.weight.normal_(0, 0.2)
    tokens = torch.arange(12).view(2, 6)
    found = activations(model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.final_norm(found["stream"])), found["logits"], rtol=1e-4, atol=1e-5)
        block = model.layers[0]
        normed = block.attention_norm(model.embed(tokens))
        torch.testing.assert_close(block.attention(normed, *model.rotation(torch.arange(6))), found["first attention"])
    assert not torch.equal(found["first attention"], found["last attention"])
    torch.testing.assert_close(activations(model, tokens, 0.5)["last attention"], 2 * found["last attention"])


def test_a_slope_is_the_exponent_of_a_power_law():
    sizes = np.array([64.0, 128.0, 256.0])
    assert slope(sizes, 3 * sizes**-0.5) == pytest.approx(-0.5)
    assert math.isnan(slope(sizes, np.array([1.0, 0.0, 2.0]))) and math.isnan(slope(sizes, np.array([1.0, math.inf, 2.0])))


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"widths": (64,)}, "widths=.64. holds fewer than two"),
        ({"widths": (64, 100)}, "width 100 is not a multiple of head_dim=32"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"rise": 0.0}, "rise=0.0"),
    ],
)
def test_mistakes_are_named(changes, text):
    with pytest.raises(UserError, match=text):
        replace(CoordinateConfig(), **changes)
