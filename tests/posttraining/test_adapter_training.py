"""Adapters while they train: dropout, B's own rate, how A is drawn, and which projections are chosen."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.hub import load_decoder, save_model
from plinth.models.mlp import Linear
from plinth.models.tensor_file import TensorFiles
from plinth.ops.dropout import dropout_mask, dropping
from plinth.posttraining.adapter_files import load_adapter, save_adapter
from plinth.posttraining.adapter_training import dropped, scales_of, seed_batches
from plinth.posttraining.grpo import GrpoConfig
from plinth.posttraining.lora import AdaptedLinear, LoraConfig, Projection, adaptable, adapted_modules, add_adapters, choose
from plinth.posttraining.ppo_config import PpoConfig
from plinth.posttraining.sft import SftConfig, train_sft
from plinth.training.loop import TrainConfig
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig
from small_models import GROUPED, SUBJECTS, noisy_decoder, subjects_tokenizer

DROPPING = LoraConfig(4, dropout=0.5)
LAST = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def drawn(shape, seed=0, deviation=1.0):
    return deviation * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module_of(config):
    """Return a matrix of 6 columns with two projections of 3 and 2 rows, and adapters that are not zero."""
    base = Linear(6, 5)
    base.weight = torch.nn.Parameter(drawn((5, 6), 1), requires_grad=False)
    module = AdaptedLinear(base, [Projection("a", 3, 1.0, False), Projection("b", 2, 1.0, False)], config)
    with torch.no_grad():
        module.lora_a.copy_(drawn(module.lora_a.shape, 2))
        module.lora_b.copy_(drawn(module.lora_b.shape, 3))
    return module


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_of_what_enters_a_alone(dora):
    module = module_of(dataclasses.replace(DROPPING, dora=dora))
    x = drawn((7, 6), 4)
    with dropping(torch.Generator().manual_seed(5)):
        found = module(x)
    kept = dropout_mask(x.shape, 0.5, torch.Generator().manual_seed(5), x)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    a, b = module.lora_a.split(4), module.lora_b.split([3, 2])
    added = torch.cat([(x * kept) @ one.T @ other.T * module.scaling for one, other in zip(a, b)], -1)
    factors = module._row_factors() if dora else torch.ones(5)
    torch.testing.assert_close(found, (x @ module.base_weight().T + added) * factors)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_changes_no_expectation_and_nothing_outside_of_training(dora):
    module = module_of(dataclasses.replace(DROPPING, dora=dora))
    x = drawn((6,), 4)
    with torch.no_grad():
        plain = module(x)
        torch.testing.assert_close(plain, x @ module.merged_weight().T)
        with dropping(torch.Generator().manual_seed(5)):
            draws = module(x.expand(40_000, 6))
        assert torch.equal(module(x), plain)
    error = draws.std(0) / 200
    assert (error > 0.01).all() and ((draws.mean(0) - plain).abs() < 5 * error).all()


def test_the_rows_of_a_batch_drop_by_the_seed_of_their_step_and_place_in_it():
    batches = [(torch.arange(16).view(2, 8), torch.arange(1, 17).view(2, 8))] * 2
    seeds = [batch[-1].tolist() for step in (0, 1) for batch in seed_batches(batches, 3, step)]
    assert [len(each) for each in seeds] == [2] * 4 and len({each[0] for each in seeds}) == 4
    assert seeds == [batch[-1].tolist() for step in (0, 1) for batch in seed_batches(batches, 3, step)]
    model = add_adapters(noisy_decoder(), DROPPING)
    for _, module in adapted_modules(model):
        module.lora_b.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    loss = dropped(causal_lm_loss)
    one, two = ([float(loss(model, batch)[0].detach()) for batch in seed_batches(batches, 3, step)] for step in (0, 1))
    assert len({*one, *two}) == 4 and one == [float(loss(model, batch)[0].detach()) for batch in seed_batches(batches, 3, 0)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base"), subjects_tokenizer()
    shape = dataclasses.replace(GROUPED, vocab_size=tokenizer.vocab_size)
    save_model(noisy_decoder(shape, noise=0.05), tokenizer, folder / "model")
    lines = [
        {"messages": [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": f"It does {name}."}]}
        for name in SUBJECTS
    ]
    (folder / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def tuned(out, base, adapter, **train):
    optimizer = OptimizerConfig(lr=0.02, weight_decay=0.0)
    settings = {"steps": 4, "warmup_steps": 0, "dtype": "float32", "num_threads": 1, "optimizer": optimizer, "decay_fraction": 0.0, **train}
    config = SftConfig(train=TrainConfig(**settings), conversations_per_step=8, micro_batch_size=2, adapter=adapter)
    return train_sft(out, base / "model", base / "sft.jsonl", config)


def adapter_of(run):
    files = TensorFiles([run.path / "adapter" / "adapter_model.safetensors"])
    return {name: files.read(name) for name in files.shapes()}


def test_a_run_drops_the_same_with_any_number_of_threads_and_something_else_with_another_seed(tmp_path, base):
    runs = [tuned(tmp_path / str(n), base, DROPPING, num_threads=n) for n in (1, 2, 3)]
    norms = [[record["grad_norm"] for record in run.metrics()] for run in runs]
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-4)
    plain = tuned(tmp_path / "plain", base, LoraConfig(4))
    assert plain.metrics()[0]["grad_norm"] != pytest.approx(norms[0][0], rel=1e-2)
    assert plain.metrics()[0]["loss_nats"] == pytest.approx(runs[0].metrics()[0]["loss_nats"], rel=1e-5)  # B is still 0
    adapted = load_adapter(load_decoder(base / "model"), runs[0].path / "adapter")
    tokens = torch.arange(40).view(2, 20)
    torch.testing.assert_close(adapted(tokens), load_decoder(runs[0].model_dir)(tokens), rtol=1e-4, atol=1e-4)
    assert {module.adapter.dropout for _, module in adapted_modules(adapted)} == {0.5}


@pytest.mark.parametrize("verb", ["prefer sigmoid", "prefer kto", "distill"])
def test_other_stages_drop_in_their_loss_alone(tmp_path, base, verb):
    """The first update's loss is what it is without dropout, as B is 0; its gradient is not, and a fresh policy is at its reference."""
    pairs = [
        {"prompt": f"What does {a} do?", "chosen": f"It does {a}.", "rejected": f"It does {b}."} for a, b in zip(SUBJECTS, SUBJECTS[1:])
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model, options = str(base / "model"), "--train.steps 2 --train.num-threads 1 --train.dtype float32 --adapter.rank 4 --json"
    data = ["--data", str(tmp_path / "pairs.jsonl"), "--loss", verb.split()[-1]]
    if verb == "distill":
        data = ["--teacher", model, "--data", str(base / "sft.jsonl"), "--share", "0.5"]
    first = []
    for dropout in ("0", "0.5"):
        out = tmp_path / dropout
        assert main([verb.split()[0], model, *data, "--out", str(out), *options.split(), "--adapter.dropout", dropout]) == 0
        first.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
    assert first[0]["loss_nats"] == pytest.approx(first[1]["loss_nats"], rel=1e-5)
    assert first[0]["grad_norm"] != pytest.approx(first[1]["grad_norm"], rel=1e-3)


def test_dropout_is_in_pefts_file(tmp_path):
    for dropout in (0.0, 0.25):
        save_adapter(add_adapters(noisy_decoder(), LoraConfig(4, dropout=dropout)), tmp_path / str(dropout))
        assert json.loads((tmp_path / str(dropout) / "adapter_config.json").read_text())["lora_dropout"] == dropout


def test_dropout_is_refused_where_it_would_do_harm(tmp_path, base):
    for config in (GrpoConfig, PpoConfig):
        with pytest.raises(UserError, match="adapter.dropout=0.5 is not for methods that sample"):
            config(adapter=DROPPING)
    with pytest.raises(UserError, match=r"train.cuda_graphs=true would not"):
        tuned(tmp_path / "run", base, DROPPING, cuda_graphs=True)
    with pytest.raises(UserError, match=r"adapter.dropout=1.0 must lie in \[0, 1\)"):
        LoraConfig(4, dropout=1.0)


def test_b_moves_faster_by_the_ratio_of_lora_plus(tmp_path, base):
    plain, plus = (adapter_of(tuned(tmp_path / str(ratio), base, LoraConfig(4, lr_ratio=ratio), steps=1)) for ratio in (1.0, 16.0))
    fresh = {name: tensors for name, (_, tensors) in _parts(add_adapters(load_decoder(base / "model"), LoraConfig(4)))}
    assert plain.keys() == plus.keys() and len(plain) == 2 * len(fresh)
    for name, before in plain.items():
        if "lora_A" in name:
            assert torch.equal(before, plus[name])  # B is 0, so A does not move yet
        else:
            torch.testing.assert_close(plus[name], 16 * before, rtol=1e-4, atol=1e-6)
            assert before.abs().max() == pytest.approx(0.02, rel=1e-3)  # AdamW's first step is the rate


def _parts(model):
    return [item for _, module in adapted_modules(model) for item in module.adapters().items()]


def test_a_is_drawn_as_the_configuration_says():
    shape = dataclasses.replace(noisy_decoder().config, hidden_size=256, num_heads=8, num_kv_heads=8, head_dim=32)
    for init, deviation in (("uniform", (1 / 3 / 256) ** 0.5), ("gaussian", 1 / 16)):
        model = add_adapters(noisy_decoder(shape), LoraConfig(16, init=init))
        drawn_a = torch.cat([module.lora_a.flatten() for _, module in adapted_modules(model) if module.in_features == 256])
        assert float(drawn_a.detach().std()) == pytest.approx(deviation, rel=0.02)
        assert all(not module.lora_b.any() for _, module in adapted_modules(model))


PISSA = [LoraConfig(4, init="pissa"), LoraConfig(4, rank_stabilised=True, init="pissa"), LoraConfig(4, dora=True, init="pissa")]


@pytest.mark.parametrize("config", PISSA)
def test_pissa_moves_the_largest_singular_values_into_the_adapters(config):
    """The product is the truncated decomposition of each projection's own rows, by NumPy in float64, and the sum is what it was."""
    plain, module = module_of(config).frozen.detach().clone(), module_of(dataclasses.replace(config, rank=2))
    module.init_adapter(torch.Generator())
    for rows, a, b in zip((slice(0, 3), slice(3, 5)), module.lora_a.detach().split(2), module.lora_b.detach().split([3, 2])):
        left, sizes, right = np.linalg.svd(plain[rows].double().numpy(), full_matrices=False)
        torch.testing.assert_close(
            (module.scaling * b @ a).double(), torch.from_numpy((left[:, :2] * sizes[:2]) @ right[:2]), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(a @ a.T, torch.from_numpy(np.diag(sizes[:2])).float() / module.scaling, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.merged_weight(), plain, atol=1e-5, rtol=1e-5)
    model, tokens = add_adapters(noisy_decoder(), config), torch.arange(40).view(2, 20)
    torch.testing.assert_close(model(tokens), noisy_decoder()(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", PISSA)
def test_what_pissa_learnt_is_published_as_an_adapter_of_the_weights_as_they_came(tmp_path, base, config):
    run = tuned(tmp_path / "run", base, config, dtype="bfloat16")
    values = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert (values["r"], values["init_lora_weights"]) == (8, True) and run.summary["trained_params"] > 0
    adapted, published = load_adapter(load_decoder(base / "model"), run.path / "adapter"), load_decoder(run.model_dir)
    assert next(adapted_modules(adapted))[1].scaling == pytest.approx(config.scaling)
    tokens = torch.arange(40).view(2, 20)
    torch.testing.assert_close(adapted(tokens), published(tokens), rtol=1e-4, atol=1e-4)
    assert (published(tokens) - load_decoder(base / "model")(tokens)).abs().max() > 0.01
    assert torch.equal(published.embed.weight, load_decoder(base / "model").embed.weight)


def test_what_pissa_took_from_the_weights_is_not_decayed():
    for config, decay in ((LoraConfig(4), 1.0), (LoraConfig(4, init="pissa", lr_ratio=3.0), 0.0)):
        scales = scales_of(add_adapters(noisy_decoder(), config), config)
        assert len(scales) == 16 and {scale.weight_decay for scale in scales.values()} == {decay}
        assert {name[-1]: scale.lr for name, scale in scales.items()} == {"a": 1.0, "b": config.lr_ratio}


def test_pissa_on_four_bits_and_of_too_high_a_rank_are_refused():
    with pytest.raises(UserError, match="adapter.init=pissa with adapter.quantise=nf4 would round"):
        LoraConfig(4, init="pissa", quantise="nf4")
    with pytest.raises(UserError, match="adapter.rank=17 is more than the 16 singular values"):
        add_adapters(noisy_decoder(), LoraConfig(17, init="pissa"))


@pytest.mark.parametrize(
    "config, expected",
    [
        (LoraConfig(4, targets=("all-linear",)), None),
        (LoraConfig(4, pattern=r".*\.1\.self_attn\.[qv]_proj"), set(LAST)),
        (LoraConfig(4, layers=(1,), targets=("q_proj", "v_proj")), set(LAST)),
        (LoraConfig(4, layers=(1,), pattern=r".*self_attn\.(q|v)_proj"), set(LAST)),
    ],
)
def test_projections_are_chosen_by_name_pattern_and_block(tmp_path, config, expected):
    model = noisy_decoder()
    everything = choose(adaptable(model), LoraConfig(4))
    assert len(everything) == 14
    expected = expected or everything
    assert choose(adaptable(model), config) == expected
    save_adapter(add_adapters(model, config), tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # PEFT adapts whatever is called so: where that would be more, whole names say which.
    last = {name.rpartition(".")[2] for name in expected}
    assert values["target_modules"] == sorted(last if expected == everything else expected)
    back = load_adapter(noisy_decoder(), tmp_path / "adapter")
    assert {name for _, module in adapted_modules(back) for name in module.adapters()} == expected


def test_a_choice_that_fits_nothing_says_what_there_is():
    for config, message in (
        (LoraConfig(4, layers=(0, 2)), "adapter.layers has 2, but the blocks that can have adapters are 0 to 1"),
        (LoraConfig(4, pattern="q_proj"), "no projection is adapted by adapter.pattern='q_proj'. One is named model.layers.0.self_attn"),
        (LoraConfig(4, pattern="("), r"adapter.pattern='\(' is no regular expression"),
        (LoraConfig(4, targets=("all-linear", "q_proj")), "all-linear stands alone"),
        (LoraConfig(4, targets=()), "adapter.targets is empty"),
        (LoraConfig(4, layers=()), r"no projection is adapted by adapter.layers=\(\)"),
    ):
        with pytest.raises(UserError, match=message):
            add_adapters(noisy_decoder(), config)
    with pytest.raises(UserError, match="both say which projections"):
        LoraConfig(4, targets=("q_proj",), pattern=".*")
    with pytest.raises(UserError, match="adapter.rank is not given"):
        LoraConfig(dropout=0.1)
    with pytest.raises(UserError, match="adapter.lr_ratio=0.0 must be positive"):
        LoraConfig(4, lr_ratio=0.0)
