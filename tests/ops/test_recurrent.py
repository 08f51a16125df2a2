"""LSTM and GRU: torch.nn's modules as the oracle, steps written out as the slow twin, padding of any content."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from plinth.ops.recurrent import GATES, STATES, STEPS, attend, reverse_rows, run_layer

CELLS = ("lstm", "gru")
B, T, D, H = 3, 7, 5, 4


def make(cell, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = GATES[cell] * H

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    weights = (draw(rows, D), draw(rows, H), draw(rows), draw(rows))
    state = tuple(draw(B, H) for _ in range(STATES[cell]))
    return draw(B, T, D), state, weights


def oracle(cell, weights):
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](D, H, batch_first=True).double()
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    module.load_state_dict({name: weight.detach() for name, weight in zip(names, weights)})
    return module


def run_oracle(module, x, state, lengths):
    start = tuple(part.detach()[None] for part in state)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs, after = module(packed, start if len(start) == 2 else start[0])
    after = after if isinstance(after, tuple) else (after,)
    return pad_packed_sequence(outputs, batch_first=True, total_length=T)[0], tuple(part[0] for part in after)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [None, [7, 2, 5], [1, 7, 1]])
def test_outputs_states_and_gradients_are_those_of_torch(cell, lengths):
    x, state, weights = make(cell)
    module = oracle(cell, weights)
    outputs, after = run_layer(cell, x, state, weights, None if lengths is None else torch.tensor(lengths))
    x2 = x.detach().clone().requires_grad_()
    outputs2, after2 = run_oracle(module, x2, state, torch.tensor(lengths or [T] * B))
    close(outputs, outputs2)
    for mine, theirs in zip(after, after2):
        close(mine, theirs)
    direction = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(outputs, after):
        return (outputs * direction).sum() + sum(part.square().sum() for part in after)

    mine = torch.autograd.grad(loss(outputs, after), [x, *weights])
    theirs = torch.autograd.grad(loss(outputs2, after2), [x2, *module.parameters()])
    for a, b in zip(mine, theirs):
        close(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_the_call_equals_its_steps(cell):
    x, state, weights = make(cell)
    outputs, after = run_layer(cell, x, state, weights)
    for t in range(T):
        state = STEPS[cell](x[:, t], state, weights)
        close(outputs[:, t], state[0])
    for mine, theirs in zip(after, state):
        close(mine, theirs)


def test_a_gru_step_by_hand():
    # Width 1: reset = sigmoid(1), update = sigmoid(0) = 1/2, candidate = tanh(2 + sigmoid(1) * 3), from h = 1 and x = 1.
    weights = (torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.0], [0.0], [3.0]]), torch.zeros(3), torch.zeros(3))
    (h,) = STEPS["gru"](torch.ones(1, 1), (torch.ones(1, 1),), weights)
    expected = 0.5 * torch.tanh(2 + 3 * torch.sigmoid(torch.tensor(1.0))) + 0.5
    torch.testing.assert_close(h, expected[None, None])


@pytest.mark.parametrize("cell", CELLS)
def test_what_stands_in_the_padding_changes_nothing(cell):
    x, state, weights = make(cell)
    lengths = torch.tensor([3, 7, 4])
    other = x.detach().clone()
    other[0, 3:], other[2, 4:] = 99.0, -99.0
    first, second = (run_layer(cell, each, state, weights, lengths) for each in (x, other))
    assert torch.equal(first[0], second[0]) and all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


def test_rows_are_reversed_within_their_lengths():
    x = torch.arange(8.0).reshape(2, 4, 1)
    assert reverse_rows(x, torch.tensor([3, 4]))[..., 0].tolist() == [[2, 1, 0, 3], [7, 6, 5, 4]]
    assert torch.equal(reverse_rows(x), x.flip(1))


def test_attention_is_a_mean_over_what_is_not_masked():
    values = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    context, weights = attend(torch.zeros(1, 1, 3), values, torch.tensor([[True, True, False]]))
    assert context.tolist() == [[[0.5, 0.5]]] and weights.tolist() == [[[0.5, 0.5, 0.0]]]
