"""Reward models: read at the last real token whatever the padding, and the same scores in transformers."""

import dataclasses
import importlib

import pytest
import torch

from decoder_families import FAMILIES
from plinth.config import UserError, read_json, save_json
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, load_model, save_model
from plinth.models.reward import RewardModel
from plinth.models.transformer import Transformer
from plinth.recipes.parity import PROBES

TINY = DecoderConfig(
    vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, max_seq_len=64
)
MULTIPLIERS = dataclasses.replace(TINY, output_multiplier=0.25, attention_multiplier=0.5**0.5, norm_eps=1e-2)
CONFIGS = FAMILIES | {"multipliers": MULTIPLIERS, "multipliers, untied": dataclasses.replace(MULTIPLIERS, tie_embeddings=False)}


def reward_model(config=TINY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    decoder = Transformer(config).init_weights(generator)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    return RewardModel.from_decoder(decoder, generator)


def padded(rows, more, pad_id):
    """Return tokens and lengths of rows that are padded beyond the longest."""
    tokens = torch.full((len(rows), more + max(map(len, rows))), pad_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) for row in rows])


ROWS = [[5, 9, 3, 7, 7], [8, 7], [4, 4, 4, 7, 2, 6, 7]]


@pytest.mark.parametrize("pad_id", [0, 7])  # 7 ends the texts too: whoever looks for it reads at the wrong place
@pytest.mark.parametrize("more", [0, 5])
def test_complaint_11_score_is_read_at_the_last_token_whatever_the_padding_transformers_35352_trl_422(more, pad_id):
    model = reward_model()
    alone = torch.cat([model(torch.tensor([row]), torch.tensor([len(row)])) for row in ROWS])
    torch.testing.assert_close(model(*padded(ROWS, more, pad_id)), alone, rtol=1e-5, atol=1e-5)


def test_head_is_drawn_with_variance_one_over_width_plus_one():
    config = dataclasses.replace(TINY, hidden_size=4096, num_layers=1, intermediate_size=8, head_dim=8)
    model = RewardModel.from_decoder(Transformer(config), torch.Generator().manual_seed(0))
    assert model.config.bias == 0.0
    assert abs(model.score.weight.std().item() * 4097**0.5 - 1) < 0.04


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_identical_but_for_multipliers(name, tmp_path):
    model = reward_model(CONFIGS[name])
    model.rescale(2.0, -1.5)
    save_model(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert isinstance(loaded, RewardModel) and loaded.config.bias == model.config.bias == -1.5
    for (key, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(ours, theirs), key


def test_rescale_maps_every_score():
    model = reward_model()
    args = padded(ROWS, 0, 0)
    before = model(*args)
    model.rescale(3.0, 0.5)
    model.rescale(0.5, -1.0)
    torch.testing.assert_close(model(*args), 0.5 * (3 * before + 0.5) - 1.0)


@pytest.mark.oracle
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("layer norms and gelu",)])
def test_transformers_gives_equal_scores(name, tmp_path):
    model = reward_model(CONFIGS[name])
    model.rescale(1.0, 0.75)
    save_model(model, None, tmp_path / "model")
    values = read_json(tmp_path / "model/config.json")
    theirs = getattr(importlib.import_module("transformers"), values["architectures"][0]).from_pretrained(tmp_path / "model").eval()
    theirs.config.pad_token_id = 0
    tokens, lengths = padded(ROWS, 3, 0)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        scores = theirs(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]
        alone = theirs(input_ids=tokens[2:, :7]).logits
    torch.testing.assert_close(model(tokens, lengths), scores + 0.75, rtol=1e-4, atol=1e-4)
    probed = PROBES["reward model"].ours(model, {"input_ids": tokens[2:, :7]})  # what `plinth import` compares
    torch.testing.assert_close(probed.detach(), alone, rtol=1e-4, atol=1e-4)


def test_other_verbs_refuse_it_by_name_and_classifiers_are_no_reward_models(tmp_path):
    save_model(reward_model(), None, tmp_path / "model")
    with pytest.raises(UserError, match="family reward model.*plinth reward score"):
        load_decoder(tmp_path / "model")
    values = read_json(tmp_path / "model/config.json")
    save_json(tmp_path / "model/config.json", values | {"id2label": {"0": "a", "1": "b", "2": "c"}})
    (tmp_path / "model/plinth.json").unlink()
    with pytest.raises(UserError, match="classifier of 3 labels"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_at_the_last_token_is_what_the_whole_trunk_gives(name):
    model = reward_model(CONFIGS[name])
    tokens = torch.tensor([[5, 9, 3, 7, 7, 0], [8, 7, 0, 0, 0, 0]])
    lengths = torch.tensor([5, 2])
    whole = model.read(model.trunk(tokens))[torch.arange(2), lengths - 1]
    torch.testing.assert_close(model(tokens, lengths), whole, rtol=1e-5, atol=1e-5)
    parameters = list(model.trunk.layers.parameters())
    for ours, theirs in zip(torch.autograd.grad(model(tokens, lengths).sum(), parameters), torch.autograd.grad(whole.sum(), parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
