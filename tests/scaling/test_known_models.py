"""Shapes of published models: parameter counts against published ones and against transformers, FLOPs against the closed form."""

import json

import pytest

from plinth.config import UserError
from plinth.scaling.known_models import KNOWN_MODELS, find_model, shape_from_hf

# Model cards and model folders on the Hugging Face hub; for MPT the column NumParams of llm-foundry's benchmark tables, context 2,048.
PUBLISHED_COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gpt-2": 124_439_808,
    "gpt-2-medium": 354_823_168,
    "gpt-2-large": 774_030_080,
    "gpt-2-xl": 1_557_611_200,
    "mpt-1b": 1_315_950_592,
    "mpt-3b": 2_651_837_440,
    "mpt-7b": 6_658_859_008,
    "mpt-13b": 12_853_954_560,
    "mpt-30b": 29_975_214_080,
    "mpt-70b": 64_862_437_376,
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_parameters_are_the_published_number(name):
    assert find_model(name).num_params == PUBLISHED_COUNTS[name]


def test_names_are_keys_and_case_does_not_matter():
    assert all(shape.name == name for name, shape in KNOWN_MODELS.items())
    assert find_model("Llama-3-70B") is KNOWN_MODELS["llama-3-70b"]


def test_flops_follow_the_closed_form():
    """6 N + 12 L H E s with all attended positions, 6 N + 6 L H E (s + 1) causal; N without the embedding."""
    for name, products, layers, heads in (
        ("llama-3-8b", 7_504_658_432, 32, 4096),
        ("gpt-2-xl", 48 * 12 * 1600**2 + 50257 * 1600, 48, 1600),
    ):
        shape = find_model(name)
        assert shape.train_flops_per_token(1024, causal=False) == 6 * products + 12 * layers * heads * 1024
        assert shape.train_flops_per_token(1024) == 6 * products + 6 * layers * heads * 1025
        assert shape.attention_flops_per_token(1024) == 2 * layers * heads * 1025


def small_configs():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80)
    return {
        "llama": transformers.LlamaConfig(**sizes, max_position_embeddings=64),
        "llama, tied": transformers.LlamaConfig(**sizes, max_position_embeddings=64, tie_word_embeddings=True),
        "mistral": transformers.MistralConfig(**sizes, max_position_embeddings=64),
        "qwen2": transformers.Qwen2Config(**sizes, max_position_embeddings=64, tie_word_embeddings=False),
        "qwen3": transformers.Qwen3Config(**sizes, max_position_embeddings=64, head_dim=16, tie_word_embeddings=False),
        "olmo2": transformers.Olmo2Config(**sizes, max_position_embeddings=64),
        "gpt2": transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=48, n_layer=3, n_head=4),
    }


@pytest.mark.oracle
def test_any_supported_config_json_has_the_parameters_that_transformers_makes(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    for name, config in small_configs().items():
        config.save_pretrained(tmp_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert find_model(str(tmp_path)).num_params == model.num_parameters(), name


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["olmo-2-7b", "olmo-2-13b", "olmo-2-32b", "qwen3-32b"])
def test_models_without_a_published_count_have_the_parameters_that_transformers_makes(name):
    transformers = pytest.importorskip("transformers")
    import torch

    decoder = find_model(name).decoder
    kind = transformers.Olmo2Config if name.startswith("olmo") else transformers.Qwen3Config
    extra = {"head_dim": decoder.head_dim} if kind is transformers.Qwen3Config else {}
    config = kind(vocab_size=decoder.vocab_size, hidden_size=decoder.hidden_size, num_hidden_layers=decoder.num_layers,
                  num_attention_heads=decoder.num_heads, num_key_value_heads=decoder.num_kv_heads,
                  intermediate_size=decoder.intermediate_size, tie_word_embeddings=False, **extra)  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert find_model(name).num_params == model.num_parameters()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral' cannot be planned. Supported: llama"),
        ({}, "model_type='None' cannot be planned"),
        ({"model_type": "llama", "hidden_size": 64}, "lacks num_hidden_layers, num_attention_heads, intermediate_size"),
    ],
)
def test_a_config_that_cannot_be_planned_says_why(values, message):
    with pytest.raises(UserError, match="config.json") as error:
        shape_from_hf(values, "config.json")
    assert message in str(error.value)


def test_an_unknown_name_lists_the_nearest(tmp_path):
    with pytest.raises(UserError, match="model='llama3-70b'.*Nearest: llama-3-70b"):
        find_model("llama3-70b")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}))
    with pytest.raises(UserError, match="lacks vocab_size, max_position_embeddings"):
        find_model(str(tmp_path))
