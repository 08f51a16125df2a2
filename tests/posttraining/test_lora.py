"""Adapters: the published forms worked by hand, what is trained, merging, and PEFT's files."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from cut_short import killed_at
from plinth.cli.main import main
from plinth.config import UserError
from plinth.inference.native_runner import _matrices
from plinth.models.config import DecoderConfig
from plinth.models.hub import export_tensors, load_decoder, load_model, save_model
from plinth.models.mlp import Linear
from plinth.models.tensor_file import TensorFiles, save_tensors
from plinth.models.transformer import Transformer
from plinth.posttraining import sft
from plinth.posttraining.adapted_models import merge_adapter
from plinth.posttraining.adapter_files import load_adapter, save_adapter
from plinth.posttraining.lora import AdaptedLinear, LoraConfig, Projection, adapted_modules, add_adapters, merge
from plinth.posttraining.sft import train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig

GOLDEN = json.loads((Path(__file__).parent / "peft_golden.json").read_text())
SHAPE = DecoderConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64, max_seq_len=64
)
KINDS = [LoraConfig(4), LoraConfig(4, rank_stabilised=True), LoraConfig(4, dora=True)]
SOME = LoraConfig(4, dora=True, targets=("k_proj", "up_proj"))


def decoder(config=SHAPE, seed=0):
    model = Transformer(config).init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # matrices that start at 0 would hide what adapters do to their norms
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1)))
    return model


def trained(model, config, seed=2):
    """Return the model with adapters that are not zero."""
    add_adapters(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in adapted_modules(model):
            module.lora_b.normal_(0.0, 0.02, generator=generator)
            if module.magnitude is not None:
                module.magnitude.mul_(1.0 + 0.2 * torch.rand(module.magnitude.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model.logits(model(torch.arange(40).view(2, 20)))


def single(config, rows=(2,), adapted=(True,), dtype=torch.float32):
    """Return a matrix of two columns and `rows` rows a projection, with 1, 2, 3, ... in it, and adapters of rank 1."""
    base = Linear(2, sum(rows))
    base.weight = torch.nn.Parameter(torch.arange(1.0, 1.0 + 2 * sum(rows)).view(-1, 2).to(dtype))
    parts = [Projection(f"layer.p{i}", n, 1.0, False, on) for i, (n, on) in enumerate(zip(rows, adapted))]
    return AdaptedLinear(base, parts, config)


def test_lora_worked_by_hand():
    module = single(LoraConfig(1, alpha=3.0))
    with torch.no_grad():
        module.lora_a.copy_(torch.tensor([[1.0, -1.0]]))
        module.lora_b.copy_(torch.tensor([[2.0], [0.5]]))
    # W = [[1, 2], [3, 4]], s B A = [[6, -6], [1.5, -1.5]]
    assert module.merged_weight().tolist() == [[7.0, -4.0], [4.5, 2.5]]
    assert module(torch.tensor([1.0, 10.0])).tolist() == [-33.0, 29.5]


def test_scaling_of_lora_and_of_rank_stabilised_lora():
    assert LoraConfig(16, alpha=32.0).scaling == 2.0
    assert LoraConfig(16, alpha=32.0, rank_stabilised=True).scaling == 8.0


def test_dora_worked_by_hand():
    module = single(LoraConfig(1, alpha=1.0, dora=True))
    torch.testing.assert_close(module.magnitude.detach(), torch.tensor([math.sqrt(5), 5.0]))
    with torch.no_grad():
        module.lora_a.copy_(torch.tensor([[1.0, 0.0]]))
        module.lora_b.copy_(torch.tensor([[2.0], [0.0]]))
        module.magnitude.copy_(torch.tensor([26.0, 10.0]))
    # W + B A = [[3, 2], [3, 4]], its rows' norms are sqrt(13) and 5
    expected = torch.tensor([[3.0, 2.0], [3.0, 4.0]]) * torch.tensor([[26 / math.sqrt(13)], [2.0]])
    torch.testing.assert_close(module.merged_weight(), expected)
    torch.testing.assert_close(module(torch.tensor([1.0, -1.0])), expected @ torch.tensor([1.0, -1.0]))


def test_dora_gradient_counts_the_norms_as_constants():
    module = single(LoraConfig(1, alpha=1.0, dora=True))
    with torch.no_grad():
        module.lora_a.copy_(torch.tensor([[1.0, 0.5]]))
        module.lora_b.copy_(torch.tensor([[2.0], [-1.0]]))
    x = torch.tensor([2.0, 4.0])
    module(x).sum().backward()
    whole = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + torch.tensor([[2.0], [-1.0]]) @ torch.tensor([[1.0, 0.5]])
    n, m = whole.norm(dim=1), torch.tensor([math.sqrt(5), 5.0])
    torch.testing.assert_close(module.magnitude.grad, whole @ x / n)
    torch.testing.assert_close(module.lora_b.grad[:, 0], m / n * 4.0)  # A x = 4
    torch.testing.assert_close(module.lora_a.grad[0], (m / n * torch.tensor([2.0, -1.0])).sum() * x)


def test_a_projection_without_adapter_stays_as_it_is():
    module = single(LoraConfig(1, alpha=1.0, dora=True), rows=(1, 2, 1), adapted=(True, False, True))
    assert module.lora_a.shape == (2, 2) and module.lora_b.shape == (2, 1) and module.magnitude.shape == (2,)
    with torch.no_grad():
        module.lora_a.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        module.lora_b.copy_(torch.tensor([[1.0], [2.0]]))
        module.magnitude.copy_(torch.tensor([math.sqrt(8.0), 2 * math.sqrt(149.0)]))
    # W = [[1, 2], [3, 4], [5, 6], [7, 8]]; rows 0 and 3 become [2, 2] and 2 · [7, 10]
    torch.testing.assert_close(module.merged_weight(), torch.tensor([[2.0, 2.0], [3.0, 4.0], [5.0, 6.0], [14.0, 20.0]]))
    torch.testing.assert_close(module(torch.tensor([1.0, 1.0])), torch.tensor([4.0, 7.0, 11.0, 34.0]))


@pytest.mark.parametrize("kind", GOLDEN["layers"])
def test_equals_what_peft_computed(kind):
    case = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in GOLDEN["layers"][kind].items()}
    base = Linear(case["w"].shape[1], len(case["w"]), bias=True)
    base.weight, base.bias = torch.nn.Parameter(case["w"]), torch.nn.Parameter(case["bias"])
    config = LoraConfig(case["r"], case["alpha"], rank_stabilised=kind == "rslora", dora=kind == "dora")
    module = AdaptedLinear(base, [Projection("layer", len(case["w"]), 1.0, False)], config)
    with torch.no_grad():
        module.lora_a.copy_(case["a"])
        module.lora_b.copy_(case["b"])
        if kind == "dora":
            torch.testing.assert_close(module.magnitude.detach(), case["first_m"])
            module.magnitude.copy_(case["m"])
    y = module(case["x"])
    torch.testing.assert_close(y, case["y"])
    torch.testing.assert_close(module.merged_weight(), case["merged"])
    parameters = [module.lora_a, module.lora_b] + ([module.magnitude] if kind == "dora" else [])
    for found, name in zip(torch.autograd.grad((y * case["weights"]).sum(), parameters), ("grad_a", "grad_b", "grad_m")):
        torch.testing.assert_close(found, case[name])


@pytest.mark.parametrize("config", KINDS)
def test_fresh_adapters_change_nothing_and_alone_are_trained(config):
    plain, model = decoder(), add_adapters(decoder(), config)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_a", "lora_b"} | ({"magnitude"} if config.dora else set())
    loss, _, _ = causal_lm_loss(model, (torch.arange(64).view(2, 32), torch.arange(1, 65).view(2, 32)))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    # A rank r adapter of q, k, v, gate, up has an A and a B each; o and down one.
    D, F, Q, K = 32, 64, 32, 16
    count = 4 * (3 * D + Q + 2 * K + Q + D + 2 * D + 2 * F + F + D) + (Q + 2 * K + D + 2 * F + D if config.dora else 0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * count


@pytest.mark.parametrize("config", [*KINDS, SOME])
def test_merging_equals_the_adapter(config):
    model = trained(decoder(), config)
    before = logits(model)
    assert (before - logits(decoder())).abs().max() > 0.01
    merged = merge(model)
    assert not list(adapted_modules(merged)) and all(p.requires_grad for p in merged.parameters())
    assert merged.state_dict().keys() == decoder().state_dict().keys()
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-4)


def test_what_packs_the_weights_packs_the_adapters_with_them():
    model = trained(decoder(), KINDS[2])
    packed = [matrix for layer in model.layers for matrix in _matrices(layer)]
    merged = [matrix for layer in merge(model).layers for matrix in _matrices(layer)]
    assert all(torch.equal(a, b) for a, b in zip(packed, merged))


def test_rows_equal_the_forward_pass():
    _, module = next(adapted_modules(trained(decoder(), SOME)))
    x = torch.randn(32, module.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module.forward_rows(x), module(x))
        assert torch.equal(module.forward_rows(x)[16:], module.forward_rows(x[16:].contiguous()))


@pytest.mark.parametrize("config", [*KINDS, SOME])
@pytest.mark.parametrize(
    "shape",
    [SHAPE, dataclasses.replace(SHAPE, tie_embeddings=not SHAPE.tie_embeddings), dataclasses.replace(SHAPE, output_multiplier=0.5)],
)
def test_adapters_come_back_from_their_files(tmp_path, config, shape):
    model = trained(decoder(shape), config)
    save_adapter(model, tmp_path / "adapter")
    back = load_adapter(decoder(shape), tmp_path / "adapter")
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-5)
    assert {name for name, p in back.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_published_adapter_adds_to_the_published_weights(tmp_path):
    model = trained(decoder(dataclasses.replace(SHAPE, embed_multiplier=2.0, output_multiplier=0.5)), LoraConfig(4))
    before = export_tensors(decoder(model.config))
    save_adapter(model, tmp_path / "adapter")
    files = TensorFiles([tmp_path / "adapter" / "adapter_model.safetensors"])
    after = export_tensors(merge(model))
    for module in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        a, b = (files.read(f"base_model.model.model.layers.1.{module}.lora_{side}.weight") for side in "AB")
        name = f"model.layers.1.{module}.weight"
        torch.testing.assert_close(after[name], before[name] + 8.0 * b @ a)


def test_gpt2s_one_fused_projection_has_one_adapter(tmp_path):
    shape = dataclasses.replace(
        SHAPE, num_kv_heads=4, position="learned", norm="layer", activation="gelu_tanh", learnable_norm=True,
        qk_norm=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    model = trained(decoder(shape), LoraConfig(4, dora=True))
    save_adapter(model, tmp_path / "adapter")
    shapes = TensorFiles([tmp_path / "adapter" / "adapter_model.safetensors"]).shapes()
    assert shapes["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"] == (4, 32)
    assert shapes["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"] == (96, 4)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    before = logits(model)
    torch.testing.assert_close(logits(load_adapter(decoder(shape), tmp_path / "adapter")), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(merge(model)), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", KINDS)
def test_names_and_shapes_are_pefts(tmp_path, config):
    save_adapter(add_adapters(decoder(), config), tmp_path / "adapter")
    shapes = TensorFiles([tmp_path / "adapter" / "adapter_model.safetensors"]).shapes()
    expected = GOLDEN["files"]["dora" if config.dora else "lora"]
    assert {name: list(shape) for name, shape in shapes.items()} == expected
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values.keys() <= set(GOLDEN["config_fields"])


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_what_is_not_computed_or_does_not_fit_is_refused(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(add_adapters(decoder(), LoraConfig(4)), folder)
    for field, value in (
        ("bias", "all"),
        ("modules_to_save", ["lm_head", "norm"]),
        ("rank_pattern", {"q_proj": 2}),
        ("init_lora_weights", "pissa"),
    ):
        before = (folder / "adapter_config.json").read_text()
        change(folder, **{field: value})
        with pytest.raises(UserError, match=f"{field}=.* is not supported"):
            load_adapter(decoder(), folder)
        (folder / "adapter_config.json").write_text(before)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.lora_A.weight is \(4, 32\), but this model with r=4 needs \(4, 64\)"):
        load_adapter(decoder(dataclasses.replace(SHAPE, hidden_size=64)), folder)
    with pytest.raises(UserError, match="holds .*layers.1.* which has no place in this model"):
        load_adapter(decoder(dataclasses.replace(SHAPE, num_layers=1)), folder)
    model = decoder()
    files = TensorFiles([folder / "adapter_model.safetensors"])
    tensors = {name: files.read(name).clone() for name in files.shapes()}
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    save_tensors(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="up_proj.lora_B.weight is absent"):
        load_adapter(model, folder)
    assert not list(adapted_modules(model))
    with pytest.raises(UserError, match="has 'qproj', but the model's are .*q_proj.*Did you mean q_proj"):
        add_adapters(decoder(), LoraConfig(4, targets=("qproj",)))
    with pytest.raises(UserError, match="adapters already"):
        add_adapters(add_adapters(decoder(), LoraConfig(4)), LoraConfig(4))
    with pytest.raises(UserError, match="no adapters to save"):
        save_adapter(decoder(), tmp_path / "none")
    with pytest.raises(UserError, match="adapter.rank is not given"):
        LoraConfig(dora=True)
    with pytest.raises(UserError, match="adapter.rank=0 must be at least 1"):
        LoraConfig(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([f"What does {name} do? It does {name} things." for name in ("copy", "move", "read", "seek")] * 3, 300)
    save_model(decoder(dataclasses.replace(SHAPE, vocab_size=tokenizer.vocab_size)), tokenizer, folder / "model")
    lines = [
        {"messages": [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": f"It does {name}."}]}
        for name in ("copy", "move", "read", "seek")
    ]
    (folder / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def sft_config(adapter, dtype="float32", steps=16, **train):
    optimizer = OptimizerConfig(lr=0.02)
    config = TrainConfig(steps=steps, warmup_steps=2, dtype=dtype, num_threads=2, optimizer=optimizer, **train)
    return SftConfig(train=config, conversations_per_step=4, micro_batch_size=2, adapter=adapter)


@pytest.mark.parametrize("config", [LoraConfig(4), LoraConfig(2, dora=True)])
def test_sft_publishes_an_adapter_and_its_merged_model(tmp_path, base, config):
    run = train_sft(tmp_path / "run", base / "model", base / "sft.jsonl", sft_config(config))
    first, last = run.metrics()[0]["loss_nats"], run.metrics()[-1]["loss_nats"]
    assert last < 0.8 * first
    published, before = load_decoder(run.model_dir), load_decoder(base / "model")
    adapted = load_adapter(load_decoder(base / "model"), run.path / "adapter")
    assert run.summary["trained_params"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    torch.testing.assert_close(logits(adapted), logits(published), rtol=0, atol=1e-4)
    assert torch.equal(published.embed.weight, before.embed.weight)
    merged, _ = merge_adapter(base / "model", run.path, tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(load_model(merged).parameters(), published.parameters()))


def test_training_in_bf16_leaves_the_base_bit_for_bit(tmp_path, base):
    run = train_sft(tmp_path / "run", base / "model", base / "sft.jsonl", sft_config(LoraConfig(4, targets=("v_proj",)), "bfloat16"))
    before, after = (load_decoder(path).state_dict() for path in (base / "model", run.model_dir))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"layers.{i}.attention.qkv.weight" for i in range(2)}
    for name in changed:
        assert torch.equal(before[name][:48], after[name][:48]) and not torch.equal(before[name][48:], after[name][48:])


@pytest.mark.parametrize("init", ["uniform", "pissa"])
def test_a_resumed_run_equals_an_uninterrupted_one_and_needs_the_same_base(tmp_path, base, init):
    adapter = LoraConfig(4, dora=True, dropout=0.2, lr_ratio=4.0, whole=("embed_tokens",), init=init)
    config = sft_config(adapter, "bfloat16", steps=5, checkpoint_every_s=0.0)
    source = tmp_path / "model"
    shutil.copytree(base / "model", source)
    whole = train_sft(tmp_path / "whole", source, base / "sft.jsonl", config)

    with killed_at(7, sft, "pad_rows"):
        train_sft(tmp_path / "cut", source, base / "sft.jsonl", config)
    save_model(decoder(load_decoder(source).config, seed=7), Tokenizer.load(source), source)
    with pytest.raises(UserError, match="base_sha256=.* differs from"):
        train_sft(tmp_path / "cut", source, base / "sft.jsonl", config, resume=True)
    shutil.rmtree(source)
    shutil.copytree(base / "model", source)
    resumed = train_sft(tmp_path / "cut", source, base / "sft.jsonl", config, resume=True)
    a, b = (TensorFiles([run.path / "adapter" / "adapter_model.safetensors"]) for run in (whole, resumed))
    assert a.shapes() == b.shapes() and all(torch.equal(a.read(name), b.read(name)) for name in a.shapes())


def test_the_command_line_trains_and_merges(tmp_path, base, capsys):
    options = "--train.steps 2 --train.dtype float32 --train.num-threads 2 --adapter.rank 4 --adapter.targets q_proj v_proj --json"
    run = [str(base / "model"), "--messages", str(base / "sft.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["sft", *run, *options.split()]) == 0
    assert main(["merge", str(base / "model"), str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer == {"path": str(tmp_path / "merged"), "adapter_params": 2 * 4 * (2 * 32 + 32 + 16)}
    assert main(["merge", str(base / "model"), str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", str(base / "model"), str(base), "--out", str(tmp_path / "other")]) == 1
    assert "holds no adapter" in capsys.readouterr().err
