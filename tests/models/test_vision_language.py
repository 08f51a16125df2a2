"""A decoder that sees: the same numbers as transformers through its files, and what the engine makes of images."""

import pytest
import safetensors.torch
import torch

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.image_prompts import ImageRunner
from plinth.inference.sampling_params import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.formats import decoder, llava
from plinth.models.hub import load_decoder, load_model, save_model
from plinth.models.meta import on_meta
from plinth.models.vision import VisionConfig
from plinth.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from plinth.training.objectives import causal_lm_loss

VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56}
TEXT = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": None}  # fmt: skip
IMAGE = 69
KINDS = [kind for kind in ("qwen3", "llama") if kind in decoder.FORMAT.model_types]
CONFIG = VisionLanguageConfig(
    VisionConfig(16, 8, 3, 48, 2, 4, 56),
    DecoderConfig(70, 32, 2, 4, 2, 16, 40, 128),
    image_id=IMAGE,
)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def published(transformers, folder, kind, **other):
    """Write a model with random weights as transformers does; returns it."""
    torch.manual_seed(0)
    text = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[kind](**TEXT)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE, image_seq_length=4, **other
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def inputs(count=2, image_tokens=4):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, 68, (count, 9 + image_tokens), generator=generator)
    tokens[:, 2 : 2 + image_tokens] = IMAGE
    return tokens, torch.randn(count, 3, 16, 16, generator=generator)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "other", [{}, {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}], ids=["patches", "class_token"]
)
def test_logits_and_loss_equal_transformers(transformers, tmp_path, kind, other):
    theirs = published(transformers, tmp_path, kind, **other)
    ours = load_model(tmp_path)
    tokens, pixels = inputs(image_tokens=4 + bool(other))
    labels = torch.where((tokens == IMAGE) | (tokens % 3 == 0), -100, tokens)
    with torch.no_grad():
        answer = theirs(input_ids=tokens, pixel_values=pixels, labels=labels, output_hidden_states=True)
        hidden = ours(tokens, pixels)
        close(ours.logits(hidden), answer.logits)
        close(hidden, answer.hidden_states[-1])
        close(ours.image_rows(pixels).flatten(0, 1), answer.image_hidden_states)
        assert not torch.allclose(ours(tokens, pixels.flip(0)), hidden, atol=1e-2)
    loss, count, _ = causal_lm_loss(ours, (tokens[:, :-1], labels[:, 1:], pixels))
    assert loss.item() / count == pytest.approx(answer.loss.item(), rel=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_writes_the_tokens_that_transformers_writes(transformers, tmp_path, kind):
    theirs = published(transformers, tmp_path, kind)
    ours = load_model(tmp_path).eval()
    tokens, pixels = inputs()
    expected = theirs.generate(input_ids=tokens, pixel_values=pixels, do_sample=False, max_new_tokens=64, pad_token_id=1)[:, 13:]
    runner = ImageRunner(ours, pixels)
    prompts = [runner.fill(row.tolist(), IMAGE, [i]) for i, row in enumerate(tokens)]
    found = Engine(runner).generate(prompts, SamplingParams(temperature=0.0, max_tokens=64))
    assert [completion.tokens for completion in found] == expected.tolist()


@pytest.mark.oracle
def test_names_of_every_release_are_read_and_round_trips_keep_every_bit(transformers, tmp_path):
    published(transformers, tmp_path / "theirs", "qwen3")
    first = load_model(tmp_path / "theirs")
    save_model(first, None, tmp_path / "hub")
    tensors = safetensors.torch.load_file(tmp_path / "hub" / "model.safetensors")
    assert {"language_model.lm_head.weight", "vision_tower.vision_model.embeddings.class_embedding"} <= set(tensors)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hub")
    theirs.save_pretrained(tmp_path / "again")
    (tmp_path / "between").mkdir()
    (tmp_path / "between" / "config.json").write_text((tmp_path / "hub" / "config.json").read_text())
    between = {name.replace("language_model.model", "model.language_model").replace("language_model.lm_head", "lm_head"): tensor
               for name, tensor in tensors.items()}  # fmt: skip
    between = {f"model.{name}" if name.startswith(("vision", "multi")) else name: tensor for name, tensor in between.items()}
    safetensors.torch.save_file(between, tmp_path / "between" / "model.safetensors")
    for folder in ("hub", "again", "between"):
        other = load_model(tmp_path / folder)
        assert other.config == first.config
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), first.parameters(), strict=True))


def model():
    return VisionLanguageModel(CONFIG).init_weights(torch.Generator().manual_seed(0)).eval()


@torch.no_grad()
def test_an_image_changes_nothing_before_it_and_rows_keep_to_their_own():
    ours, (tokens, pixels) = model(), inputs()
    for block in ours.decoder.layers:  # new blocks are the identity
        block.attention.out.weight.normal_(0.0, 0.2)
    hidden = ours(tokens, pixels)
    torch.testing.assert_close(ours(tokens, pixels.flip(0))[:, :2], hidden[:, :2])
    torch.testing.assert_close(ours(tokens[1:], pixels[1:]), hidden[1:])
    padded = torch.cat((tokens, torch.full((2, 3), 1)), 1)
    torch.testing.assert_close(ours(padded, pixels)[:, :13], hidden)
    text = tokens[:, 6:]
    torch.testing.assert_close(ours(text), ours.decoder(text))


@torch.no_grad()
def test_an_image_in_the_engine_is_the_image_in_the_model():
    ours, (tokens, pixels) = model(), inputs()
    for block in ours.decoder.layers:
        block.attention.out.weight.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(2))
    runner = ImageRunner(ours, pixels)
    prompts = [runner.fill(row.tolist(), IMAGE, [i]) for i, row in enumerate(tokens)]
    engine = Engine(runner)
    found = engine.generate(prompts, SamplingParams(temperature=1.0, max_tokens=12, seed=3))
    for row, image, completion in zip(tokens, pixels, found):
        assert max(completion.tokens) < 70  # the ids of images are never written
        whole = torch.cat((row, torch.tensor(completion.tokens)))[None]
        logprobs = ours.logits(ours(whole, image[None])).log_softmax(-1)[0, 12:-1].gather(1, whole[0, 13:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, rtol=1e-4, atol=1e-4)
    alone = Engine(ImageRunner(ours, pixels)).generate(prompts[1:], SamplingParams(temperature=1.0, max_tokens=12, seed=4))
    assert alone[0].tokens == found[1].tokens


def test_what_does_not_fit_is_refused():
    ours, (tokens, pixels) = model(), inputs()
    with pytest.raises(UserError, match=r"8 places for images, but 1 image\(s\) fill 4"):
        ours(tokens, pixels[:1])
    with pytest.raises(UserError, match="image_id=70"):
        VisionLanguageConfig(CONFIG.vision, CONFIG.decoder, image_id=70)
    with pytest.raises(UserError, match="vision_layer=3 is no layer"):
        VisionLanguageConfig(CONFIG.vision, CONFIG.decoder, image_id=69, vision_layer=3)


def test_the_published_size_is_exact():
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    config = llava.read_config({"text_config": text, "vision_config": {"model_type": "clip_vision_model"}})
    whole = on_meta(lambda: VisionLanguageModel(config))
    assert sum(parameter.numel() for parameter in whole.parameters()) == 7_063_427_072 and config.image_tokens == 576
    assert sum(parameter.numel() for parameter in whole.projector.parameters()) == 20_979_712


def test_verbs_for_decoders_name_the_verb_for_images(tmp_path):
    save_model(model(), None, tmp_path)
    with pytest.raises(UserError, match="family llava.*plinth image ask"):
        load_decoder(tmp_path)


def test_attention_is_shown_of_decoder_and_tower():
    tokens, pixels = inputs()
    shown = model().attention_weights(tokens[0], pixels[0])
    assert shown["self"].shape == (2, 4, 13, 13) and shown["vision"].shape == (2, 4, 5, 5)
    torch.testing.assert_close(shown["self"].sum(-1), torch.ones(2, 4, 13))
