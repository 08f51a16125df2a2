"""Adapters on a base of 4 bits: they compute on the rounded base, merge onto it and nothing else, and keep no whole copy of it."""

import json
from dataclasses import replace

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, save_model
from plinth.models.mlp import Linear
from plinth.models.transformer import Transformer
from plinth.ops.nf4 import dequantise_nf4, quantise_nf4
from plinth.posttraining.adapted_models import merge_adapter
from plinth.posttraining.adapter_files import load_adapter, save_adapter
from plinth.posttraining.lora import LoraConfig, adapted_modules, add_adapters, merge
from plinth.posttraining.sft import train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.tokenizer.train import train_tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig
from plinth.training.precision import MasterWeights

SHAPE = DecoderConfig(
    vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, max_seq_len=64
)
KINDS = [LoraConfig(4, quantise="nf4"), LoraConfig(4, rank_stabilised=True, quantise="nf4"), LoraConfig(4, dora=True, quantise="nf4")]
TOKENS = (torch.arange(64).view(2, 32), torch.arange(1, 65).view(2, 32))


def decoder(vocab_size=300) -> Transformer:
    model = Transformer(DecoderConfig(**{**SHAPE.__dict__, "vocab_size": vocab_size}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.init_weights(generator).parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def rounded(model: Transformer) -> Transformer:
    """Return the model with each matrix of its blocks rounded to 4 bits and read back."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module) is Linear and name.startswith("layers."):
                module.weight.copy_(dequantise_nf4(quantise_nf4(module.weight)))
    return model


def moved(model: Transformer) -> Transformer:
    """Return the model with adapters that are not zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, module in adapted_modules(model):
            module.lora_b.normal_(0.0, 0.02, generator=generator)
            if module.magnitude is not None:
                module.magnitude.mul_(1.0 + 0.2 * torch.rand(module.magnitude.shape, generator=generator))
    return model


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS[0]))


@pytest.mark.parametrize("config", KINDS)
def test_fresh_adapters_compute_what_the_rounded_base_does(config):
    model = add_adapters(decoder(), config)
    torch.testing.assert_close(logits(model), logits(rounded(decoder())), rtol=0, atol=1e-5)
    assert (logits(model) - logits(decoder())).abs().max() > 0.01


@pytest.mark.parametrize("config", KINDS)
def test_merging_equals_the_adapter_on_the_dequantised_base_peft_2321(config):
    model = moved(add_adapters(decoder(), config))
    before = logits(model)
    on_rounded = moved(add_adapters(rounded(decoder()), replace(config, quantise=None)))
    torch.testing.assert_close(logits(on_rounded), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(merge(model)), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", KINDS)
def test_gradients_are_those_on_the_rounded_base(config):
    found = []
    for base, options in ((decoder(), config), (rounded(decoder()), replace(config, quantise=None))):
        model = moved(add_adapters(base, options))
        causal_lm_loss(model, TOKENS)[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


def test_no_whole_copy_of_the_matrices_is_kept():
    """What a model in training holds of them is 4.13 bits a weight, in bf16 and in fp32 alike."""
    plain = decoder()
    matrices = sum(module.weight.numel() for name, module in plain.named_modules() if type(module) is Linear and name.startswith("layers."))
    for dtype in (torch.float32, torch.bfloat16):
        model = add_adapters(decoder(), LoraConfig(2, quantise="nf4"))
        held = MasterWeights(model, dtype)
        assert not any(type(module) is Linear and name.startswith("layers.") for name, module in model.named_modules())
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        assert buffers < matrices * 4.5 / 8
        whole = {parameter.numel() for parameter in model.parameters()} | {t.numel() for t in held.tensors.values()}
        assert max(whole - {model.embed.weight.numel()}) < min(m.in_features * m.out_features for _, m in adapted_modules(model))
        held.finish()
        torch.testing.assert_close(logits(model), logits(rounded(decoder())), rtol=0, atol=1e-5)


def test_rows_of_generation_equal_the_forward_pass():
    _, module = next(adapted_modules(moved(add_adapters(decoder(), KINDS[2]))))
    x = torch.randn(32, module.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module.forward_rows(x), module(x))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([f"What does {name} do? It does {name} things." for name in ("copy", "move", "read", "seek")] * 3, 300)
    save_model(decoder(tokenizer.vocab_size), tokenizer, folder / "model")
    lines = [
        {"messages": [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": f"It does {name}."}]}
        for name in ("copy", "move", "read", "seek")
    ]
    (folder / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_of(adapter, steps=12, dtype="float32"):
    train = TrainConfig(steps=steps, warmup_steps=2, dtype=dtype, num_threads=2, checkpoint_every_s=0.0, optimizer=OptimizerConfig(lr=0.02))
    return SftConfig(train=train, conversations_per_step=4, micro_batch_size=2, adapter=adapter)


def test_a_run_learns_and_merges_only_onto_what_it_was_trained_on(tmp_path, base, capsys):
    run = train_sft(tmp_path / "run", base / "model", base / "sft.jsonl", config_of(KINDS[0]))
    assert run.metrics()[-1]["loss_nats"] < 0.8 * run.metrics()[0]["loss_nats"]
    command = ["merge", str(base / "model"), str(tmp_path / "run"), "--out", str(tmp_path / "merged")]
    assert main(command) == 1
    assert "was trained on a base of 4 bits (nf4)" in (refusal := capsys.readouterr().err) and "--onto dequantised" in refusal
    assert not (tmp_path / "merged").exists()
    assert main([*command, "--onto", "dequantised"]) == 0
    published = load_decoder(run.model_dir)
    assert all(torch.equal(a, b) for a, b in zip(load_decoder(tmp_path / "merged").parameters(), published.parameters()))
    other, _ = merge_adapter(base / "model", tmp_path / "run", tmp_path / "other", "original")
    assert (logits(load_decoder(other)) - logits(published)).abs().max() > 0.01
    adapted = load_adapter(load_decoder(base / "model"), run.path / "adapter", "nf4")
    torch.testing.assert_close(logits(adapted), logits(published), rtol=0, atol=1e-4)


def test_the_adapter_is_in_pefts_files_with_a_note_beside_them(tmp_path):
    for quantise in ("nf4", None):
        save_adapter(add_adapters(decoder(), LoraConfig(4, quantise=quantise)), tmp_path / str(quantise))
    names = {quantise: {file.name for file in (tmp_path / quantise).iterdir()} for quantise in ("nf4", "None")}
    assert names["nf4"] - names["None"] == {"quantisation.json"}
    assert (tmp_path / "nf4" / "adapter_config.json").read_text() == (tmp_path / "None" / "adapter_config.json").read_text()
    with pytest.raises(UserError, match="was trained on whole weights: leave out --onto dequantised"):
        save_model(decoder(), None, tmp_path / "model")
        merge_adapter(tmp_path / "model", tmp_path / "None", tmp_path / "out", "dequantised")
