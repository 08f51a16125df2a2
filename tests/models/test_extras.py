"""Options that exported formats cannot hold: what they compute, where they are stored, and who refuses them."""

from dataclasses import replace

import pytest
import torch

from plinth.config import UserError, read_json
from plinth.models.config import EXTRAS, DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.training.objectives import causal_lm_loss
from plinth.training.sharding import check_divisible
from plinth.training.transfer import Parametrization

BASE = DecoderConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64, max_seq_len=64
)
OPTIONS = {"logit_softcap": 2.0}
CONFIGS = {name: replace(BASE, **{name: value}) for name, value in OPTIONS.items()} | {"all": replace(BASE, **OPTIONS)}


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def config(request) -> DecoderConfig:
    return CONFIGS[request.param]


def random_model(config: DecoderConfig) -> Transformer:
    model, generator = Transformer(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def tokens(rows: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(5))


def test_every_option_is_tested_here():
    assert set(OPTIONS) == set(EXTRAS)


def test_the_default_has_no_extras():
    assert BASE.extras == {} and BASE.to_hf()["model_type"] == "qwen3"


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_ignored(name):
    """Each option, with its weights away from their neutral start, changes the scores, and its loss is that of these scores."""
    model, x = random_model(CONFIGS[name]), tokens()
    plain = random_model(BASE)
    shared = plain.state_dict()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key in shared:
                shared[key].copy_(value)
        assert not torch.allclose(model.logits(model(x)), plain.logits(plain(x)), atol=1e-3)
    loss, count, _ = causal_lm_loss(model, (x[:, :-1], x[:, 1:]))
    expected = torch.nn.functional.cross_entropy(model.logits(model(x[:, :-1])).flatten(0, 1), x[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    assert count == x[:, 1:].numel()


def test_bf16_training_gives_every_parameter_a_gradient_near_that_of_fp32(config):
    x, gradients = tokens(rows=8), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(config).to(dtype)
        causal_lm_loss(model, (x, x.roll(-1, 1)))[0].backward()
        gradients[dtype] = {name: p.grad.float() for name, p in model.named_parameters()}
    for name, wanted in gradients[torch.float32].items():
        assert wanted.norm() > 0, name
        assert (gradients[torch.bfloat16][name] - wanted).norm() < 0.15 * wanted.norm(), name


def test_a_published_model_comes_back_bit_for_bit_and_is_no_other_programs(config, tmp_path):
    model = random_model(config)
    save_model(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == config
    state, back = model.state_dict(), loaded.state_dict()
    assert state.keys() == back.keys() and all(torch.equal(state[name], back[name]) for name in state)
    assert read_json(tmp_path / "model" / "config.json")["model_type"] == "plinth"


def test_extras_and_the_name_of_the_architecture_go_together():
    values = CONFIGS["all"].to_hf()
    with pytest.raises(UserError, match="does not go with the extras"):
        DecoderConfig.from_hf(values | {"model_type": "qwen3"})
    with pytest.raises(UserError, match="does not go with the extras"):
        DecoderConfig.from_hf(BASE.to_hf() | {"model_type": "plinth"})


def test_other_parametrisations_and_several_processes_refuse_by_name(config):
    name = next(iter(config.extras))
    with pytest.raises(UserError, match=f"has no rule for {name}"):
        Parametrization("mup", base_width=16).apply(config)
    with pytest.raises(UserError, match=f"{name}.*train on one process"):
        check_divisible(Transformer(config), 1)


def test_a_cap_must_be_positive():
    with pytest.raises(UserError, match=r"logit_softcap=0\.0 must be positive"):
        replace(BASE, logit_softcap=0.0)
