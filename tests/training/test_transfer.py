"""muP and CompleteP: the tables by hand, the identity at the base shape, the sizes of real updates, and models that export."""

from dataclasses import replace

import pytest
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model, save_model
from plinth.models.transformer import Transformer
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, Scale, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.step import open_workers, train_step
from plinth.training.transfer import Parametrization, init_model, init_scale, scales, update_scale

BASE = DecoderConfig(
    vocab_size=80, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64, max_seq_len=32
)
WIDE = replace(BASE, hidden_size=128, num_heads=8, num_kv_heads=8, intermediate_size=256, num_layers=8)
MUP = Parametrization("mup", base_width=32)
COMPLETEP = Parametrization("completep", base_width=32, base_depth=2)

# WIDE is four times as wide and four times as deep as BASE. Learning rate, weight decay, eps; worked by hand:
# the published rows are W: lr 1/4, decay 4, eps 1/4 (and eps/4 again for depth); f · W folds f into (f lr, decay / f, eps / f).
BY_HAND = {
    ("mup", "layers.3.attention.qkv.weight"): (1 / 4, 4, 1 / 4),
    ("mup", "layers.3.mlp.gate_up.weight"): (1 / 4, 4, 1 / 4),
    ("mup", "layers.3.attention.out.weight"): (1 / 4, 4, 1 / 4),
    ("mup", "layers.3.mlp.down.weight"): (1 / 4, 4, 1 / 4),
    ("mup", "embed.weight"): (1, 1, 1 / 4),
    ("mup", "head.weight"): (1 / 4, 4, 1),  # published: lr 1, decay 1, eps 1/4 behind a factor of 1/4
    ("mup", "layers.3.mlp_norm.weight"): (1, 1, 1 / 4),
    ("mup", "final_norm.weight"): (1, 1, 1 / 4),
    ("mup", "layers.3.attention.q_norm.weight"): (1, 1, 1),
    ("completep", "layers.3.attention.qkv.weight"): (1 / 4, 4, 1 / 16),
    ("completep", "layers.3.mlp.gate_up.weight"): (1 / 4, 4, 1 / 16),
    ("completep", "layers.3.attention.out.weight"): (1 / 16, 16, 1 / 4),  # published: 1/4, 4, 1/16 behind a factor of 1/4
    ("completep", "layers.3.mlp.down.weight"): (1 / 16, 16, 1 / 4),
    ("completep", "embed.weight"): (1, 1, 1 / 4),
    ("completep", "head.weight"): (1 / 4, 4, 1),
    ("completep", "layers.3.attention_norm.weight"): (1, 1, 1 / 16),
    ("completep", "final_norm.weight"): (1, 1, 1 / 4),
    ("completep", "layers.3.attention.k_norm.weight"): (1, 1, 1 / 4),
}


@pytest.mark.parametrize("name,parameter", BY_HAND)
def test_adamw_rules_worked_by_hand(name, parameter):
    parametrization = {"mup": MUP, "completep": COMPLETEP}[name]
    assert update_scale(parameter, WIDE, parametrization, muon=False) == Scale(*BY_HAND[name, parameter])


def test_muon_rules_worked_by_hand():
    for parametrization, branch in ((MUP, 1), (COMPLETEP, 1 / 4)):
        assert update_scale("layers.0.mlp.gate_up.weight", WIDE, parametrization, muon=True) == Scale()
        assert update_scale("layers.0.mlp.down.weight", WIDE, parametrization, muon=True) == Scale(branch, 1 / branch)


def test_initial_deviations_worked_by_hand():
    untied = replace(WIDE, tie_embeddings=False)
    model = init_model(untied, COMPLETEP, torch.Generator().manual_seed(0))
    deviations = {name: p.std().item() for name, p in model.named_parameters()}
    assert deviations["embed.weight"] == pytest.approx(1.0, rel=0.05)
    assert deviations["head.weight"] == pytest.approx(32**-0.5 / 4, rel=0.05)  # that of the base, times the factor 1/4
    assert deviations["layers.0.mlp.gate_up.weight"] == pytest.approx(128**-0.5, rel=0.05)
    assert init_scale("layers.0.mlp.down.weight", untied, COMPLETEP) == 1 / 4
    assert init_scale("layers.0.mlp.down.weight", untied, MUP) == 1


def test_multipliers_worked_by_hand():
    assert MUP.apply(WIDE).output_multiplier == 1 / 4
    assert MUP.apply(replace(WIDE, tie_embeddings=False)).output_multiplier == 1
    assert MUP.apply(WIDE).attention_multiplier == 1  # wider by more heads: their products grow no longer
    deep_heads = replace(WIDE, num_heads=2, num_kv_heads=2, head_dim=64)
    multiplier = replace(MUP, base_head_dim=16).apply(deep_heads).attention_multiplier
    assert multiplier * 64**-0.5 == pytest.approx(16**0.5 / 64)  # 1/head_dim, equal to 1/sqrt(head_dim) at the base


def train(config, parametrization, optimizer="adamw", steps=3, lr=0.01, seed=0):
    model = init_model(config, parametrization, torch.Generator().manual_seed(seed))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = MasterWeights(model, torch.float32)
    rates = OptimizerConfig(name=optimizer, lr=lr, muon_lr=lr, weight_decay=0.0)
    update = build_optimizer(masters, rates, scales(model, parametrization, optimizer))
    tokens = torch.randint(80, (4, 25), generator=torch.Generator().manual_seed(1))
    with open_workers(1) as workers:
        for _ in range(steps):
            train_step(masters, causal_lm_loss, [(tokens[:, :-1], tokens[:, 1:])], update, workers)
    return masters, start


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_at_the_base_shape_every_parametrization_is_the_standard_one(optimizer, tied):
    config = replace(BASE, tie_embeddings=tied, learnable_norm=True)
    standard, _ = train(config, Parametrization(), optimizer)
    for parametrization in (MUP, COMPLETEP):
        other, _ = train(config, parametrization, optimizer)
        assert all(torch.equal(standard.tensors[name], other.tensors[name]) for name in standard.names)


@pytest.mark.parametrize("parametrization", [MUP, COMPLETEP], ids=["mup", "completep"])
def test_the_first_adamw_update_of_each_weight_has_the_size_of_its_rule(parametrization):
    config = replace(WIDE, tie_embeddings=False)
    masters, start = train(config, parametrization, steps=1)
    for name in ("embed.weight", "head.weight", "layers.5.attention.out.weight", "layers.5.mlp.down.weight"):
        moved = (masters.tensors[name] - start[name]).abs().max().item()  # Adam's first update is lr · sign(gradient)
        assert moved == pytest.approx(0.01 * update_scale(name, config, parametrization, muon=False).lr, rel=1e-2)


@pytest.mark.parametrize("width", [64, 256])
def test_a_muon_update_has_the_spectral_size_of_its_shape(width):
    config = replace(BASE, hidden_size=width, num_heads=width // 16, num_kv_heads=width // 16, intermediate_size=2 * width)
    masters, start = train(config, replace(MUP, base_width=64), optimizer="muon", steps=2)
    for name, rows in masters.model.matrix_parts().items():
        update = masters.tensors[name] - start[name]
        for part in update.split(rows):
            wanted = max(1.0, part.shape[0] / part.shape[1]) ** 0.5
            size = torch.linalg.matrix_norm(part, 2).item() / 0.01
            low = 0.6 if name.endswith(("out.weight", "down.weight")) else 0.5  # these move in both steps, the others in the second
            assert low * wanted < size < 2.5 * wanted, name


def test_a_folded_factor_moves_as_an_explicit_one():
    """Against plain PyTorch: y = f · W x with torch's AdamW equals our folded weight f · W with the scaled rates."""
    factor, lr, decay, eps = 0.25, 0.03, 0.1, 1e-3
    explicit = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    oracle = torch.optim.AdamW([explicit], lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=decay)
    masters = MasterWeights(Transformer(replace(BASE, hidden_size=32)), torch.float32)
    name = "layers.0.mlp.down.weight"
    masters.tensors = {name: factor * explicit.detach()}
    rates = OptimizerConfig(name="adamw", lr=lr, beta1=0.9, beta2=0.95, eps=eps, weight_decay=decay)
    ours = build_optimizer(masters, rates, {name: Scale(factor, 1 / factor, 1 / factor)})
    x, target = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.ones(6, 7)
    with open_workers(1) as workers:
        for _ in range(5):
            explicit.grad = torch.autograd.grad(((factor * explicit @ x - target) ** 2).sum(), explicit)[0]
            oracle.step()
            weight = masters.tensors[name].clone().requires_grad_()
            ours.step({name: torch.autograd.grad(((weight @ x - target) ** 2).sum(), weight)[0]}, 1.0, workers)
    torch.testing.assert_close(masters.tensors[name], factor * explicit.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parametrization", [MUP, replace(COMPLETEP, base_head_dim=8)], ids=["mup", "completep"])
def test_a_trained_model_gives_the_same_logits_in_transformers(parametrization, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    masters, _ = train(replace(WIDE, tie_embeddings=tied, norm_eps=1e-4), parametrization, steps=4)
    model = masters.model
    save_model(model, None, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.randint(0, 80, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.logits(model(tokens))
        assert (theirs(tokens).logits - expected).abs().max().item() <= 1e-4
        assert expected.std() > 0.05  # it has learnt something to disagree about
        again = load_model(tmp_path / "model")
        assert again.config == model.config
        torch.testing.assert_close(again.logits(again(tokens)), expected, rtol=1e-5, atol=1e-5)


def test_the_fused_and_the_plain_attention_agree_on_the_multiplier():
    config = replace(BASE, attention_multiplier=0.25)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    learnable = Transformer(replace(config, learnable_norm=True))
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.out.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    learnable.load_state_dict(model.state_dict(), strict=False)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(model(tokens), learnable(tokens), rtol=1e-4, atol=1e-5)
    other = Transformer(replace(config, attention_multiplier=1.0))
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(tokens), other(tokens), atol=1e-3)


@pytest.mark.parametrize(
    "values,text",
    [
        ({"name": "mup"}, "needs base_width.*--base-width"),
        ({"name": "completep", "base_width": 32}, "needs base_depth.*--base-depth"),
        ({"name": "mup", "base_width": 0}, "base_width=0 must be at least 1"),
        ({"name": "standard", "base_width": 32}, "base_width=32 has no meaning with parametrization=standard"),
        ({"name": "mup", "base_width": 32, "base_depth": 2}, "base_depth=2 has no meaning with parametrization=mup"),
    ],
)
def test_a_parametrization_that_is_none_is_named(values, text):
    with pytest.raises(UserError, match=text):
        Parametrization(**values)


def test_a_parameter_without_a_rule_and_a_second_multiplier_are_refused():
    with pytest.raises(UserError, match="no rule for layers.0.value_gate"):
        update_scale("layers.0.value_gate", WIDE, MUP, muon=False)
    with pytest.raises(UserError, match="output_multiplier=0.5 .* Leave them at 1"):
        MUP.apply(replace(WIDE, output_multiplier=0.5))
