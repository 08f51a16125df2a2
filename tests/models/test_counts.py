"""Closed forms of published models: against transformers, published totals and numbers worked by hand."""

import json
from dataclasses import replace

import pytest
import torch

from decoder_families import BASE, FAMILIES
from models.transformers_counts import GOLDEN, transformers_count
from plinth.cli.main import main
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.cost import count_active_params, count_params, forward_flops_per_token, kv_bytes_per_token
from plinth.models.counts.describe import CostQuestion, describe, stored_params
from plinth.models.counts.families import COUNTED, count
from plinth.models.counts.memory import OPTIMIZERS, adapter_params, state_bytes
from plinth.models.dual_encoder import DualEncoderConfig, TextTowerConfig
from plinth.models.encoder_config import EncoderConfig
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.models.formats.decoder_config import write_config
from plinth.models.hub import format_of, save_model
from plinth.models.presets import PRESETS
from plinth.models.recurrent import AwdLstmConfig
from plinth.models.recurrent_seq2seq import RecurrentSeq2SeqConfig
from plinth.models.transformer import Transformer
from plinth.models.vision import VisionConfig
from plinth.models.vision_language import VisionLanguageConfig
from plinth.scaling.known_models import KNOWN_MODELS

# transformers 5 ties these heads whatever config.json says; their makers released them untied.
UNTIED_BY_THEIR_MAKERS = ("flan-t5-base", "mt5-small")

PUBLISHED = {  # totals of the released weights
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-1-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704, "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624, "gpt-2": 124_439_808, "gpt-2-xl": 1_557_611_200,
    "bert-base-uncased": 109_514_298, "t5-small": 60_506_624, "t5-base": 222_903_552, "clip-vit-b-32": 151_277_313,
    "clip-vit-l-14": 427_616_513, "electra-small": 13_549_057, "electra-small-generator": 13_546_682, "electra-base": 109_483_009,
    "electra-base-generator": 33_740_602, "electra-large": 335_142_913, "llava-1.5-7b": 7_063_427_072, "flan-t5-base": 247_577_856,
    "olmoe-1b-7b": 6_919_161_856, "gemma-2-9b": 9_241_705_984, "gpt-oss-20b": 20_914_757_184,
}  # fmt: skip

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
         "vocab_size": 131, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SMALL_GPT = {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 131, "n_positions": 40, "bos_token_id": 1, "eos_token_id": 2}
SMALL_PAIR = {"d_model": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 80, "vocab_size": 131}
SMALL_MLA = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
             "topk_group": 1, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10,
             "num_key_value_heads": 4}  # fmt: skip
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, "image_size": 16, "patch_size": 8}
VARIANTS = [
    {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    {"model_type": "llama", **SMALL, "head_dim": 20, "tie_word_embeddings": True},
    {"model_type": "mistral", **SMALL, "head_dim": 20},
    {"model_type": "qwen2", **SMALL},
    {"model_type": "qwen3", **SMALL, "attention_bias": True},
    {"model_type": "gemma", **SMALL, "head_dim": 16},
    {"model_type": "gemma2", **SMALL, "head_dim": 16},
    {"model_type": "gemma3_text", **SMALL, "head_dim": 16},
    {"model_type": "granite", **SMALL, "tie_word_embeddings": True},
    {"model_type": "smollm3", **SMALL, "tie_word_embeddings": False},
    {"model_type": "phi3", **SMALL},
    {"model_type": "phi", **SMALL},
    {"model_type": "cohere", **SMALL},
    {"model_type": "starcoder2", **SMALL},
    {"model_type": "olmo", **SMALL},
    {"model_type": "olmo2", **SMALL},
    {"model_type": "olmoe", **SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "mixtral", **SMALL, "num_local_experts": 3},
    {"model_type": "qwen2_moe", **SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
     "shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
    {"model_type": "qwen3_moe", **SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 20,
     "decoder_sparse_step": 2},
    {"model_type": "gpt_oss", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "deepseek_v2", **SMALL, **SMALL_MLA, "first_k_dense_replace": 1, "q_lora_rank": None},
    {"model_type": "deepseek_v3", **SMALL, **SMALL_MLA, "first_k_dense_replace": 2, "q_lora_rank": 16},
    {"model_type": "gpt2", **SMALL_GPT, "n_inner": 100},
    {"model_type": "gptj", **SMALL_GPT, "rotary_dim": 4},
    {"model_type": "gpt_neox", **SMALL, "attention_bias": False},
    {"model_type": "opt", **SMALL, "ffn_dim": 100, "word_embed_proj_dim": 20},
    {"model_type": "bloom", "hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 131},
    {"model_type": "falcon", **SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    {"model_type": "falcon", **SMALL, "bias": True, "parallel_attn": False, "multi_query": True},
    {"model_type": "mpt", "d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 131},
    *({"model_type": "bert", **SMALL, "architectures": [f"Bert{top}"]} for top in (
        "Model", "ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")),
    *({"model_type": "electra", **SMALL, "embedding_size": 20, "architectures": [f"Electra{top}"]} for top in (
        "Model", "ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")),
    *({"model_type": "roberta", **SMALL, "architectures": [f"Roberta{top}"]} for top in ("Model", "ForSequenceClassification")),
    {"model_type": "distilbert", "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80, "vocab_size": 131,
     "architectures": ["DistilBertForSequenceClassification"]},
    {"model_type": "modernbert", **SMALL, "architectures": ["ModernBertModel"]},
    {"model_type": "esm", **SMALL, "position_embedding_type": "rotary", "mask_token_id": 3, "architectures": ["EsmModel"]},
    {"model_type": "t5", **SMALL_PAIR, "feed_forward_proj": "gated-gelu", "architectures": ["T5ForConditionalGeneration"]},
    {"model_type": "bart", "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
     "decoder_attention_heads": 2, "encoder_ffn_dim": 80, "decoder_ffn_dim": 90, "vocab_size": 131, "max_position_embeddings": 40,
     "architectures": ["BartForConditionalGeneration"]},
    {"model_type": "marian", "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
     "decoder_attention_heads": 2, "encoder_ffn_dim": 80, "decoder_ffn_dim": 90, "vocab_size": 131, "max_position_embeddings": 40,
     "pad_token_id": 1, "decoder_start_token_id": 1, "architectures": ["MarianMTModel"]},
    {"model_type": "vit", **TOWER, "architectures": ["ViTForImageClassification"], "id2label": {0: "a", 1: "b", 2: "c"}},
    {"model_type": "clip", "projection_dim": 24, "text_config": {**SMALL, "projection_dim": 24},
     "vision_config": {**TOWER, "projection_dim": 24}, "architectures": ["CLIPModel"]},
    {"model_type": "llava", "text_config": {"model_type": "llama", **SMALL}, "vision_config": {"model_type": "clip_vision_model", **TOWER},
     "image_token_index": 5, "tie_word_embeddings": False, "architectures": ["LlavaForConditionalGeneration"]},
]  # fmt: skip


OURS = ("plinth", "plinth_awd_lstm", "plinth_recurrent_seq2seq")


def golden() -> dict[str, int]:
    return json.loads(GOLDEN.read_text())


def test_every_preset_has_the_count_that_transformers_gives():
    counts = golden()
    assert len(PRESETS) >= 40 and counts.keys() == PRESETS.keys()
    wrong = {name for name, values in PRESETS.items() if count(values).total != counts[name]}
    assert wrong == set(UNTIED_BY_THEIR_MAKERS)
    for name in UNTIED_BY_THEIR_MAKERS:
        assert count({**PRESETS[name], "tie_word_embeddings": True}).total == counts[name]


def test_presets_have_the_size_of_the_released_weights():
    assert {name: count(PRESETS[name]).total for name in PUBLISHED} == PUBLISHED


@pytest.mark.oracle
def test_small_models_of_every_family_have_the_count_that_transformers_gives():
    assert {values["model_type"] for values in VARIANTS} | {"mt5", "xlm-roberta", *OURS} == set(COUNTED)
    found = [(values["model_type"], values.get("architectures"), count(values).total) for values in VARIANTS]
    assert found == [(values["model_type"], values.get("architectures"), transformers_count(values)) for values in VARIANTS]


@pytest.mark.oracle
@pytest.mark.slow
def test_the_golden_counts_are_those_of_transformers():
    assert {name: transformers_count(values) for name, values in PRESETS.items()} == golden()


@pytest.mark.parametrize(
    ("name", "matmul", "kv_bytes", "context", "train_flops"),
    [
        ("llama-2-7b", 6_607_077_376, 524_288, 4096, 46.08e9),
        ("llama-2-70b", 68_713_185_280, 327_680, 4096, 444.5e9),
        ("llama-3-8b", 7_504_658_432, 131_072, 8192, 57.91e9),
        ("llama-3.1-405b", 403_747_897_344, 516_096, 8192, 2625e9),
        ("mistral-7b", 7_110_393_856, 131_072, 4096, 49.1e9),
        ("gpt-2", 123_532_032, 36_864, 1024, 0.854e9),
    ],
)
def test_operations_and_cache_are_those_worked_by_hand(name, matmul, kv_bytes, context, train_flops):
    ledger = count(PRESETS[name])
    assert (ledger.matmul, 2 * ledger.kv_per_token) == (matmul, kv_bytes)
    assert ledger.train_flops_per_token(context) == pytest.approx(train_flops, rel=1e-3)
    assert ledger.train_flops_per_token(context, attention="none") == 6 * matmul


def test_active_parameters_of_mixtures():
    active = {name: count(PRESETS[name]).active for name in ("mixtral-8x7b", "qwen3-30b-a3b")}
    assert active == {"mixtral-8x7b": 12_879_925_248, "qwen3-30b-a3b": 3_353_032_704}


def test_the_cache_of_latent_attention_is_one_latent_and_one_rotary_key_a_layer():
    assert count(PRESETS["deepseek-v3"]).kv_per_token == 61 * (512 + 64)


def test_a_window_bounds_what_is_cached_and_weighed():
    ledger = count(PRESETS["gemma-3-1b"])  # 22 of 26 layers see 512 positions
    width = 2 * 1 * 256
    assert ledger.kv_numbers(8192) == width * (22 * 512 + 4 * 8192)
    assert ledger.kv_numbers(512) == 512 * ledger.kv_per_token
    full = dict(PRESETS["mistral-7b"], sliding_window=None)
    wide = dict(PRESETS["mistral-7b"], sliding_window=4096)
    for attention in ("full", "causal"):
        assert count(wide).forward_flops(4096, attention=attention) == count(full).forward_flops(4096, attention=attention)
        assert count(wide).forward_flops(4097, attention=attention) < count(full).forward_flops(4097, attention=attention)


def test_causal_pairs_within_a_window_are_counted_one_by_one():
    group = count(dict(PRESETS["mistral-7b"], sliding_window=3)).attending[0]
    assert [group.scores(n, n, causal=True) for n in (1, 2, 3, 5)] == [1, 3, 6, 12]


def test_the_default_decoder_costs_what_its_own_cost_model_says():
    config = DecoderConfig(num_kv_heads=2, vocab_size=300, learnable_norm=True)
    ledger = count(write_config(config))
    assert ledger.total == sum(p.numel() for p in Transformer(config).parameters())
    assert ledger.forward_flops(100, attention="causal") == 100 * forward_flops_per_token(config, 100)
    assert ledger.kv_per_token * 4 == kv_bytes_per_token(config)


@pytest.mark.parametrize(
    "config",
    [
        AwdLstmConfig(vocab_size=31, embedding_size=6, hidden_size=10),
        AwdLstmConfig(vocab_size=31, embedding_size=6, hidden_size=10, num_layers=1, tie_embeddings=False),
        *(RecurrentSeq2SeqConfig(source_vocab_size=31, target_vocab_size=23, embedding_size=6, hidden_size=10, **more) for more in (
            {"attention": "none", "cell": "lstm", "num_layers": 2, "bidirectional": False, "repeat_context": False},
            {"attention": "none", "bidirectional": False},
            {"attention": "additive"},
            {"attention": "multiplicative", "cell": "lstm", "num_layers": 2, "input_feeding": True},
            {"attention": "multiplicative", "score": "dot", "bidirectional": False},
        )),
    ],
)  # fmt: skip
def test_recurrent_models_of_ours_are_counted(config):
    format = format_of(config)
    model = format.build(config)
    ledger = count(format.write_config(config))
    assert ledger.total == sum(p.numel() for p in model.parameters())
    scored = {id(model.embed.weight), *(id(p) for name, p in model.named_parameters() if "score" in name or "embed" in name)}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in scored)
    tied = model.embed.weight.numel() if getattr(config, "tie_embeddings", False) else 0
    assert ledger.matmul == matrices + tied


def test_the_courses_translation_models_have_its_parameters():
    shape = {"model_type": "plinth_recurrent_seq2seq", "source_vocab_size": 7853, "target_vocab_size": 5893, "embedding_size": 256,
             "hidden_size": 512, "num_hidden_layers": 1, "bidirectional": False}  # fmt: skip
    lstm = {**shape, "cell": "lstm", "attention": "none", "repeat_context": False, "num_hidden_layers": 2}
    gru = {**shape, "cell": "gru", "attention": "none"}
    attention = {**shape, "cell": "gru", "attention": "additive", "bidirectional": True}
    assert [count(each).total for each in (lstm, gru, attention)] == [13_898_501, 14_219_781, 20_518_405]


MORE = {
    "options": replace(BASE, activation="relu2", residual_scalars=True, value_embeddings=True),
    "layer norms": replace(BASE, norm="layer", qkv_bias=True, out_bias=True, mlp_bias=True, position="learned", activation="gelu"),
    "experts": replace(BASE, num_experts=4, expert_intermediate_size=24, shared_expert_intermediate_size=16, dense_layers=(1,)),
    "gated shared expert": replace(BASE, num_experts=4, shared_expert_intermediate_size=16, shared_expert_gate=True),
}


@pytest.mark.parametrize("config", [*FAMILIES.values(), *MORE.values()], ids=[*FAMILIES, *MORE])
def test_decoders_of_every_family_are_counted_from_what_is_saved_of_them(config):
    config = replace(config, learnable_norm=True)
    ledger = count(format_of(config).write_config(config))
    assert ledger.total == sum(p.numel() for p in Transformer(config).parameters()) == count_params(config)["total"]
    assert ledger.active == count_active_params(config)
    assert ledger.kv_per_token * 4 == kv_bytes_per_token(config)
    if config.sliding_window is None:
        assert ledger.forward_flops(64, attention="causal") == 64 * forward_flops_per_token(config, 64)
    else:  # our cost model counts attention as if no block had a window
        assert ledger.forward_flops(8, attention="causal") == 8 * forward_flops_per_token(config, 8)


TEXT = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "intermediate_size": 40, "max_seq_len": 30}
TOWERS = DualEncoderConfig(
    text=TextTowerConfig(**TEXT), vision=VisionConfig(image_size=16, patch_size=8, hidden_size=16, num_layers=1, num_heads=2)
)
OTHERS = {
    **{head: EncoderConfig(**TEXT).with_head(head, ("a", "b", "c") if head in ("classify", "tag") else ()) for head in (
        "mlm", "classify", "tag", "answer")},
    "none": EncoderConfig(**TEXT, head="none", pooler=True),
    "electra": EncoderConfig(**TEXT, published_as="electra", embedding_size=12).with_head("rtd"),
    "transformer": EncoderDecoderConfig(**TEXT, head_dim=6, num_decoder_layers=3, target_vocab_size=47),
    "t5": EncoderDecoderConfig(**TEXT, head_dim=10, style="t5", activation="geglu", tie_embeddings=False),
    "clip": TOWERS,
    "llava": VisionLanguageConfig(vision=TOWERS.vision, decoder=FAMILIES["llama"], image_id=3),
}  # fmt: skip


@pytest.mark.parametrize("config", OTHERS.values(), ids=list(OTHERS))
def test_other_models_of_ours_are_counted_from_what_is_saved_of_them(config):
    format = format_of(config)
    model = format.build(config)
    trained = sum(p.numel() for p in model.parameters())
    assert count(format.write_config(config)).total == trained


def test_planning_on_a_cluster_knows_the_same_models():
    both = {name for name in KNOWN_MODELS.keys() & PRESETS.keys() if not name.startswith("mpt")}  # those are a benchmark's variants of MPT
    assert len(both) >= 15
    assert {name: KNOWN_MODELS[name].num_params for name in both} == {name: count(PRESETS[name]).total for name in both}


def test_sharded_states_of_llama_2_7b():
    params, adamw = count(PRESETS["llama-2-7b"]).total, OPTIMIZERS["AdamW, bf16"]
    gib = {
        (gpus, sharding): round(state_bytes(params, adamw, gpus, sharding) / 2**30, 1)
        for gpus in (1, 8, 64)
        for sharding in ("zero1", "zero2", "zero3")
    }
    assert gib[1, "zero1"] == gib[1, "zero3"] == 100.4
    assert [gib[8, s] for s in ("zero1", "zero2", "zero3")] == [34.5, 23.5, 12.6]
    assert [gib[64, s] for s in ("zero1", "zero2", "zero3")] == [26.3, 13.9, 1.6]


def test_adapters_have_a_row_and_a_column_of_each_matrix():
    ledger = count({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11})
    assert adapter_params(ledger, 3) == 2 * 3 * (4 * (8 + 8) + 2 * (8 + 32))


def test_pieces_add_up_and_stored_weights_are_compared(tmp_path):
    config = DecoderConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
                           intermediate_size=48, max_seq_len=64, learnable_norm=True)  # fmt: skip
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    save_model(model, None, tmp_path / "model")
    for source in (tmp_path, tmp_path / "model", tmp_path / "model" / "config.json"):
        record = describe(str(source), CostQuestion(context=32))
        assert record["parameters"]["total"] == sum(piece["parameters"] for piece in record["pieces"])
    assert stored_params(tmp_path / "model") == count(write_config(config)).total


def test_the_command_answers_machines_and_people(capsys):
    assert main(["params", "qwen3-0.6b", "--json", "--context", "1024"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"]["total"] == 596_049_920
    assert record["cache"] == {"bytes_a_token": 114_688, "bytes_a_sequence": 1024 * 114_688}
    assert main(["params", "deepseek-v3", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "671,026,404,352 parameters" in text and all(word in text for word in ("14,848", " 464 ", "2048 x 7168"))
    assert main(["params", "--list"]) == 0
    assert "deepseek_v3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "mamba"}, "is not counted"),
        ({"model_type": "llama", "hidden_size": 8}, "lacks num_hidden_layers, num_attention_heads, intermediate_size"),
        ({"model_type": "llama", **SMALL, "hidden_size": -1}, "hidden_size=-1 is not a size"),
        ({"model_type": "bert", **SMALL, "architectures": ["BertForNextSentencePrediction"]}, "BertForNextSentencePrediction"),
        ({"model_type": "vit", **TOWER, "patch_size": 32}, "smaller than patch_size"),
    ],
)
def test_what_cannot_be_counted_is_named(values, words):
    with pytest.raises(UserError, match=words):
        count(values)


def test_sources_that_are_none_are_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[]")
    for source, words in (
        ("lama-2-7b", "Did you mean llama-2-7b?"),
        (str(tmp_path / "no"), "does not exist"),
        (str(tmp_path), "not a table"),
    ):
        assert main(["params", source]) == 1
        assert words in capsys.readouterr().err
    assert main(["params"]) == 1
    assert main(["params", "gpt-2", "--gpus", "0"]) == 1
    assert "gpus=0 must be at least 1" in capsys.readouterr().err
