"""Decoders with experts: laws, generation, training."""

from dataclasses import replace

import pytest
import torch

from plinth.models.config import DecoderConfig
from plinth.models.formats.decoder_config import read_config, write_config
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.training.compile import compiled_blocks
from plinth.training.objectives import causal_lm_loss

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, max_seq_len=64,
    num_experts=4, num_active_experts=2, expert_intermediate_size=16,
)  # fmt: skip
SHARED = replace(CONFIG, shared_expert_intermediate_size=24, shared_expert_gate=True, norm_topk_prob=False, dense_layers=(0,))


def random_model(config, seed=0) -> Transformer:
    """Return a decoder whose layers all do something: the matrices that begin at 0 are drawn too."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def tokens(rows=3, length=10):
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_one_expert_is_the_dense_decoder(activation):
    dense = random_model(replace(CONFIG, num_experts=0, expert_intermediate_size=None, activation=activation))
    single = Transformer(replace(dense.config, num_experts=1, num_active_experts=1))
    state = dense.state_dict()
    single.load_state_dict(state | {f"layers.{i}.mlp.router.weight": torch.randn(1, 32) for i in range(2)})
    torch.testing.assert_close(single(tokens()), dense(tokens()), rtol=1e-6, atol=1e-6)


def test_equal_experts_are_the_dense_decoder_whatever_the_router_says():
    dense = random_model(replace(CONFIG, num_experts=0, expert_intermediate_size=None))
    model = random_model(replace(CONFIG, expert_intermediate_size=None), seed=1)
    state = {name: tensor.repeat(4, 1) if "mlp." in name else tensor for name, tensor in dense.state_dict().items()}
    routers = {name: tensor for name, tensor in model.state_dict().items() if "router" in name}
    model.load_state_dict(state | routers)
    torch.testing.assert_close(model(tokens()), dense(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["experts", "shared"])
def test_no_future_token_changes_a_past_position_and_companions_change_nothing(config):
    model, ids = random_model(config), tokens()
    hidden = model(ids)
    later = ids.clone()
    later[:, 6:] = (later[:, 6:] + 1) % CONFIG.vocab_size
    torch.testing.assert_close(model(later)[:, :6], hidden[:, :6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids[1:2])[0], hidden[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["experts", "shared"])
def test_the_shared_expert_and_each_expert_are_used(config):
    model = random_model(config)
    model(tokens(8, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_which_blocks_have_experts():
    names = set(random_model(SHARED).state_dict())
    assert "layers.0.mlp.router.weight" not in names
    assert {
        f"layers.1.mlp.{part}.weight" for part in ("router", "gate_up", "down", "shared.gate_up", "shared.down", "shared_gate")
    } <= names


def test_muon_takes_the_experts_one_by_one_and_not_the_router():
    parts = random_model(SHARED).matrix_parts()
    assert parts["layers.1.mlp.gate_up.weight"] == (16,) * 8 and parts["layers.1.mlp.down.weight"] == (32,) * 4
    assert parts["layers.1.mlp.shared.gate_up.weight"] == (24, 24)
    assert not any("router" in name or "shared_gate" in name for name in parts)


def test_the_start_is_the_identity():
    model = Transformer(SHARED).init_weights(torch.Generator().manual_seed(0))
    x = model.embed(tokens())
    torch.testing.assert_close(model(tokens()), torch.nn.functional.rms_norm(x, (32,), eps=1e-6))


def test_the_blocks_compile_as_one_graph_each_where_experts_stay_on_the_device():
    torch._dynamo.reset()
    config = replace(SHARED, num_layers=1, dense_layers=())
    model, ids = Transformer(config).to(torch.bfloat16).to("meta"), tokens().to("meta")
    with compiled_blocks(model, backend="aot_eager"):
        causal_lm_loss(model, (ids, ids))[0].backward()
    torch._dynamo.reset()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_other_block_of_a_published_mixture_may_be_dense():
    values = write_config(replace(CONFIG, num_layers=4)) | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert read_config(values).dense_layers == (0, 2, 3)


def test_a_mixture_is_published_as_the_family_that_holds_it_and_says_how_it_was_trained(tmp_path):
    config = replace(CONFIG, router_aux_loss=0.5, router_z_loss=0.25)
    families = {
        "qwen3_moe": config,
        "mixtral": replace(config, qk_norm=False, expert_intermediate_size=None),
        "qwen2_moe": replace(SHARED, qk_norm=False, qkv_bias=True),
        "plinth": replace(config, shared_expert_intermediate_size=8),
    }
    for kind, each in families.items():
        values = write_config(each)
        assert values["model_type"] == kind and read_config(values) == each
        model = random_model(each)
        save_model(model, None, tmp_path / kind)
        back = load_model(tmp_path / kind)
        assert back.config == each and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values()))
