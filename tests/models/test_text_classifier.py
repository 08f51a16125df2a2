"""The classifier on a language model: padding, chunks, frozen groups, batch norm's statistics, saving and loading."""

from dataclasses import replace

import pytest
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.models.text_classifier import BatchNorm, PooledHeadConfig, TextClassifier, TextClassifierConfig
from plinth.models.transformer import Transformer

LSTM = AwdLstmConfig(vocab_size=31, embedding_size=6, hidden_size=10, num_layers=2)
DECODER = DecoderConfig(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=32, max_seq_len=32)
TRUNKS = {"awd-lstm": LSTM, "decoder": DECODER, "decoder, head of its own": replace(DECODER, tie_embeddings=False)}
HEAD = PooledHeadConfig(hidden_size=5)


def make(trunk, head=HEAD):
    model = TextClassifier(TextClassifierConfig(trunk, ("a", "b", "c"), head)).init_weights(seeded())
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may be hidden by a matrix that starts at 0
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeded(3)))
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(rows=3, length=12):
    return torch.randint(31, (rows, length), generator=seeded(1)), torch.tensor([12, 1, 7])


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_padding_changes_nothing_and_rows_stand_alone(trunk):
    model, (tokens, lengths) = make(trunk), draw()
    scores = model(tokens, lengths)
    outside = torch.arange(12) >= lengths[:, None]
    torch.testing.assert_close(model(tokens.masked_fill(outside, 7), lengths), scores)
    alone = torch.cat([model(row[None, :n], torch.tensor([n])) for row, n in zip(tokens, lengths.tolist())])
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 12, None])
def test_a_text_in_pieces_gives_what_the_whole_gives(size):
    model, (tokens, lengths) = make(LSTM, replace(HEAD, chunk_tokens=None)), draw()
    whole = model(tokens, lengths)
    model.config = replace(model.config, head=replace(HEAD, chunk_tokens=size))
    torch.testing.assert_close(model(tokens, lengths), whole)


def test_gradients_stay_in_their_piece_and_in_the_last_tokens():
    def gradient(chunk, learnt):
        model = make(LSTM, replace(HEAD, pooling="last", chunk_tokens=chunk, gradient_tokens=learnt))
        tokens = torch.arange(12)[None]  # every token once: its row of the embedding's gradient is its own
        (found,) = torch.autograd.grad(model(tokens, torch.tensor([12])).square().sum(), [model.trunk.embed.weight])
        return found.abs().sum(1)[:12] > 0

    assert gradient(None, None).all()
    assert gradient(4, None).tolist() == [False] * 8 + [True] * 4  # the last state belongs to the last piece
    model = make(LSTM, replace(HEAD, pooling="mean", chunk_tokens=4, gradient_tokens=5))
    (found,) = torch.autograd.grad(model(torch.arange(12)[None], torch.tensor([12])).square().sum(), [model.trunk.embed.weight])
    assert (found.abs().sum(1)[:12] > 0).tolist() == [False] * 4 + [True] * 8


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_groups_hold_every_parameter_once_and_frozen_ones_get_no_gradient(trunk):
    model, (tokens, lengths) = make(trunk), draw()
    groups, named = model.depth_groups(), dict(model.named_parameters())
    assert sorted(name for group in groups for name in group) == sorted(named)
    assert groups[0][0] == "trunk.embed.weight" and all(name.startswith("head.") for name in groups[-1])
    weights = torch.randn(3, 3, generator=seeded(8))
    whole = None
    for frozen in range(len(groups)):
        loss = (model(tokens, lengths, frozen=frozen) * weights).sum()
        grads = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)))
        whole = whole or grads
        for i, group in enumerate(groups):
            for name in group:
                if i < frozen:
                    assert grads[name] is None, (frozen, name)
                else:
                    torch.testing.assert_close(grads[name], whole[name])


def test_batch_norm_is_torchs_over_a_batch_and_over_kept_statistics():
    ours, theirs = BatchNorm(4), torch.nn.BatchNorm1d(4)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))
        ours.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias}, strict=False)
    x = torch.randn(9, 4, generator=seeded()) * 3 + 1
    torch.testing.assert_close(ours(x, over_batch=True), theirs(x))
    settled = ours.settle(x)
    torch.testing.assert_close(settled, ours(x, over_batch=True).detach())
    torch.testing.assert_close(ours(x[:2], over_batch=False), settled[:2])


def test_settled_statistics_are_those_of_the_examples():
    model, (tokens, lengths) = make(LSTM), draw()
    model.settle([(tokens[:2], lengths[:2]), (tokens[2:], lengths[2:])])
    pooled = model.pooled(tokens, lengths)
    torch.testing.assert_close(model.head.norms[0].mean, pooled.mean(0))
    hidden = torch.relu(model.head.layers[0](model.head.norms[0](pooled, over_batch=True)))
    torch.testing.assert_close(model.head.norms[1].variance, hidden.var(0, correction=0))
    torch.testing.assert_close(model.head.norms[1](hidden, False).mean(0), model.head.norms[1].bias)


def test_dropout_and_batch_statistics_come_with_a_generator_alone():
    model, (tokens, lengths) = make(LSTM), draw()
    assert torch.equal(model(tokens, lengths), model.train()(tokens, lengths))
    first, again, other = (model(tokens, lengths, seeded(seed)) for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_saved_and_loaded_it_is_the_same(trunk, tmp_path):
    model, (tokens, lengths) = make(trunk, replace(HEAD, backwards=True)), draw()
    model.settle([(tokens, lengths)])
    save_model(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens, lengths), model(tokens, lengths))
    names = [name for name, _ in loaded.named_parameters()]
    assert not any("trunk.head" in name for name in names)


@pytest.mark.parametrize(
    ("config", "language_model"), [(LSTM, AwdLstm), (DECODER, Transformer), (TRUNKS["decoder, head of its own"], Transformer)]
)
def test_the_trunk_is_the_language_models(config, language_model):
    base = language_model(config).init_weights(seeded(5))
    model = make(config)
    model.load_trunk(base)
    tokens, lengths = draw()
    states = base(tokens)
    torch.testing.assert_close(model.pooled(tokens, lengths)[:, : states.shape[2]], states[torch.arange(3), lengths - 1])


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match="two labels or more"):
        TextClassifierConfig(LSTM, ("a", "a"), HEAD)
    with pytest.raises(UserError, match="pooled_dropout=1.0"):
        PooledHeadConfig(pooled_dropout=1.0)
    with pytest.raises(UserError, match="chunk_tokens=0 must be at least 1"):
        PooledHeadConfig(chunk_tokens=0)
