"""CLIP through Hugging Face's files: the same numbers as transformers, both ways."""

import json

import pytest
import safetensors.torch
import torch

from plinth.config import UserError
from plinth.models.dual_encoder import DualEncoder, DualEncoderConfig, TextTowerConfig
from plinth.models.hub import load_model, save_model
from plinth.models.vision import VisionConfig

TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 1, "projection_dim": 24}  # fmt: skip
VISION = {"image_size": 16, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56,
          "projection_dim": 24}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def published(transformers, folder, text=None, vision=None):
    """Write a model with random weights as transformers does; returns it."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT | (text or {}), vision_config=VISION | (vision or {}), projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    for name, parameter in model.named_parameters():
        if "layer_norm" in name or "layrnorm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, 58, (3, 9), generator=generator)
    tokens[0, 6:], tokens[1, 8:], tokens[2, 3:] = 5, 5, 5
    return tokens, torch.randn(4, 3, 16, 16, generator=generator)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.oracle
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_logits_states_and_loss_equal_transformers(transformers, tmp_path, activation):
    other = {"hidden_act": activation}
    theirs = published(transformers, tmp_path, other, other)
    ours = load_model(tmp_path)
    tokens, pixels = inputs()
    with torch.no_grad():
        answer = theirs(input_ids=tokens, pixel_values=pixels[:3], return_loss=True, output_hidden_states=True)
        close(ours(tokens, pixels[:3]), answer.logits_per_image)
        close(ours.text(tokens), answer.text_model_output.last_hidden_state)
        for layer in (0, 1, 2, -1, -2):
            close(ours.vision(pixels[:3], layer), answer.vision_model_output.hidden_states[layer])
        close(ours.encode_image(pixels), torch.nn.functional.normalize(theirs.get_image_features(pixels).pooler_output, dim=-1))
    from plinth.training.objectives_contrastive import contrastive_loss

    loss, count, _ = contrastive_loss(ours, (tokens, pixels[:3]))
    assert loss.item() / count == pytest.approx(answer.loss.item(), rel=1e-5)


@pytest.mark.oracle
def test_the_first_published_configurations_and_their_wrong_end(transformers, tmp_path):
    theirs = published(transformers, tmp_path, {"eos_token_id": 2})
    tokens, pixels = inputs()
    tokens[tokens == 5] = 59  # the highest id ends a caption there
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config_dict"], values["text_config"]["hidden_size"] = {"hidden_size": 32}, 512
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.no_grad():
        close(load_model(tmp_path)(tokens, pixels), theirs(input_ids=tokens, pixel_values=pixels).logits_per_image)


@pytest.mark.oracle
def test_transformers_reads_ours_and_both_round_trips_keep_every_bit(transformers, tmp_path):
    config = DualEncoderConfig(TextTowerConfig(60, 32, 2, 2, 48, 12), VisionConfig(16, 4, 3, 48, 2, 4, 56), 24)
    ours = DualEncoder(config).init_weights(torch.Generator().manual_seed(3)).eval()
    save_model(ours, None, tmp_path / "ours")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "ours").eval()
    tokens, pixels = inputs()
    with torch.no_grad():
        close(ours(tokens, pixels), theirs(input_ids=tokens, pixel_values=pixels).logits_per_image)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.config == config and same(again.state_dict(), ours.state_dict())
    published(transformers, tmp_path / "first")
    save_model(load_model(tmp_path / "first"), None, tmp_path / "second")
    first, second = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert same(first, second)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_we_do_not_compute_is_named(tmp_path):
    config = DualEncoderConfig(TextTowerConfig(60, 32, 1, 2, 48, 12), VisionConfig(8, 4, 3, 32, 1, 2, 48), 16)
    save_model(DualEncoder(config).init_weights(torch.Generator().manual_seed(0)), None, tmp_path)
    (tmp_path / "plinth.json").unlink()
    values = json.loads((tmp_path / "config.json").read_text())
    for tower, name, value in (("text_config", "hidden_act", "relu6"), ("vision_config", "patch_size", [4, 2])):
        (tmp_path / "config.json").write_text(json.dumps(values | {tower: values[tower] | {name: value}}))
        with pytest.raises(UserError, match=f"{tower}.{name}.*is not supported"):
            load_model(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"lacks the tensor visual_projection\.weight"):
        load_model(tmp_path)
