"""Saved recurrent models come back bit for bit, and a damaged folder is refused with what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from plinth.config import UserError
from plinth.models.hub import SIDECAR, load_decoder, load_model, save_model
from plinth.models.recurrent import AwdLstm, AwdLstmConfig
from plinth.models.recurrent_seq2seq import RecurrentSeq2Seq, RecurrentSeq2SeqConfig

MODELS = {
    "plinth_awd_lstm": AwdLstm(AwdLstmConfig(vocab_size=31, embedding_size=6, hidden_size=10, num_layers=2)),
    "plinth_recurrent_seq2seq": RecurrentSeq2Seq(
        RecurrentSeq2SeqConfig(cell="lstm", source_vocab_size=23, target_vocab_size=19, embedding_size=6, hidden_size=8)
    ),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    model = MODELS[request.param].init_weights(torch.Generator().manual_seed(0))
    save_model(model, None, tmp_path / "model")
    return model, tmp_path / "model", request.param


def test_the_round_trip_is_exact(saved):
    model, folder, model_type = saved
    loaded = load_model(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    assert type(loaded) is type(model) and loaded.config == model.config
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_is_wrong_with_a_folder_is_said(saved):
    model, folder, _ = saved
    (folder / SIDECAR).unlink()
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    name = sorted(weights)[0]
    save_file({key: tensor for key, tensor in weights.items() if key != name} | {"extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks the tensor {name}; holds 1 tensor.*extra"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 0}))
    with pytest.raises(UserError, match="hidden_size=0 must be at least 1"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "embedding_size"}))
    with pytest.raises(UserError, match="lacks 'embedding_size'"):
        load_model(folder)


def test_a_verb_for_decoders_names_the_verb_that_takes_it(saved):
    _, folder, _ = saved
    with pytest.raises(UserError, match="needs a decoder. It goes with plinth (generate|translate)"):
        load_decoder(folder)
