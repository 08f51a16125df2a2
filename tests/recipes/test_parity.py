"""Every family that transformers has gives its numbers through files that we write and that are imported again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from plinth.models.config import DecoderConfig
from plinth.models.dual_encoder import DualEncoderConfig, TextTowerConfig
from plinth.models.encoder_config import EncoderConfig
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.models.hub import FORMATS, format_of, load_model, save_model
from plinth.models.recurrent import AwdLstmConfig
from plinth.models.vision import VisionConfig
from plinth.models.vision_language import VisionLanguageConfig
from plinth.recipes.export_oracles import transformers_answers
from plinth.recipes.importing import import_model
from plinth.recipes.parity import PROBES, compare, describe_parity, differences

ENCODER = EncoderConfig(vocab_size=90, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_seq_len=40)
T5 = EncoderDecoderConfig(
    style="t5", vocab_size=90, hidden_size=32, num_layers=2, num_heads=2, head_dim=16, intermediate_size=48, max_seq_len=40
)
CONFIGS = {
    "qwen3": DecoderConfig(vocab_size=90, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48),
    "bert": ENCODER,
    "bert, entities": ENCODER.with_head("tag", ("O", "B-X", "I-X")),
    "bert, answers": ENCODER.with_head("answer"),
    "t5": T5,
    "marian": replace(T5, style="transformer"),
    "clip": DualEncoderConfig(
        text=TextTowerConfig(vocab_size=90, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_seq_len=12),
        vision=VisionConfig(image_size=16, patch_size=8, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48),
        projection_size=16,
    ),
}
CONFIGS["llava"] = VisionLanguageConfig(vision=CONFIGS["clip"].vision, decoder=CONFIGS["qwen3"], image_id=89)


def random_model(config):
    model = format_of(config).build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    return model.eval()


def family(model) -> str:
    return next(name for name, format in FORMATS.items() if format is format_of(model.config))


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_of_every_family(name, tmp_path):
    pytest.importorskip("transformers")
    model = random_model(CONFIGS[name])
    save_model(model, None, tmp_path / "model")
    probe = PROBES[family(model)]
    inputs = probe.inputs(model.config, None)
    arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
    theirs, _ = transformers_answers(str(tmp_path / "model"), arrays, probe.output(model.config), [])
    check = differences(model, probe, inputs, theirs)
    assert check["max_logit_difference"] <= 2e-5 * max(check["scale"], 1) and check["kl_nats_max"] < 1e-6 and check["tokens"] > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_published_imports_to_the_same_tensors(name, tmp_path):
    model = random_model(CONFIGS[name])
    save_model(model, None, tmp_path / "model")
    done = import_model(str(tmp_path / "model"), tmp_path / "out", parity=False)
    state, back = model.state_dict(), load_model(done.path).state_dict()
    assert state.keys() == back.keys() and all(torch.equal(tensor, back[key]) for key, tensor in state.items())
    assert done.used_by.startswith("plinth ") and done.notes == ("it has no tokenizer: token ids are all that it takes",)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_answers_differ_from_themselves_by_nothing(name):
    model = random_model(CONFIGS[name])
    probe = PROBES[family(model)]
    inputs = probe.inputs(model.config, None)
    with torch.no_grad():
        answer = probe.ours(model, inputs).float().numpy()
    found = differences(model, probe, inputs, answer)
    assert found["max_logit_difference"] <= 1e-5 * found["scale"] and found["same_best_token"] == 1
    answer = np.array(answer)
    answer[0] += 1.0
    assert differences(model, probe, inputs, answer)["max_logit_difference"] == pytest.approx(1.0, abs=1e-3)


def test_what_nothing_else_reads_is_said(tmp_path):
    config = AwdLstmConfig(vocab_size=30, hidden_size=8, num_layers=2)
    model = random_model(config)
    check = compare(model, None, tmp_path)
    assert "awd-lstm" in check["skipped"]
    assert describe_parity({"program": "transformers", **check}).startswith("not compared with transformers: nothing else reads")
