"""Modules trained and saved whole beside adapters: they learn, come back from PEFT's files, and stay tied where they are."""

import json
from dataclasses import replace

import pytest
import torch

from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.hub import load_decoder, save_model
from plinth.models.reward import RewardModel
from plinth.models.tensor_file import TensorFiles, save_tensors
from plinth.posttraining.adapted_models import merge_adapter
from plinth.posttraining.adapter_files import load_adapter, save_adapter
from plinth.posttraining.lora import LoraConfig, add_adapters
from small_models import GROUPED, SUBJECTS, noisy_decoder, subjects_tokenizer

EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
SHAPES = {
    "tied": replace(GROUPED, tie_embeddings=True),
    "own head": replace(GROUPED, tie_embeddings=False),
    "tied, multiplied": replace(GROUPED, tie_embeddings=True, embed_multiplier=2.0, output_multiplier=0.5),
}


def moved(model, *names):
    """Return the model with what is called so in it changed."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_whole_comes_back(tmp_path, shape):
    config = SHAPES[shape]
    names = {"embed_tokens": "embed.weight"} | ({} if config.tie_embeddings else {"lm_head": "head.weight"})
    model = add_adapters(noisy_decoder(config), LoraConfig(4, whole=tuple(names)))
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= set(names.values())
    save_adapter(moved(model, *names.values()), tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["modules_to_save"] == ["embed_tokens", "lm_head"]  # a tied head too: PEFT would leave it as it was
    files = TensorFiles([tmp_path / "adapter" / "adapter_model.safetensors"])
    assert torch.equal(files.read(EMBED), files.read(HEAD)) is config.tie_embeddings
    back = load_adapter(noisy_decoder(config), tmp_path / "adapter")
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(back.logits(back(tokens)), model.logits(model(tokens)), rtol=1e-5, atol=1e-5)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_reward_model_can_have_its_embedding_whole(tmp_path):
    model = RewardModel.from_decoder(noisy_decoder(), torch.Generator().manual_seed(1))
    add_adapters(model.trunk, LoraConfig(4, whole=("embed_tokens",)))
    save_adapter(moved(model, "trunk.embed.weight"), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["embed_tokens", "score"]
    back = load_adapter(RewardModel.from_decoder(noisy_decoder(), torch.Generator()), tmp_path / "adapter")
    tokens, lengths = torch.arange(20).view(2, 10), torch.tensor([10, 7])
    torch.testing.assert_close(back(tokens, lengths), model(tokens, lengths), rtol=1e-5, atol=1e-5)


def test_a_run_trains_them_from_the_command_line(tmp_path):
    tokenizer = subjects_tokenizer()
    base = noisy_decoder(replace(GROUPED, vocab_size=tokenizer.vocab_size, tie_embeddings=True), noise=0.05)
    save_model(base, tokenizer, tmp_path / "model")
    rows = [{"prompt": f"What does {name} do?", "completion": f"It does {name}."} for name in SUBJECTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--train.steps 2 --train.num-threads 1 --train.dtype bfloat16 --adapter.rank 2 --adapter.targets q_proj"
    files = [str(tmp_path / "model"), "--messages", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["sft", *files, *options.split(), "--adapter.whole", "embed_tokens", "--json"]) == 0
    merged, count = merge_adapter(tmp_path / "model", tmp_path / "run", tmp_path / "merged")
    assert count == 2 * 2 * (32 + 32) + tokenizer.vocab_size * 32
    before, after, same = (load_decoder(path).state_dict() for path in (tmp_path / "model", tmp_path / "run" / "model", merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"embed.weight", "layers.0.attention.qkv.weight", "layers.1.attention.qkv.weight"}
    assert all(torch.equal(after[name], same[name]) for name in after)


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    model, config = noisy_decoder(SHAPES["tied"]), SHAPES["tied"]
    save_adapter(add_adapters(model, LoraConfig(4, whole=("embed_tokens",))), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    files = TensorFiles([file])
    tensors = {name: files.read(name).clone() for name in files.shapes()}
    save_tensors(tensors | {HEAD: tensors[HEAD] + 1}, file)
    fresh = noisy_decoder(config)
    with pytest.raises(UserError, match="embed_tokens.weight and base_model.model.lm_head.weight differ, but the model's head is its"):
        load_adapter(fresh, tmp_path / "adapter")
    save_tensors({name: tensor for name, tensor in tensors.items() if name != HEAD}, file)
    with pytest.raises(UserError, match=r"lm_head.weight is absent, .* as its head is its embedding \(embed_tokens\)"):
        load_adapter(fresh, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"embed_tokens.weight is \(41, 32\), but this model needs \(50, 32\)"):
        load_adapter(noisy_decoder(replace(config, vocab_size=50)), tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), noisy_decoder(config).parameters()))
    with pytest.raises(
        UserError, match="adapter.whole has 'lm_head', but what can be trained whole is embed_tokens. The head is the embed"
    ):
        add_adapters(noisy_decoder(config), LoraConfig(4, whole=("lm_head",)))
    with pytest.raises(UserError, match="adapter.whole has 'embed', but .* is embed_tokens, lm_head. Did you mean embed_tokens"):
        add_adapters(noisy_decoder(SHAPES["own head"]), LoraConfig(4, whole=("embed",)))
