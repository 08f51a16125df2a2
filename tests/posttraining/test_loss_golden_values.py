"""Golden values of the post-training losses, made in float64 by TRL 1.16 (and by TRL 1.12 for PPO), which is not needed here.

Where its value implies a constant rounded to float32 in the midst of float64, the test says so and rounds that constant too.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from plinth.posttraining.advantage import gae, token_rewards, whiten
from plinth.posttraining.distill_losses import divergence
from plinth.posttraining.pair_scores import Pairs, implicit_rewards, wpo_weights
from plinth.posttraining.policy_config import POLICY_LOSSES
from plinth.posttraining.policy_losses import PolicyBatch, policy_loss
from plinth.posttraining.preference_losses import mixed_loss, odds_ratio, preference_loss, sigmoid, simpo
from plinth.posttraining.preference_objective import desensitised_log_probs
from plinth.posttraining.reward_losses import bradley_terry_loss
from plinth.posttraining.unpaired_losses import apo_zero_unpaired, kto, kto_reference_point

TENTH_DIGIT = 6e-11  # the values have ten decimals
EIGHTH_DIGIT = 6e-9


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def rounded(value):
    return float(np.float32(value))


MASK = f64([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1]])  # two chosen answers, then two rejected
STEPS = -(torch.arange(20, dtype=torch.float64).reshape(4, 5) + 1) / 10
POLICY, REFERENCE, TOKENS = STEPS * MASK, (STEPS * 0.9 - 0.05) * MASK, MASK.sum(1)


def pairs_of(policy_4, reference_4):
    return Pairs(policy_4[:2], policy_4[2:], reference_4[:2], reference_4[2:], TOKENS[:2], TOKENS[2:])


PAIRS = pairs_of(POLICY.sum(1), REFERENCE.sum(1))


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("sigmoid", {}, 0.6768012944),
        ("hinge", {}, 0.9670000000),
        ("ipo", {}, 24.0345625000),
        ("sft", {"tokens_per_pair": 3.5}, 0.5428571429),
        ("sigmoid_norm", {"beta": 0.1}, 0.6882841336),
        ("robust", {"epsilon": 0.1}, 0.6726762944),
        ("nca_pair", {}, 1.3781534750),
        ("bco_pair", {}, 1.3699979638),
        ("sppo_hard", {}, 46.8629000000),
        ("apo_zero", {}, 0.9917516696),
        ("apo_down", {}, 0.9913760508),
        ("discopop", {}, 0.8676175686),
        ("aot", {"epsilon": 0.1}, 0.6801012944),
        ("aot_unpaired", {}, 0.6768012944),
        ("sigmoid", {"divergence": "forward_kl"}, 0.6723715254),
        ("sigmoid", {"divergence": "js"}, 0.6840125510),
        ("sigmoid_norm", {"divergence": "forward_kl", "beta": 0.1}, 0.6870893388),
        ("sigmoid_norm", {"divergence": "js", "beta": 0.1}, 0.6904643844),
        ("hinge", {"divergence": "forward_kl"}, 0.9579048856),
        ("hinge", {"divergence": "js"}, 0.9816318334),
        ("ipo", {"divergence": "forward_kl"}, 23.8000208526),
        ("ipo", {"divergence": "js"}, 24.4656473997),
        ("robust", {"divergence": "forward_kl", "epsilon": 0.1}, 0.6671096361),
        ("robust", {"divergence": "js", "epsilon": 0.1}, 0.6817165302),
        ("discopop", {"divergence": "forward_kl"}, 0.8699782331),
        ("discopop", {"divergence": "js"}, 0.8596798935),
    ],
)
def test_preference_losses(name, options, value):
    total, count, metrics = preference_loss(name, PAIRS, **options)
    assert abs(float(total) / count - value) < TENTH_DIGIT
    assert count == 2 and metrics["accuracy"] == 2.0


def test_exo_with_its_two_logarithms_rounded_to_float32():
    total, count, _ = preference_loss("exo_pair", PAIRS, epsilon=0.1)
    right = torch.sigmoid(0.1 * PAIRS.difference_B)
    logs = math.log(0.9), math.log(0.1)
    shift = (right * (logs[0] - rounded(logs[0])) + (1 - right) * (logs[1] - rounded(logs[1]))).mean()
    assert abs(float(total) / count + float(shift) - 0.4928549252) < TENTH_DIGIT


def test_mpo_is_a_mixture_of_three_losses():
    loss_B, _ = mixed_loss(PAIRS, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {"sft": {"tokens_per_pair": 3.5}})
    assert abs(float(loss_B.mean()) - 1.3582977711) < TENTH_DIGIT


def test_length_desensitised_dpo():
    sides = [torch.stack([values[:2], values[2:]], 1) for values in (POLICY, REFERENCE, MASK)]
    policy_B2, reference_B2 = (desensitised_log_probs(values, sides[2], 0.5) for values in sides[:2])
    pairs = Pairs(*policy_B2.unbind(1), *reference_B2.unbind(1))
    assert abs(float(sigmoid(pairs).mean()) - 0.6787613312) < TENTH_DIGIT


def test_weighted_preference_optimisation():
    adjusted = POLICY + 0.5  # minus the logarithm of Σp², here -0.5 everywhere
    weights = wpo_weights(adjusted[:2], MASK[:2], adjusted[2:], MASK[2:])
    total, count, _ = preference_loss("sigmoid", PAIRS, weights_B=weights)
    assert abs(float(total) / count - 0.2517606535) < TENTH_DIGIT


def test_metrics_are_the_rewards_that_trl_logs():
    chosen, rejected = implicit_rewards(PAIRS, 0.1)
    assert float(chosen.mean()) == pytest.approx(-0.0015, abs=1e-12) and float(rejected.mean()) == pytest.approx(-0.0345, abs=1e-12)
    _, count, metrics = preference_loss("sigmoid", PAIRS)
    assert metrics["margin"] / count == pytest.approx(0.033, abs=1e-12)
    assert (float(PAIRS.chosen_B.mean()), float(PAIRS.rejected_B.mean())) == pytest.approx((-1.9, -4.95))


def test_smoothed_labels_are_read():
    assert float(preference_loss("cdpo", PAIRS, epsilon=0.1)[0]) / 2 == pytest.approx(0.6768012944 + 0.1 * 0.033, abs=1e-9)


def test_kto():
    ratio, desirable = POLICY.sum(1) - REFERENCE.sum(1), torch.tensor([True, False, True, False])
    above, below = (kto_reference_point(f64([z, z]), f64([0, 0])) for z in (0.1, -0.1))
    assert abs(float(kto(ratio, desirable, reference_point=above).mean()) - 0.4966263188) < TENTH_DIGIT
    assert abs(float(kto(ratio, desirable, reference_point=below).mean()) - 0.4966258072) < TENTH_DIGIT
    assert abs(float(kto(ratio, desirable, reference_point=above, undesirable_weight=1.33).mean()) - 0.5774149060) < TENTH_DIGIT
    assert abs(float(apo_zero_unpaired(ratio, desirable).mean()) - 0.4966258072) < TENTH_DIGIT


@pytest.mark.parametrize(
    ("options", "value"), [({}, 0.6945561849), ({"center_coef": 0.01}, 0.7035561849), ({"margin_B": f64([1, 0.5, 0])}, 0.9336087693)]
)
def test_reward_model(options, value):
    total, count, metrics = bradley_terry_loss(f64([1.2, -0.3, 0.5]), f64([0.1, 0.4, 0.5]), **options)
    assert abs(float(total) / count - value) < TENTH_DIGIT
    assert metrics["accuracy"] == 1.0  # of three: a tie is wrong


LOG_PROBS = -(torch.arange(16, dtype=torch.float64).reshape(4, 4) + 1) / 20
SAMPLED = PolicyBatch(
    LOG_PROBS,
    LOG_PROBS + f64([[1], [-1], [0.5], [-0.5]]) * f64([0.3, -0.3, 0.1, -0.1]),
    f64([[1], [-0.5], [0.25], [-0.75]]),
    (torch.arange(4) < torch.tensor([[4], [3], [2], [1]])).double(),
    LOG_PROBS - 0.2,
)


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("grpo", {}, 0.0433390549),
        ("dapo", {"epsilon_high": 0.2}, -0.1957571567),
        ("dapo", {}, -0.2037571567),
        ("dr_grpo", {"max_tokens": 8}, -0.0611741115),
        ("gspo", {"epsilon_low": 0.2, "epsilon_high": 0.2}, 0.0345808097),
        ("grpo", {"ratio_cap": 1.1}, 0.0456004404),
        ("luspo", {}, -0.5194454119),
        ("grpo", {"kl_coef": 0.04, "kl_weighted": True}, 0.0441376517),
        ("grpo", {"kl_coef": 0.04}, 0.0440882851),
        ("cispo", {}, -0.0268808672),
        ("cispo", {"weight_cap": 0.2}, -0.0040000000),
        ("sapo", {"temperature_negative": rounded(1.05)}, 0.0017080698),  # a float32 temperature
        ("vespo", {}, -0.0307856046),
        ("gspo_token", {"epsilon_low": 0.2, "epsilon_high": 0.2}, 0.0345808097),  # GSPO's
        ("grpo", {"off_policy_threshold": 0.02}, 0.0433390549),
        ("grpo", {"off_policy_threshold": -0.1}, -0.0922871836),
    ],
)
def test_policy_losses(name, options, value):
    total, count, _ = policy_loss(SAMPLED, replace(POLICY_LOSSES[name], **options))
    assert abs(float(total) / count - value) < TENTH_DIGIT


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("grpo", {"mismatch": "token_truncate", "mismatch_cap": 1.3}, 0.0783406594),
        ("grpo", {"mismatch": "token_mask", "mismatch_cap": 1.3}, -0.0979734508),
        ("grpo", {"mismatch": "token_mask", "mismatch_cap": 1.3, "mismatch_floor": 0.9}, -0.0571897462),
        ("grpo", {"mismatch": "sequence_truncate"}, 0.4055627387),
        ("grpo", {"mismatch": "sequence_mask"}, -0.0013159770),
        ("vespo", {"mismatch": "token_truncate"}, 0.0283454802),
        ("grpo", {"off_policy_threshold": 0.1}, -0.1745048656),
    ],
)
def test_policy_losses_of_another_engine(name, options, value):
    """Worked out with TRL's functions for mask and weights, its ratios of trainer and engine by hand."""
    engine = SAMPLED.sampler_BT + f64([[0.2], [-0.4], [0.1], [0.3]])
    total, count, metrics = policy_loss(replace(SAMPLED, engine_BT=engine), replace(POLICY_LOSSES[name], **options))
    assert abs(float(total) / count - value) < TENTH_DIGIT
    assert ("mismatch_weight" in metrics) == ("mismatch" in options) and ("off_policy_dropped" in metrics) != ("mismatch" in options)


def test_preference_losses_without_a_reference():
    one = torch.ones(2)
    pairs = Pairs(torch.tensor([-0.5, -1.0]), torch.tensor([-0.9, -0.8]), chosen_tokens_B=one, rejected_tokens_B=one)
    torch.testing.assert_close(odds_ratio(pairs), torch.tensor([0.0367728956, 0.0876326710]), atol=1e-8, rtol=0)  # TRL's are float32
    torch.testing.assert_close(simpo(pairs), torch.tensor([0.79813892, 1.62041736]), atol=2e-7, rtol=0)
    cpo, _, _ = preference_loss("cpo", pairs, beta=2.0, nll_coef=0.0)
    assert float(cpo) == pytest.approx(0.37110069 + 0.91301525, abs=2e-7)


@pytest.mark.parametrize(
    ("beta", "temperature", "value"),
    [(0, 1, 0.68026686), (0.1, 1, 0.06134118), (0.5, 1, 0.17677271), (0.9, 1, 0.06994536), (1, 1, 0.80755830), (0.5, 2, 0.04927592)],
)
def test_generalised_jensen_shannon_divergence(beta, temperature, value):
    student, teacher = f64([[1, 0, -1], [0.5, 0.5, 0]]), f64([[0, 1, 0], [1, -1, 0]])
    total = divergence("jsd", student, teacher, beta=beta, temperature=temperature).sum()
    assert abs(float(total) - value) < 6e-8  # TRL's are float32


# The inputs were not kept with the values: these are worked out from the advantages with the score past the end. What they give for the
# other place of the score and for whitening is then a test.
VALUES = f64([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]])
KL = f64([[0.1, -0.2, 0.3, 0, 0], [0.05, 0.05, -0.1, 0.2, 0.1]])
COUNTED = f64([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("past_end", "first_row"),
    [(True, [0.76920312, 0.7096875, 0.63125, 0.575, 0.5]), (False, [0.81207187, 0.7548125, 0.67875, 0.625, -0.5])],
)
def test_advantages_of_ppo(past_end, first_row):
    rewards = token_rewards(KL, f64([1, -1]), COUNTED, kl_coef=0.05, past_end=past_end)
    advantages, returns = gae(rewards, VALUES, gamma=1.0, lam=0.95)
    expected = f64([first_row, [-1.27995316, -1.23942438, -1.1967625, -1.15975, -1.105]])
    torch.testing.assert_close(advantages, expected, atol=EIGHTH_DIGIT, rtol=0)
    torch.testing.assert_close(returns, advantages + VALUES)


def test_whitened_advantages_of_ppo():
    rewards = token_rewards(KL, f64([1, -1]), COUNTED, kl_coef=0.05, past_end=True)
    whitened = whiten(gae(rewards, VALUES)[0], COUNTED)
    torch.testing.assert_close(whitened[0], f64([1.15057851, 1.09026712, 1.01078086, 0.95377876, 0]), atol=EIGHTH_DIGIT, rtol=0)
