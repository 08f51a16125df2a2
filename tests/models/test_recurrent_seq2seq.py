"""Recurrent sequence to sequence: exact counts, torch.nn as the oracle, padding, steps against whole targets, attention by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from plinth.config import UserError
from plinth.models import recurrent
from plinth.models.meta import on_meta
from plinth.models.recurrent_attention import AdditiveAttention, MultiplicativeAttention
from plinth.models.recurrent_seq2seq import RecurrentSeq2Seq, RecurrentSeq2SeqConfig
from plinth.ops.recurrent import STEPS

TINY = RecurrentSeq2SeqConfig(source_vocab_size=23, target_vocab_size=19, embedding_size=6, hidden_size=8)
PLAIN = replace(TINY, attention="none", bidirectional=False)
KINDS = {
    "sutskever": replace(PLAIN, cell="lstm", num_layers=2, repeat_context=False),
    "cho": PLAIN,
    "none, both directions": replace(PLAIN, cell="lstm", bidirectional=True),
    "bahdanau": TINY,
    "bahdanau, lstm of two layers": replace(TINY, cell="lstm", num_layers=2),
    "luong general": replace(TINY, cell="lstm", attention="multiplicative"),
    "luong dot": replace(TINY, attention="multiplicative", bidirectional=False, score="dot"),
    "luong, input feeding": replace(TINY, attention="multiplicative", input_feeding=True, num_layers=2),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def make(config, seed=0):
    return RecurrentSeq2Seq(config).init_weights(torch.Generator().manual_seed(seed)).double()


def draw(vocab, *shape, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def count(config):
    return sum(parameter.numel() for parameter in on_meta(lambda: RecurrentSeq2Seq(config)).parameters())


@pytest.mark.parametrize(
    ("expected", "fields"),
    [  # published: bentrevett's pytorch-seq2seq, notebooks 1 to 3
        (13_898_501, {"cell": "lstm", "attention": "none", "bidirectional": False, "num_layers": 2, "repeat_context": False}),
        (14_219_781, {"cell": "gru", "attention": "none", "bidirectional": False}),
        (20_518_405, {"cell": "gru", "attention": "additive"}),
    ],
)
def test_counts_are_the_published_ones_to_the_unit(expected, fields):
    assert count(RecurrentSeq2SeqConfig(source_vocab_size=7853, target_vocab_size=5893, **fields)) == expected


@every_kind
def test_steps_give_what_a_whole_target_gives(config):
    model, source, targets = make(config), draw(23, 3, 7), draw(19, 3, 5)
    reads = model(source, targets)
    state = model.begin(model.encode(source), 3)
    for t in range(5):
        scores, state = model.step(targets[:, t], state)
        torch.testing.assert_close(scores, model.logits(reads[:, t]).float())
    memory = model.encode(source)
    stepped, _ = model._run_steps(targets, memory, 1.0, None)
    torch.testing.assert_close(stepped, reads)


@every_kind
def test_a_row_does_not_depend_on_its_company_its_place_or_its_padding(config):
    model, source, targets = make(config), draw(23, 3, 7), draw(19, 3, 5)
    lengths = torch.tensor([7, 2, 4])
    mask = torch.arange(7) < lengths[:, None]
    reads = model(source, targets, mask)
    other = model(source.where(mask, (source + 5) % 23), targets, mask)
    assert torch.equal(reads, other)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(source[order], targets[order], mask[order]), reads[order])
    for i, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(model(source[i : i + 1, :length], targets[i : i + 1])[0], reads[i])


@every_kind
def test_no_future_target_changes_a_past_score(config):
    model, source, targets = make(config), draw(23, 2, 7), draw(19, 2, 5)
    changed = targets.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 19
    assert torch.equal(model(source, targets)[:, :3], model(source, changed)[:, :3])


def test_the_plain_lstm_is_two_of_torchs():
    config = KINDS["sutskever"]
    model, source, targets = make(config), draw(23, 3, 7), draw(19, 3, 5)

    def oracle(layers, size):
        module = nn.LSTM(size, 8, num_layers=2, batch_first=True).double()
        module.load_state_dict({f"{name}_l{i}": weight for i, layer in enumerate(layers) for name, weight in layer.named_parameters()})
        return module

    _, state = oracle(model.encoder.forwards, 6)(model.encoder.embed(source))
    outputs, _ = oracle(model.layers, 6)(model.embed(targets), state)
    torch.testing.assert_close(model(source, targets), outputs)


def test_the_encoder_of_both_directions_is_torchs():
    model, source = make(TINY), draw(23, 3, 7)
    module = nn.GRU(6, 8, batch_first=True, bidirectional=True).double()
    both = ((model.encoder.forwards[0], ""), (model.encoder.backwards[0], "_reverse"))
    module.load_state_dict({f"{name}_l0{end}": weight for layer, end in both for name, weight in layer.named_parameters()})
    outputs, state = module(model.encoder.embed(source))
    memory = model.encode(source)
    torch.testing.assert_close(memory.values_BSD, outputs)
    bridge = model.encoder.bridges[0]
    torch.testing.assert_close(memory.first[0][0], torch.tanh(bridge(torch.cat([state[0], state[1]], -1))))


def test_additive_attention_by_its_formula():
    attention = AdditiveAttention(2, 3, 4).double()
    query, values = (
        torch.randn(1, n, width, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n, width in ((1, 2), (5, 3))
    )
    context, weights = attention(query, attention.keys(values), values)
    matrix = torch.cat([attention.query.weight, attention.key.weight], 1)
    scores = torch.stack([
        attention.score.weight[0] @ torch.tanh(matrix @ torch.cat([query[0, 0], value]) + attention.key.bias) for value in values[0]
    ])  # fmt: skip
    torch.testing.assert_close(weights[0, 0], torch.softmax(scores, 0))
    torch.testing.assert_close(context[0, 0], torch.softmax(scores, 0) @ values[0])


def test_multiplicative_attention_by_its_formula():
    general = MultiplicativeAttention(2, 3, "general").double()
    query, values = (
        torch.randn(1, n, width, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n, width in ((1, 2), (5, 3))
    )
    expected = torch.softmax(values[0] @ general.key.weight.T @ query[0, 0], 0)
    torch.testing.assert_close(general(query, general.keys(values), values)[1][0, 0], expected)
    dot = MultiplicativeAttention(3, 3, "dot")
    torch.testing.assert_close(dot(values[:, :1], dot.keys(values), values)[1][0, 0], torch.softmax(values[0] @ values[0, 0], 0))


@pytest.mark.parametrize("config", [config for config in KINDS.values() if config.attention != "none"])
def test_attention_weights_are_those_of_the_forward_pass(config):
    model, source, targets = make(config), draw(23, 7), draw(19, 5)
    weights = model.attention_weights(source, targets)["cross"]
    assert weights.shape == (1, 1, 5, 7) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 5))
    memory = model.encode(source[None])
    state = model.begin(memory)
    for t in range(5):
        _, state, looked = model.advance(targets[None, t], state)
        torch.testing.assert_close(looked[0].float(), weights[0, 0, t])
    assert make(PLAIN).attention_weights(source, targets) == {}


@every_kind
def test_operations_are_those_that_pytorch_counts(config, monkeypatch):
    def by_steps(cell, x, state, weights, lengths=None):  # PyTorch counts no operations of its own recurrent layers
        outputs = []
        for t in range(x.shape[1]):
            state = STEPS[cell](x[:, t], state, weights)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state

    monkeypatch.setattr(recurrent, "run_layer", by_steps)
    model = make(config)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(draw(23, 1, 7), draw(19, 1, 5)))
    assert 3 * counter.get_total_flops() == config.train_flops(7, 5)


def test_teacher_forcing_at_zero_reads_its_own_tokens_and_at_one_the_targets():
    model, source, targets = make(TINY), draw(23, 3, 7), draw(19, 3, 6)
    assert torch.equal(model(source, targets), model(source, targets, teacher_forcing=1.0))
    free = model(source, targets, teacher_forcing=0.0)
    own = torch.cat([targets[:, :1], model.logits(free).argmax(-1)[:, :-1]], 1)
    torch.testing.assert_close(model(source, own), free)
    generators = (torch.Generator().manual_seed(3) for _ in range(2))
    first, again = (model(source, targets, teacher_forcing=0.5, generator=generator) for generator in generators)
    assert torch.equal(first, again)


@every_kind
def test_every_parameter_gets_a_gradient_and_matrices_are_named(config):
    model = make(config)
    model(draw(23, 3, 7), draw(19, 3, 5)).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["head.weight", "head.bias"]
    for name, rows in model.matrix_parts().items():
        assert sum(rows) == model.get_parameter(name).shape[0] and model.get_parameter(name).dim() == 2


def test_states_are_picked_by_row():
    model, source, targets = make(KINDS["luong, input feeding"]), draw(23, 3, 7), draw(19, 3, 5)
    _, state = model.step(targets[:, 0], model.begin(model.encode(source), 3))
    rows = torch.tensor([2, 2, 0])
    torch.testing.assert_close(model.step(targets[rows, 1], state.select(rows))[0], model.step(targets[:, 1], state)[0][rows])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_named(fields, text):
    with pytest.raises(UserError, match=text):
        RecurrentSeq2SeqConfig(**fields)


def test_dot_needs_as_many_numbers_on_both_sides():
    with pytest.raises(UserError, match="8 numbers with the encoder's 16.*score=general"):
        make(replace(TINY, attention="multiplicative", score="dot"))
