"""The time model is a sum of known costs, and finds the rates that made its points."""

import pytest

from plinth.models.config import DecoderConfig
from plinth.scaling.candidates import decoder_config
from plinth.scaling.timing import StepTiming, TimeModel, body_params, fit_time_model, muon_flops, step_cost

TRUE = TimeModel(1 / 1.1e12, 2e-10, 3e-11, 2e-3)


def timings(shapes, model=TRUE):
    costs = [step_cost(decoder_config(layers, width, vocab, 512, None), tokens, 256, "adamw") for layers, width, vocab, tokens in shapes]
    return [StepTiming(cost, model.step_s(cost)) for cost in costs]


def test_predicts_an_unseen_shape_from_three():
    model = fit_time_model(timings([(3, 128, 2048, 4096), (6, 256, 4096, 4096), (4, 512, 2048, 2048)]), 2.3e12, 50e9)
    for shape in [(5, 192, 3072, 3072), (8, 384, 4096, 8192)]:
        (unseen,) = timings([shape])
        assert model.step_s(unseen.cost) == pytest.approx(unseen.step_s, rel=0.15)
    assert model.relative_rmse < 0.05 and model.num_points == 3


def test_no_point_leaves_the_machine_and_no_term_is_negative():
    model = fit_time_model([], 1e12, 40e9)
    assert model.seconds_per_flop == pytest.approx(4e-12) and model.seconds_per_state_byte == pytest.approx(1 / 40e9)
    odd = [StepTiming(t.cost, t.step_s * f) for t, f in zip(timings([(3, 128, 2048, 4096), (6, 256, 4096, 4096)]), (3.0, 0.5))]
    model = fit_time_model(odd, 1e12, 40e9)
    assert min(model.seconds_per_flop, model.seconds_per_traffic_byte, model.seconds_per_state_byte, model.seconds_per_layer) >= 0
    assert model.relative_rmse > 0.15


def test_more_work_takes_longer():
    small, large = (step_cost(decoder_config(4, 128, 2048, 512, None), tokens, 256, "adamw") for tokens in (2048, 4096))
    assert TRUE.step_s(small) < TRUE.step_s(large) < 2 * TRUE.step_s(small)


def test_muon_flops_by_hand():
    # One block, width 64, one head of 64, feed-forward 128: q, k, v, o are 64 x 64; gate, up, down are 64 x 128.
    config = DecoderConfig(vocab_size=300, hidden_size=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, intermediate_size=128)
    square, long = 4 * 64**3 + 2 * 64**3, 4 * 64 * 64 * 128 + 2 * 64**3
    assert muon_flops(config) == 5 * (4 * square + 3 * long)
    adamw, muon = (step_cost(config, 1024, 256, name).flops for name in ("adamw", "muon"))
    assert muon - adamw == muon_flops(config)


def test_body_leaves_out_embedding_and_head():
    tied, untied = (decoder_config(4, 128, 2048, 512, tie) for tie in (True, False))
    assert body_params(tied) == body_params(untied)
