"""Options that exported formats cannot hold: what they compute, where they are stored, and who refuses them."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plinth.config import UserError, read_json
from plinth.models.config import EXTRAS, DecoderConfig
from plinth.models.cost import activation_bytes_per_token, count_params, decode_bytes_per_token, forward_flops_per_token
from plinth.models.formats.decoder_config import read_config, write_config
from plinth.models.formats.tensors import InMemory, fill
from plinth.models.hub import export_tensors, format_of, load_model, save_model
from plinth.models.transformer import Transformer
from plinth.ops.kernels import library, why_not
from plinth.training.compile import compiled_blocks
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.sharding import check_divisible
from plinth.training.step import open_workers, train_step
from plinth.training.transfer import Parametrization

BASE = DecoderConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64, max_seq_len=64
)
OPTIONS = {"logit_softcap": 2.0, "activation": "relu2", "residual_scalars": True, "value_embeddings": True}
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
    assert BASE.extras == {} and write_config(BASE)["model_type"] == "qwen3"


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_ignored(name):
    """Each option, with its weights away from their neutral start, changes the scores, and its loss is that of these scores."""
    model, x = random_model(CONFIGS[name]), tokens()
    plain = random_model(BASE)
    shared = plain.state_dict()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key in shared and shared[key].shape == value.shape:
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
    values = write_config(CONFIGS["all"])
    with pytest.raises(UserError, match="does not go with the extras"):
        read_config(values | {"model_type": "qwen3"})
    with pytest.raises(UserError, match="does not go with the extras"):
        read_config(write_config(BASE) | {"model_type": "plinth"})


def test_other_parametrisations_and_several_processes_refuse_by_name(config):
    name = next(iter(config.extras))
    with pytest.raises(UserError, match=f"has no rule for {name}"):
        Parametrization("mup", base_width=16).apply(config)
    with pytest.raises(UserError, match=f"{name}.*train on one process"):
        check_divisible(Transformer(config), 1)


def test_a_cap_must_be_positive():
    with pytest.raises(UserError, match=r"logit_softcap=0\.0 must be positive"):
        replace(BASE, logit_softcap=0.0)


def test_an_activation_must_be_known():
    with pytest.raises(UserError, match="activation='relu' is unknown. Use one of swiglu, relu2, geglu"):
        replace(BASE, activation="relu")


@pytest.mark.parametrize("name", ["residual_scalars", "value_embeddings"])
def test_the_start_is_that_of_the_plain_decoder(name):
    """Also where the matrices that write to the residual stream are no longer 0, so that nothing hides a difference."""
    plain, model = (Transformer(config).init_weights(torch.Generator().manual_seed(1)) for config in (BASE, CONFIGS[name]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for (own, parameter), (other, copy) in zip(plain.named_parameters(), pairs_with(plain, model)):
            assert own == other and torch.equal(parameter, copy)
            if own.endswith(("out.weight", "down.weight")):
                copy.copy_(parameter.normal_(0.0, 0.3, generator=generator))
        assert torch.equal(model(tokens()), plain(tokens()))


def pairs_with(plain: Transformer, model: Transformer) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters of a model that the plain one has too."""
    names = dict(plain.named_parameters())
    return [(name, parameter) for name, parameter in model.named_parameters() if name in names]


def test_squared_relu_by_hand():
    mlp = Transformer(replace(BASE, activation="relu2", hidden_size=2, intermediate_size=2)).layers[0].mlp
    with torch.no_grad():
        mlp.up.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        mlp.down.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        found = mlp(torch.tensor([[3.0, -5.0], [1.0, 2.0]]))
    assert found.tolist() == [[9.0, 0.0], [9.0, -4.0]]  # (9, 0) and (1, 4) before the last matrix


def test_the_stream_is_mixed_as_written():
    model, x = random_model(CONFIGS["residual_scalars"]), tokens()
    with torch.no_grad():
        embedded = model.embed(x)
        first = embedded * torch.rsqrt(embedded.square().mean(-1, keepdim=True) + BASE.norm_eps)
        cos, sin = model.rotation(torch.arange(x.shape[1]))
        stream = embedded
        for i, layer in enumerate(model.layers):
            total, delta = layer(model.resid_lambda[i] * stream + model.x0_lambda[i] * first, None, cos, sin)
            stream = total + delta
        torch.testing.assert_close(model(x), model.final_norm(stream))


def test_values_of_every_other_block_up_to_the_last_have_an_embedding():
    for num_layers, expected in ((1, [True]), (3, [True, False, True]), (4, [False, True, False, True])):
        config = replace(BASE, num_layers=num_layers, value_embeddings=True)
        assert [config.has_value_embedding(i) for i in range(num_layers)] == expected
        assert config.num_value_embeddings == sum(expected)
        assert [layer.attention.value_embed is not None for layer in Transformer(config).layers] == expected


def test_the_gate_of_a_value_embedding_by_hand():
    embedding = random_model(CONFIGS["value_embeddings"]).layers[0].attention.value_embed
    x, ids = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1, 3, 0, 95])
    with torch.no_grad():
        gates = 2 * torch.sigmoid(x[:, :12] @ embedding.gate.weight.T)
        expected = embedding.table.weight[ids].view(5, 2, 8) * gates[..., None]
        torch.testing.assert_close(embedding(ids, x), expected)


def test_parameters_and_operations_are_those_of_the_model(config):
    model, counts = Transformer(config), count_params(config)
    tables = [p.numel() for name, p in model.named_parameters() if name.endswith(("embed.weight", "value_embed.table.weight"))]
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["embedding"] == sum(tables) and counts["non_embedding"] == counts["total"] - counts["embedding"]
    assert counts["matrix"] == sum(model.get_parameter(name).numel() for name in model.matrix_parts())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(2, 16, dtype=torch.long)))
    assert counter.get_total_flops() == 2 * 16 * forward_flops_per_token(config, 16, causal=False)


def test_a_generated_token_reads_one_row_of_each_value_embedding():
    more, plain = (decode_bytes_per_token(c, 1, weight_bytes=2) for c in (CONFIGS["value_embeddings"], BASE))
    assert more - plain == 2 * 2 * (16 + 12 * 2)  # two blocks' rows of 2 heads of 8, and their gates


@pytest.mark.parametrize(
    "own_kernels",
    [False, pytest.param(True, marks=pytest.mark.skipif(library() is None, reason=f"no kernels of ours here: {why_not()}"))],
    ids=["torch", "own kernels"],
)
def test_kept_bytes_are_those_that_autograd_keeps(config, own_kernels, request):
    if not own_kernels:
        request.getfixturevalue("torch_kernels")
    config = replace(config, hidden_size=64, head_dim=32, logit_softcap=None)
    length, dtype = 32, torch.bfloat16 if own_kernels else torch.float32
    rotation = 2 * length * config.head_dim * 4
    found = kept_bytes(config, dtype, length) - rotation
    assert found == 2 * length * activation_bytes_per_token(config, length, dtype.itemsize, own_kernels=own_kernels)


def kept_bytes(config: DecoderConfig, dtype: torch.dtype, length: int) -> int:
    """Return the bytes that autograd keeps of a forward pass of two sequences, the rotation table included, tokens and weights not."""
    model = Transformer(config).to(dtype)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in ours:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    ids = torch.zeros(2, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) - ids.nbytes


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_muon_takes_only_the_matrices_and_decay_spares_tables_and_scalars(optimizer):
    """Without a gradient only decay moves a weight: by it one sees which are decayed."""
    model = random_model(CONFIGS["all"])
    masters = MasterWeights(model, torch.float32)
    built = build_optimizer(masters, OptimizerConfig(name=optimizer, weight_decay=0.5))
    before = {name: tensor.clone() for name, tensor in masters.tensors.items()}
    with open_workers(1) as workers:
        built.step({name: torch.zeros_like(tensor) for name, tensor in masters.tensors.items()}, 1.0, workers)
    moved = {name for name, tensor in masters.tensors.items() if not torch.equal(tensor, before[name])}
    assert moved == set(model.matrix_parts())
    assert all(f"exp_avg/{name}" in built.state for name in masters.tensors if name not in model.matrix_parts())
    assert {name: scale.lr for name, scale in built.scales.items() if scale.lr != 1.0} == {"x0_lambda": 3.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_batch_is_learnt_by_heart_and_every_new_weight_moves(config, dtype):
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    masters = MasterWeights(model, dtype)
    optimizer = build_optimizer(masters, OptimizerConfig(lr=0.01))
    before = {name: tensor.clone() for name, tensor in masters.tensors.items()}
    x = tokens()
    targets = (x + x.roll(1, 1)) % 96  # of two tokens, so that attention is needed
    with open_workers(1) as workers:
        losses = [train_step(masters, causal_lm_loss, [(x, targets)], optimizer, workers, lr_scale=1.0).loss_nats for _ in range(80)]
    assert losses[-1] < 0.3 * losses[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in masters.tensors.items())


def test_multipliers_are_folded_into_the_weights_of_the_options_too():
    """The published weights, in a decoder without multipliers, compute the same: what writes to the stream shrinks with it."""
    config = replace(BASE, **{name: value for name, value in OPTIONS.items() if name != "logit_softcap"}, output_multiplier=0.5)
    model = random_model(config)
    plain = replace(config, output_multiplier=1.0, norm_eps=config.norm_eps * 0.25, learnable_norm=True)
    folded = fill(format_of(plain), plain, InMemory(export_tensors(model)), torch.float32, "test")
    with torch.no_grad():
        torch.testing.assert_close(folded.logits(folded(tokens())), model.logits(model(tokens())), atol=1e-4, rtol=1e-4)


@pytest.fixture
def compiler():
    """Let what a test compiles leave nothing behind: the code of a block may be compiled a limited number of times."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_blocks_compile_as_one_graph_each(config, compiler):
    model = Transformer(config).to("meta")
    with compiled_blocks(model, backend="aot_eager"):
        causal_lm_loss(model, (tokens().to("meta"), tokens().to("meta")))[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_scales_of_norms_that_are_learnt_are_stored_beside_the_scalars(tmp_path):
    model = random_model(replace(CONFIGS["all"], learnable_norm=True))
    save_model(model, None, tmp_path / "model")
    back = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


def test_a_config_whose_activation_contradicts_itself_is_refused(tmp_path):
    save_model(random_model(CONFIGS["activation"]), None, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    assert read_json(path)["hidden_act"] == "relu2"
    path.write_text(path.read_text().replace('"hidden_act": "relu2"', '"hidden_act": "silu"'))
    with pytest.raises(UserError, match="hidden_act='silu' is not supported. Supported: relu2"):
        load_model(tmp_path / "model")
