"""Losses of encoders, by hand, against transformers' formulas, and under any split of the batch."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from plinth.models.electra import Electra
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.training.objectives_encoder import (
    classification_loss,
    masked_lm_loss,
    replaced_token_loss,
    sample_at,
    span_loss,
    tagging_loss,
)

TINY = EncoderConfig(vocab_size=30, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_seq_len=12)


def drawn(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def batch(rows=4, width=10, share=0.3):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(30, (rows, width), generator=generator)
    mask = torch.arange(width) < torch.randint(5, width + 1, (rows, 1), generator=generator)
    hidden = (torch.rand(rows, width, generator=generator) < share) & mask
    hidden[:, 0] = True
    return tokens.masked_fill(hidden, 3), torch.where(hidden, tokens, -100), mask, torch.rand(rows, width, generator=generator)


def labelled(kind):
    tokens, _, mask, _ = batch()
    generator = torch.Generator().manual_seed(2)
    segments = (torch.arange(10) > 3).long().expand(4, 10).clone()
    if kind == "classify":
        return EncoderModel(TINY.with_head("classify", ("a", "b", "c"))), (tokens, mask, segments, torch.tensor([0, 2, 1, 1]))
    if kind == "tag":
        labels = torch.randint(3, (4, 10), generator=generator).masked_fill(~mask, -1)
        labels[:, 0] = -1
        return EncoderModel(TINY.with_head("tag", ("a", "b", "c"))), (tokens, mask, segments, labels)
    return EncoderModel(TINY.with_head("answer")), (tokens, mask, segments, torch.tensor([[1, 3], [0, 0], [2, 2], [4, 4]]))


CASES = {
    "mlm": (masked_lm_loss, lambda: (EncoderModel(TINY), batch()[:3])),
    "electra": (replaced_token_loss(0.3), lambda: (Electra(dataclasses.replace(TINY, published_as="electra"), 0.5), batch())),
    "electra-masked": (
        replaced_token_loss(0.3, tokens="masked"),
        lambda: (Electra(dataclasses.replace(TINY, published_as="electra"), 0.5), batch()),
    ),
    "classify": (classification_loss, lambda: labelled("classify")),
    "tag": (tagging_loss, lambda: labelled("tag")),
    "answer": (span_loss, lambda: labelled("answer")),
}


@pytest.mark.parametrize("name", CASES)
def test_any_split_of_a_batch_gives_the_same_sums_and_gradient(name):
    loss, make = CASES[name]
    model, whole = make()
    drawn(model)

    def sums(batches):
        results = [loss(model, part) for part in batches]
        total = sum(result[0] for result in results)
        grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        metrics = {key: float(sum(result[2][key] for result in results)) for key in results[0][2]}
        return float(total.detach()), float(sum(result[1] for result in results)), metrics, [g for g in grads if g is not None]

    together = sums([whole])
    alone = sums([tuple(part[i : i + 1] for part in whole) for i in range(4)])
    assert together[0] == pytest.approx(alone[0], rel=1e-5) and together[1] == alone[1]
    assert together[2] == pytest.approx(alone[2], rel=1e-5)
    for a, b in zip(together[3], alone[3]):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_masked_lm_counts_the_hidden_tokens_only():
    model = drawn(EncoderModel(TINY))
    inputs, targets, mask, _ = batch()
    loss, count, metrics = masked_lm_loss(model, (inputs, targets, mask))
    logits = model.scores(model(inputs, mask))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert count == int((targets >= 0).sum())
    assert float(metrics["accuracy"]) == int((logits.argmax(-1) == targets).sum())


def test_a_guess_is_where_the_cumulative_probability_passes_the_uniform_number():
    scores = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(5, 1)
    assert sample_at(scores, torch.tensor([0.05, 0.15, 0.31, 0.61, 0.999999])).tolist() == [0, 1, 2, 3, 3]


def test_guesses_have_the_generators_probabilities():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    share = torch.bincount(sample_at(scores.expand(20_000, 4), uniform), minlength=4) / 20_000
    torch.testing.assert_close(share, scores.softmax(-1), atol=1e-4, rtol=0)


def test_the_discriminator_teaches_the_generator_nothing_but_shared_embeddings():
    model = drawn(Electra(dataclasses.replace(TINY, published_as="electra"), 0.5))
    inputs, targets, mask, uniform = batch()
    own = [p for name, p in model.named_parameters() if name.startswith("generator.")]
    both = torch.autograd.grad(replaced_token_loss(0.3, weight=50.0)(model, (inputs, targets, mask, uniform))[0], own)
    alone = torch.autograd.grad(replaced_token_loss(0.3, weight=0.0)(model, (inputs, targets, mask, uniform))[0], own)
    assert all(torch.equal(a, b) for a, b in zip(both, alone))


def test_a_right_guess_counts_as_original_and_padding_does_not_count():
    """A generator that knows the answer replaces nothing: all labels are "original", and the fresh discriminator costs ln 2 a token."""
    model = Electra(dataclasses.replace(TINY, published_as="electra"), 0.5).init_weights(torch.Generator().manual_seed(0))
    inputs, _, mask, uniform = batch()
    with torch.no_grad():
        model.generator.head.bias[7] = 1e4
    targets = torch.where(inputs == 3, torch.where(mask, 7, -100), -100)
    loss, count, metrics = replaced_token_loss(0.15, weight=50.0)(model, (inputs, targets, mask, uniform))
    assert float(metrics["replaced_share"]) == 0 and float(count) == int(mask.sum())
    assert float(metrics["rtd_nats"]) == pytest.approx(math.log(2) * int(mask.sum()), rel=1e-4)
    assert float(loss.detach()) == pytest.approx(50 * math.log(2) * int(mask.sum()), rel=1e-3)


def test_a_span_costs_the_mean_of_its_two_ends():
    model, (tokens, mask, segments, spans) = labelled("answer")
    drawn(model)
    loss, count, _ = span_loss(model, (tokens, mask, segments, spans))
    expected = 0.0
    for i in range(4):
        width = int(mask[i].sum())
        logits = model.scores(model(tokens[i : i + 1, :width], None, segments[i : i + 1, :width]))[0]
        expected += sum(float(F.cross_entropy(logits[:, end], spans[i, end]).detach()) for end in (0, 1)) / 2
    assert count == 4 and float(loss.detach()) == pytest.approx(expected, rel=1e-5)
