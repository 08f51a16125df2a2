"""The contrastive loss: worked by hand, symmetric, and its bounded temperature."""

import math

import pytest
import torch

from plinth.models.dual_encoder import LARGEST_LOGIT_SCALE, DualEncoder, DualEncoderConfig, TextTowerConfig
from plinth.models.vision import VisionConfig
from plinth.training.objectives_contrastive import bound_logit_scale, contrastive_loss, contrastive_sum

CONFIG = DualEncoderConfig(TextTowerConfig(60, 32, 1, 2, 48, 12), VisionConfig(8, 4, 3, 32, 1, 2, 48), 16)


def test_the_loss_worked_by_hand():
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss, right = contrastive_sum(images, texts, torch.tensor(math.log(2.0)))
    logits = [[2.0, 1.2], [0.0, 1.6]]

    def cost(row, i):
        return -row[i] + math.log(sum(math.exp(x) for x in row))

    rows, columns = logits, list(zip(*logits))
    expected = (sum(cost(rows[i], i) for i in range(2)) + sum(cost(columns[i], i) for i in range(2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6) and right.item() == 4


def test_texts_and_images_may_change_places_and_pairs_their_order():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=-1) for _ in range(2))
    scale, order = torch.tensor(2.0), torch.tensor([3, 1, 5, 0, 2, 4])
    loss = contrastive_sum(images, texts, scale)[0]
    torch.testing.assert_close(contrastive_sum(texts, images, scale)[0], loss)
    torch.testing.assert_close(contrastive_sum(images[order], texts[order], scale)[0], loss)
    assert contrastive_sum(images[:1], texts[:1], scale)[0] == 0.0  # a pair alone has nothing to be told from


@pytest.mark.parametrize(("steeper", "passes"), [(True, False), (False, True)])
def test_beyond_its_bound_the_temperature_only_comes_back(steeper, passes):
    model = DualEncoder(CONFIG).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=-1)
    from plinth.training.objectives_contrastive import _Bounded

    texts = images if steeper else images.roll(1, 0)  # right pairs want a steeper softmax, wrong ones a flatter
    scale = _Bounded.apply(model.logit_scale, LARGEST_LOGIT_SCALE)
    assert scale.item() == pytest.approx(math.log(100))
    # With vectors this far apart the softmax saturates, so the gradient is taken of a colder one.
    contrastive_sum(images, texts, scale - 4.0)[0].backward()
    assert bool(model.logit_scale.grad) == passes
    bound_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_the_loss_of_a_model_counts_pairs_and_says_how_many_are_right():
    model = DualEncoder(CONFIG).init_weights(torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 7, 5, 5], [0, 8, 9, 5], [0, 10, 5, 5]])
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    loss, count, metrics = contrastive_loss(model, (tokens, pixels))
    logits = model(tokens, pixels)
    own = torch.arange(3)
    expected = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.t(), own)) / 2
    assert count == 3 and loss.item() / 3 == pytest.approx(expected.item(), rel=1e-5)
    right = (logits.argmax(1) == own).sum() + (logits.argmax(0) == own).sum()
    assert metrics["accuracy"] == right / 2 and metrics["logit_scale"] / count == pytest.approx(1 / 0.07, rel=1e-4)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(model.parameters())))
