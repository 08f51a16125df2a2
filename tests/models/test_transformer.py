"""Laws of the decoder."""

from dataclasses import replace

import pytest
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.formats.decoder_config import read_config
from plinth.models.transformer import Transformer

CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, max_seq_len=16
)


def make_model(config=CONFIG, seed=0):
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def tokens(rows=3, length=10):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


def test_no_future_token_changes_a_past_position():
    model, x = make_model(), tokens()
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 50
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_padding_on_the_right_changes_nothing_before_it():
    model, x = make_model(), tokens()
    padded = torch.cat((x, torch.zeros(3, 4, dtype=torch.long)), 1)
    torch.testing.assert_close(model(padded)[:, :10], model(x))


def test_a_permuted_batch_gives_permuted_results():
    model, x = make_model(), tokens()
    torch.testing.assert_close(model(x[[2, 0, 1]]), model(x)[[2, 0, 1]])


def test_learnt_scales_of_one_change_nothing():
    model = make_model()
    learnable = Transformer(replace(CONFIG, learnable_norm=True))
    learnable.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(learnable(tokens()), model(tokens()))


def test_initialisation_depends_on_the_generator_only():
    first, second, other = (Transformer(CONFIG).init_weights(torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.embed.weight, other.embed.weight)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_kv_heads", 3, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("head_dim", 7, "head_dim=7 is odd"),
        ("num_layers", 0, "num_layers=0 must be at least 1"),
        ("norm_eps", 0.0, "must be positive"),
    ],
)
def test_impossible_shapes_are_refused_by_name(field, value, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **{field: value})


def test_another_architecture_is_refused_by_name():
    with pytest.raises(UserError, match="'mamba' is not supported"):
        read_config({"model_type": "mamba"})
