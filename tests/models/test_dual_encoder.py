"""CLIP's towers: laws of each, and the exact sizes of the published ones."""

from dataclasses import replace

import pytest
import torch

from plinth.config import UserError
from plinth.models.dual_encoder import FIRST_LOGIT_SCALE, DualEncoder, DualEncoderConfig, TextTowerConfig
from plinth.models.meta import on_meta
from plinth.models.vision import VisionConfig, VisionTransformer

TEXT = TextTowerConfig(60, 32, 2, 2, 48, 12, begin_id=0, end_id=5)
VISION = VisionConfig(16, 4, 3, 48, 2, 4, 56)
CONFIG = DualEncoderConfig(TEXT, VISION, 24)


@pytest.fixture(scope="module")
def model():
    return DualEncoder(CONFIG).init_weights(torch.Generator().manual_seed(0)).eval()


def captions(count=3, length=9):
    tokens = torch.randint(6, 60, (count, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 0], tokens[:, -1] = 0, 5
    return tokens


def images(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("text", "vision", "size", "count"),
    [
        (TextTowerConfig(49408, 512, 12, 8, 2048, 77, 49406, 49407), VisionConfig(224, 32, 3, 768, 12, 12, 3072), 512, 151_277_313),
        (TextTowerConfig(49408, 768, 12, 12, 3072, 77, 49406, 49407), VisionConfig(224, 14, 3, 1024, 24, 16, 4096), 768, 427_616_513),
    ],
)
def test_published_sizes_are_exact(text, vision, size, count):
    model = on_meta(lambda: DualEncoder(DualEncoderConfig(text, vision, size)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@torch.no_grad()
def test_a_caption_depends_on_nothing_behind_its_end(model):
    tokens = captions()
    longer = torch.cat((tokens, torch.full((3, 3), 5)), 1)
    others = torch.cat((tokens, torch.randint(0, 60, (3, 3), generator=torch.Generator().manual_seed(3))), 1)
    alone = model.encode_text(tokens)
    torch.testing.assert_close(model.encode_text(longer), alone)
    torch.testing.assert_close(model.encode_text(others), alone)
    torch.testing.assert_close(model.text(others)[:, :9], model.text(tokens))  # causality, at each position


@torch.no_grad()
def test_a_batch_is_its_examples_in_any_order(model):
    tokens, pixels, order = captions(), images(), torch.tensor([2, 0, 1])
    similarity = model(tokens, pixels)
    torch.testing.assert_close(model(tokens[order], pixels[order]), similarity[order][:, order])
    torch.testing.assert_close(model(tokens[:1], pixels[:1]), similarity[:1, :1])
    torch.testing.assert_close(model.encode_image(pixels).norm(dim=-1), torch.ones(3))


@torch.no_grad()
def test_an_image_is_seen_whole_and_in_its_order(model):
    pixels = images(1)
    changed = pixels.clone()
    changed[..., -1, -1] += 1.0  # the last pixel changes the state of the first patch: attention goes both ways
    assert not torch.allclose(model.vision(changed)[:, 1], model.vision(pixels)[:, 1], atol=1e-5)
    assert not torch.allclose(model.encode_image(pixels.flip(-1)), model.encode_image(pixels), atol=1e-3)


@torch.no_grad()
def test_patches_are_what_a_convolution_gives():
    tower = VisionTransformer(VISION).init_weights(torch.Generator().manual_seed(0))
    pixels = images(2)
    patches = torch.nn.functional.conv2d(pixels, tower.patch_embed.weight, stride=4).flatten(2).transpose(1, 2)
    expected = torch.cat((tower.class_embed.expand(2, 1, -1), patches), 1) + tower.position_embed.weight
    torch.testing.assert_close(tower.embedded(pixels), tower.first_norm(expected))
    assert torch.equal(tower(pixels, layer=0), tower.embedded(pixels))
    assert torch.equal(tower(pixels, layer=-2), tower(pixels, layer=1)) and torch.equal(tower(pixels), tower(pixels, layer=2))


def test_attention_is_shown_of_both_towers(model):
    shown = model.attention_weights(captions()[0], images()[0])
    assert shown["text"].shape == (2, 2, 9, 9) and shown["vision"].shape == (2, 4, 17, 17)
    for weights in shown.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not shown["text"].triu(1).any() and shown["vision"].min() > 0


def test_weights_are_drawn_once_for_a_seed_and_the_hidden_matrices_are_named(model):
    again = DualEncoder(CONFIG).init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert model.logit_scale.item() == pytest.approx(FIRST_LOGIT_SCALE)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = model.matrix_parts()
    assert len(parts) == 4 * 4 and all(len(shapes[name]) == 2 and shapes[name][0] == sum(rows) for name, rows in parts.items())


def test_shapes_that_cannot_be_are_refused(model):
    with pytest.raises(UserError, match="patch_size=5"):
        replace(VISION, patch_size=5)
    with pytest.raises(UserError, match=r"text\.hidden_size=32 is not a multiple of num_heads=3"):
        replace(TEXT, num_heads=3)
    with pytest.raises(UserError, match=r"do not fit vision.image_size=16"):
        model.vision(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"13 tokens exceeds text.max_seq_len=12"):
        model.encode_text(torch.full((1, 13), 5))
