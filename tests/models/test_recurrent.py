"""The AWD-LSTM: its counts, torch.nn.LSTM as the oracle, causality, carried state, generation by steps, what dropout drops."""

import pytest
import torch

from plinth.config import UserError
from plinth.models.meta import on_meta
from plinth.models.recurrent import DROPOUTS, AwdLstm, AwdLstmConfig

CONFIG = AwdLstmConfig(vocab_size=31, embedding_size=6, hidden_size=10, num_layers=3)


def make(config=CONFIG, seed=0):
    return AwdLstm(config).init_weights(torch.Generator().manual_seed(seed))


def draw(rows=2, length=9, seed=1):
    return torch.randint(31, (rows, length), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tie", [True, False])
def test_the_layers_are_those_of_torch(tie):
    model = make(AwdLstmConfig(vocab_size=31, embedding_size=6, hidden_size=10, num_layers=2, tie_embeddings=tie))
    x = model.embed(draw())
    for layer in model.layers:
        oracle = torch.nn.LSTM(layer.weight_ih.shape[1], layer.hidden_size, batch_first=True)
        oracle.load_state_dict({f"{name}_l0": weight for name, weight in layer.named_parameters()})
        x, _ = oracle(x)
    torch.testing.assert_close(model(draw()), x)
    head = model.embed.weight if tie else model.head.weight
    torch.testing.assert_close(model.logits(x), x @ head.T + model.head_bias)


def test_parameters_follow_the_closed_form():
    def layer(width, out):
        return 4 * (width * out + out * out + 2 * out)

    counted = sum(parameter.numel() for parameter in make().parameters())
    assert counted == 31 * 6 + 31 + layer(6, 10) + layer(10, 10) + layer(10, 6)
    assert CONFIG.train_flops_per_token == 6 * (sum(make().get_parameter(name).numel() for name in make().matrix_parts()) + 31 * 6)


def test_the_published_shape_has_its_count():
    # Merity et al. 2017, table 1: 24 million on the Penn Treebank (400 wide embeddings, 1150 wide layers, 10,000 words).
    model = on_meta(lambda: AwdLstm(AwdLstmConfig(vocab_size=10_000, embedding_size=400, hidden_size=1150, num_layers=3)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 24_221_600


def test_no_future_token_changes_a_past_state_and_rows_stand_alone():
    model, tokens = make(), draw()
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 31
    assert torch.equal(model(tokens)[:, :5], model(changed)[:, :5])
    torch.testing.assert_close(model(tokens)[1:], model(tokens[1:]))


def test_state_carried_over_a_cut_gives_what_the_whole_text_gives():
    model, tokens = make(), draw()
    whole = model.run(tokens)
    first = model.run(tokens[:, :4])
    rest = model.run(tokens[:, 4:], first.state)
    for i in range(CONFIG.num_layers):
        torch.testing.assert_close(torch.cat([first.raw[i], rest.raw[i]], 1), whole.raw[i])
        for a, b in zip(rest.state[i], whole.state[i]):
            torch.testing.assert_close(a, b)


def test_padding_on_the_right_changes_neither_outputs_nor_state():
    model, tokens = make(), draw()
    run = model.run(tokens, lengths_B=torch.tensor([9, 4]))
    alone = model.run(tokens[1:, :4])
    torch.testing.assert_close(run.raw[-1][1:, :4], alone.raw[-1])
    torch.testing.assert_close(run.state[-1][1][1:], alone.state[-1][1])
    assert not run.raw[-1][1, 4:].any()


def test_steps_give_what_the_whole_text_gives_and_states_are_picked_by_row():
    model, tokens = make(), draw()
    state = model.begin(model.encode(None, None), 2)
    expected = model.logits(model(tokens))
    for t in range(6):
        scores, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(scores, expected[:, t])
    swapped = state.select(torch.tensor([1, 1, 0]))
    scores, _ = model.step(tokens[:, 6][[1, 1, 0]], swapped)
    torch.testing.assert_close(scores, expected[[1, 1, 0], 6])


def test_dropout_comes_from_the_generator_alone():
    model, tokens = make(), draw()
    assert torch.equal(model(tokens), model.train()(tokens))
    first, again, other = (model.run(tokens, generator=seeded(seed)).hidden[-1] for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_changes_what_it_should(name):
    config = AwdLstmConfig(**{**CONFIG.__dict__, **CONFIG.without_dropout().__dict__, name: 0.5})
    model, tokens = make(config), draw(rows=4)
    plain, dropped = model.run(tokens), model.run(tokens, generator=seeded(2))
    changed = [not torch.equal(a, b) for a, b in zip(plain.raw, dropped.raw)]
    outputs_only = name == "output_dropout"
    assert changed == ([False] * 3 if outputs_only else [name != "hidden_dropout", True, True])
    if outputs_only:
        zeros = dropped.hidden[-1] == 0
        assert zeros.any() and torch.equal(zeros, zeros[:, :1].expand_as(zeros))


def test_dropped_recurrent_weights_are_one_matrix_for_all_positions():
    layer = make().layers[0]
    weights = layer.weights(0.5, seeded(1))
    kept = weights[1] != 0
    torch.testing.assert_close(weights[1][kept], 2 * layer.weight_hh[kept])
    assert 0.2 < float(kept.float().mean()) < 0.8 and weights[0] is layer.weight_ih
    x = torch.randn(2, 5, 6, generator=seeded())
    state = layer.zero_state(2)
    outputs, _ = layer(x, state, None, weights)
    oracle = torch.nn.LSTM(6, 10, batch_first=True)
    oracle.load_state_dict(dict(zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), weights)))
    torch.testing.assert_close(outputs, oracle(x)[0])


def test_groups_from_input_to_output_hold_every_parameter_once():
    for tie in (True, False):
        model = make(AwdLstmConfig(vocab_size=31, embedding_size=6, hidden_size=10, num_layers=2, tie_embeddings=tie))
        names = [name for group in model.depth_groups() for name in group]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        assert len(model.depth_groups()) == (3 if tie else 4)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 0), ("weight_dropout", 1.0), ("input_dropout", -0.1)])
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(UserError, match=f"{field}={value} must be at least"):
        AwdLstmConfig(**{field: value})
