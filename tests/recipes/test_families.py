"""Folders as transformers writes them, of every family, are imported, compute the same, and are written back tensor for tensor."""

import pytest
import safetensors.torch
import torch

from plinth.models.hub import load_model, save_model
from plinth.recipes.export_oracles import transformers_answers
from plinth.recipes.importing import import_model
from plinth.recipes.parity import PROBES, differences

SHAPE = {"vocab_size": 150, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 64}
GROUPED = SHAPE | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}
WINDOWED = WIDE | {"sliding_window": 16, "query_pre_attn_scalar": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
SIDES = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIZES.items()}
CLIP_TEXT = SHAPE | {"max_position_embeddings": 12, "eos_token_id": 149, "bos_token_id": 148, "pad_token_id": 1}
CLIP_VISION = {name: size for name, size in SHAPE.items() if name not in ("vocab_size", "max_position_embeddings")}
CLIP_VISION |= {"image_size": 16, "patch_size": 8}
# Architecture → (name of its configuration, its values).
ARCHITECTURES = {
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 150, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "LlamaForCausalLM, scaled": ("LlamaConfig", GROUPED | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "MistralForCausalLM": ("MistralConfig", GROUPED | {"sliding_window": 16}),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", WIDE),
    "GemmaForCausalLM": ("GemmaConfig", WIDE),
    "Gemma2ForCausalLM": ("Gemma2Config", WINDOWED),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", WINDOWED),
    "MixtralForCausalLM": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", WIDE | EXPERTS),
    "BertForMaskedLM": ("BertConfig", SHAPE),
    "BertForSequenceClassification": ("BertConfig", SHAPE),
    "ElectraForPreTraining": ("ElectraConfig", SHAPE | {"embedding_size": 16}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 150, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "n_positions": 64},
    ),
    "MarianMTModel": (
        "MarianConfig",
        {"vocab_size": 150, "d_model": 32, **SIDES, "max_position_embeddings": 64, "pad_token_id": 149, "decoder_start_token_id": 149},
    ),
    "CLIPModel": ("CLIPConfig", {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16}),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {"text_config": GROUPED | {"model_type": "llama"}, "vision_config": CLIP_VISION | {"model_type": "clip_vision_model"}}
        | {"image_token_index": 149, "image_seq_length": 4},
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_transformers_publishes_is_imported_computes_the_same_and_goes_back(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind, values = ARCHITECTURES[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, name.split(",")[0])(getattr(transformers, kind)(**values)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # no weight at a neutral value, so that none is ignored unseen
            parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "published")
    done = import_model(str(tmp_path / "published"), tmp_path / "model", parity=False)
    assert done.notes == ("it has no tokenizer: token ids are all that it takes",)
    model, probe = load_model(done.path), PROBES[done.family]
    inputs = probe.inputs(model.config, None)
    arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
    answer, _ = transformers_answers(str(tmp_path / "published"), arrays, probe.output(model.config), [])
    found = differences(model, probe, inputs, answer)
    assert found["max_logit_difference"] <= 1e-5 * max(found["scale"], 1.0) and found["scale"] > 0.01
    save_model(model, None, tmp_path / "back")
    before, after = (safetensors.torch.load_file(tmp_path / folder / "model.safetensors") for folder in ("published", "back"))
    if done.family != "llava":  # written under the names of the models on the hub, where transformers now writes others
        assert before.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    state, back = model.state_dict(), load_model(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in state.items())
