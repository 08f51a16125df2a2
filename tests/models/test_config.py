"""What a decoder's configuration refuses, and which blocks it says what of."""

import json
from dataclasses import fields, replace

import pytest

from plinth.config import UserError
from plinth.models.config import EXTRAS, FAMILY, DecoderConfig, RopeScaling
from plinth.models.formats.decoder_config import read_config, write_config

BASE = DecoderConfig(num_layers=6)
YARN = RopeScaling("yarn", factor=4.0, original_max_seq_len=128)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"norm": "batch"}, "norm='batch' is unknown. Use one of rms, layer"),
        ({"position": "sinus"}, "position='sinus' is unknown. Use one of rope, learned"),
        ({"norm_offset": 1.0}, r"norm_offset=1\.0 is added to learnt scales"),
        ({"embed_multiplier": 0.0}, r"embed_multiplier=0\.0 must be positive"),
        ({"attention_softcap": 0.0}, r"attention_softcap=0\.0 must be positive"),
        ({"query_scale": -1.0}, r"query_scale=-1\.0 must be positive"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1 token"),
        ({"window_layers": (True,)}, "concern blocks with a window"),
        ({"sliding_window": 8, "window_layers": ()}, "0 entries; it needs 1 to num_layers=6"),
        ({"sliding_window": 8, "window_layers": (True,) * 7}, "7 entries; it needs 1 to num_layers=6"),
        ({"position": "learned", "rope_scaling": YARN}, "position=learned rotates nothing"),
        ({"expert_intermediate_size": 64}, "expert_intermediate_size=64 has no meaning without experts"),
        ({"num_experts": 4, "num_active_experts": 0}, "num_active_experts=0 must be from 1 to num_experts=4"),
        ({"num_experts": 4, "shared_expert_gate": True}, "shared_expert_gate=True needs a shared expert"),
        ({"num_experts": 4, "num_active_experts": 5}, "num_active_experts=5 must be from 1 to num_experts=4"),
        ({"num_experts": 4, "num_active_experts": 2, "dense_layers": (6,)}, r"dense_layers=\(6,\) names blocks beyond"),
        ({"num_experts": 4, "num_active_experts": 2, "activation": "gelu"}, "experts are gated layers without biases"),
        ({"num_experts": -1}, "num_experts=-1 must not be negative"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(options, text):
    with pytest.raises(UserError, match=text):
        replace(BASE, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "kind='dynamic' is unknown. Use one of linear, llama3, yarn"),
        ({"kind": "linear", "factor": 0.5}, r"factor=0\.5 must be at least 1"),
        ({"kind": "yarn", "factor": 2.0}, "kind=yarn needs original_max_seq_len"),
        ({"kind": "llama3", "factor": 2.0, "original_max_seq_len": 8, "low_freq_factor": 4.0}, r"low_freq_factor=4\.0 must be above 0"),
        ({"kind": "yarn", "factor": 2.0, "original_max_seq_len": 8, "beta_slow": 64.0}, r"beta_slow=64\.0 must be above 0"),
    ],
)
def test_a_scaling_out_of_range_is_refused_by_name(options, text):
    with pytest.raises(UserError, match=text):
        RopeScaling(**options)


def test_which_blocks_have_the_window():
    windowed = replace(BASE, sliding_window=8)
    assert [BASE.slides(i) for i in range(6)] == [False] * 6 and [windowed.slides(i) for i in range(6)] == [True] * 6
    assert [replace(windowed, window_layers=(True, False)).slides(i) for i in range(6)] == [True, False] * 3
    assert [replace(windowed, window_layers=(True, True, True, False)).slides(i) for i in range(6)] == [True, True, True, False, True, True]


def test_which_blocks_have_experts():
    config = replace(BASE, num_experts=4, num_active_experts=2, dense_layers=(0, 5))
    assert [config.has_experts(i) for i in range(6)] == [False, True, True, True, True, False]


def test_every_field_is_a_shape_a_multiplier_a_choice_of_the_arithmetic_or_named_here():
    """A new field must say whether other programs, several processes and the parametrisations have to know it."""
    shape = {"vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "max_seq_len",
             "rope_theta", "norm_eps", "tie_embeddings", "learnable_norm", "output_multiplier", "attention_multiplier"}  # fmt: skip
    of_training_and_exchange = {"router_aux_loss", "router_z_loss", "published_as"}
    assert {field.name for field in fields(DecoderConfig)} == shape | of_training_and_exchange | set(EXTRAS) | set(FAMILY)


def test_a_configuration_of_all_kinds_of_values_comes_back_from_its_file():
    config = replace(BASE, rope_scaling=YARN, sliding_window=8, window_layers=(True, False), qkv_bias=True, query_scale=0.1)
    values = json.loads(json.dumps(write_config(config)))
    assert values["model_type"] == "plinth" and read_config(values) == config
