"""Every published family against transformers, through real files: scores, hidden states, loss, greedy text, and both round trips."""

import copy
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from decoder_families import FAMILIES, random_decoder, some_tokens
from plinth.config import UserError, read_json
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams
from plinth.inference.torch_runner import TorchRunner
from plinth.models.cost import count_params
from plinth.models.formats.decoder_config import read_config, write_config
from plinth.models.formats.decoder_families import FAMILIES as PUBLISHED
from plinth.models.formats.decoder_families import published_type
from plinth.models.hub import load_model, save_model
from plinth.training.objectives import causal_lm_loss

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 128, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": None,
         "pad_token_id": None}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": None}
WINDOW = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2}
GEMMA = SHAPE | {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24}
CASES = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2 exact gelu, no scale": ("GPT2Config", GPT2 | {"activation_function": "gelu", "scale_attn_weights": False, "n_inner": 56}),
    "llama 2": ("LlamaConfig", SHAPE | {"num_key_value_heads": 4}),
    "llama 3": ("LlamaConfig", SHAPE | {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama with biases, linear": (
        "LlamaConfig",
        SHAPE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "smollm": ("LlamaConfig", SHAPE | {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": 11, "head_dim": 16}),
    "mistral without a window": ("MistralConfig", SHAPE | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", SHAPE | {"tie_word_embeddings": True}),
    "qwen2.5 yarn, windows": ("Qwen2Config", SHAPE | WINDOW | {"rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", SHAPE | {"head_dim": 16}),
    "qwen3 biases, windows, yarn": ("Qwen3Config", SHAPE | WINDOW | {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN}),
    "gemma": ("GemmaConfig", SHAPE | {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "mixtral": ("MixtralConfig", SHAPE | {"num_local_experts": 4}),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1], "head_dim": 16},
    ),
    "qwen2 moe": (
        "Qwen2MoeConfig",
        SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let small products run in one thread: several would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request, tmp_path_factory):
    """A model of transformers with random weights, none neutral, its folder, and ours of that folder."""
    kind, values = CASES[request.param]
    config = getattr(transformers, kind)(**values)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.25, generator=generator)
        theirs.tie_weights()
    folder = tmp_path_factory.mktemp("published") / "model"
    theirs.save_pretrained(folder)
    return theirs, folder, load_model(folder)


@torch.no_grad()
def test_scores_hidden_states_and_loss_are_those_of_transformers(case):
    theirs, _, ours = case
    x, streams = some_tokens(2, 48, 97), []
    for layer in ours.layers:
        layer.register_forward_pre_hook(lambda module, args: streams.append(args[0] if args[1] is None else args[0] + args[1]))
    expected = theirs(x, labels=x, output_hidden_states=True)
    hidden = ours(x)
    scale = expected.logits.abs().max()
    assert (ours.logits(hidden) - expected.logits).abs().max() < 1e-5 * scale
    for found, wanted in zip((*streams, hidden), expected.hidden_states):
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    plain = copy.copy(ours)  # the losses of routers stand apart there
    plain.config = replace(ours.config, router_aux_loss=0.0, router_z_loss=0.0)
    total, count, _ = causal_lm_loss(plain, (x[:, :-1], x[:, 1:]))
    assert total / count == pytest.approx(float(expected.loss), rel=1e-5)


@torch.no_grad()
def test_64_greedy_tokens_are_those_of_transformers(case):
    theirs, _, ours = case
    prompts = some_tokens(2, 20, 97)
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, do_sample=False, pad_token_id=0)
    params = SamplingParams(temperature=0, max_tokens=64)
    found = Engine(TorchRunner(ours)).generate(prompts.tolist(), params)
    assert [completion.tokens for completion in found] == expected[:, 20:].tolist()


def test_both_round_trips_keep_every_bit(case, tmp_path):
    theirs, folder, ours = case
    save_model(ours, None, tmp_path / "ours")
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = load_model(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(back) is type(theirs)
    x = some_tokens(1, 40, 97)
    with torch.no_grad():
        assert torch.equal(back(x).logits, theirs(x).logits)


def test_parameters_are_counted_as_transformers_has_them(case):
    theirs, _, ours = case
    assert count_params(ours.config)["total"] == theirs.num_parameters() == sum(p.numel() for p in ours.parameters())


def test_a_folder_saved_without_the_head_loads(tmp_path):
    """As the published gpt2 is: without the first word of every name."""
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    theirs.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in safetensors.torch.load_file(tmp_path / "model.safetensors")
    x = some_tokens(1, 10, 97)
    ours = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(x)), theirs(x).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_our_own_decoders_are_published_as_the_family_that_holds_them(name, tmp_path):
    config = FAMILIES[name]
    kinds = {"llama 3": "llama", "llama with biases": "llama", "gemma3": "gemma3_text", "layer norms and gelu": "plinth"}
    kind = kinds.get(name, name)
    assert published_type(config) == kind
    model = random_decoder(config)
    save_model(model, None, tmp_path / "model")
    assert read_json(tmp_path / "model" / "config.json")["model_type"] == kind
    assert load_model(tmp_path / "model").config == config
    if kind != "plinth":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
        x = some_tokens(1, 40)
        with torch.no_grad():
            expected, found = theirs(x).logits, model.logits(model(x))
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_scales_that_are_not_learnt_are_published_as_ones(name, tmp_path):
    config = replace(FAMILIES[name], learnable_norm=False)
    save_model(random_decoder(config), None, tmp_path / "model")
    assert load_model(tmp_path / "model").config == config
    tensors = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert all((tensor == 1).all() for key, tensor in tensors.items() if key.endswith("norm.weight"))


def test_a_family_that_is_named_must_hold_the_decoder():
    config = FAMILIES["llama"]
    assert write_config(replace(config, published_as="mistral"))["model_type"] == "mistral"
    with pytest.raises(UserError, match="published_as=qwen3 cannot hold this decoder: qk_norm=False is not True"):
        write_config(replace(config, published_as="qwen3"))
    with pytest.raises(UserError, match="published_as='bloom' is none of qwen3, llama"):
        write_config(replace(config, published_as="bloom"))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_what_config_json_leaves_out_is_what_transformers_takes(kind):
    """Old files lack fields of today: each default is the class's own."""
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    needed = (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "sliding_window", "num_experts", "num_local_experts",
        "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
    )  # fmt: skip
    assert read_config({name: theirs[name] for name in needed if name in theirs}) == read_config(theirs)
