"""Advantages and policy losses against scalar loops, their gradients, and the laws that each switch obeys."""

import math
from dataclasses import replace

import pytest
import torch

from plinth.config import UserError
from plinth.posttraining.advantage import (
    adapted_kl_coef,
    gae,
    global_advantages,
    greedy_baseline_advantages,
    group_advantages,
    informative_groups,
    kl_estimate,
    leave_one_out_advantages,
    separate_reward_advantages,
    token_rewards,
    whiten,
)
from plinth.posttraining.policy_config import POLICY_LOSSES
from plinth.posttraining.policy_losses import (
    PolicyBatch,
    PolicyLoss,
    aggregate,
    importance_ratio,
    mismatch_weights,
    policy_loss,
    value_loss,
)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LENGTHS = [5, 3, 1, 4]
MASK = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).double()
NEW, OLD, REFERENCE = (-random(4, 5, seed=seed).abs() for seed in (1, 2, 3))
ADVANTAGES = random(4, 1, seed=4)
BATCH = PolicyBatch(NEW, OLD, ADVANTAGES, MASK, REFERENCE)


def clip_term(rho, a, low, high):
    return -min(rho * a, min(max(rho, 1 - low), 1 + high) * a)


def loop(name, settings):
    """One member of the family in plain Python: a list of each sequence's token losses."""
    rows = []
    for new, old, (a,), length in zip(NEW.tolist(), OLD.tolist(), ADVANTAGES.tolist(), LENGTHS):
        logs = [n - o for n, o in zip(new, old)][:length]
        if settings.level != "token":
            whole = sum(logs) / (length if settings.level in ("sequence_mean", "sequence_token") else 1)
            logs = [whole] * length
        if name == "sapo":
            tau = 1.0 if a > 0 else 1.05
            rows.append([-4 / tau / (1 + math.exp(-tau * (math.exp(x) - 1))) * a for x in logs])
        elif name == "vespo":
            w, (k, rate) = math.exp(logs[0]), (2, 3) if a >= 0 else (3, 2)
            rows.append([-(w**k) * math.exp(rate * (1 - w)) * a * n for n in new[:length]])
        elif name == "cispo":
            rows.append([-min(math.exp(x), 5.0) * a * n for x, n in zip(logs, new)])
        else:
            rows.append([clip_term(math.exp(x), a, settings.epsilon_low, settings.epsilon_high) for x in logs])
    return rows


def averaged(rows, how, max_tokens):
    if how == "token":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if how == "fixed_length":
        return sum(map(sum, rows)) / (len(rows) * max_tokens)
    return sum(sum(row) / (len(row) if how == "sequence_mean" else 1) for row in rows) / len(rows)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_member_of_the_family_equals_a_scalar_loop(name):
    settings = replace(POLICY_LOSSES[name], max_tokens=7)
    total, count, _ = policy_loss(BATCH, settings)
    assert float(total) / count == pytest.approx(averaged(loop(name, settings), settings.aggregation, 7), rel=1e-12)


@pytest.mark.parametrize(
    "name", sorted(set(POLICY_LOSSES) - {"cispo", "vespo", "gspo_token"})
)  # where a factor is a constant to the gradient
def test_gradients_equal_finite_differences(name):
    settings = replace(POLICY_LOSSES[name], max_tokens=7, kl_coef=0.1, kl_weighted=True)
    assert torch.autograd.gradcheck(lambda x: policy_loss(replace(BATCH, log_probs_BT=x), settings)[0], [NEW.clone().requires_grad_()])


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_the_sampler_the_gradient_is_that_of_reinforce(name):
    settings = replace(POLICY_LOSSES[name], max_tokens=7)
    new = OLD.clone().requires_grad_()
    total, _, metrics = policy_loss(replace(BATCH, log_probs_BT=new), settings)
    total.backward()
    plain = OLD.clone().requires_grad_()
    loss_BT = -ADVANTAGES * plain
    if settings.level == "sequence_mean":  # every token has the gradient of the mean
        loss_BT = (loss_BT * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True) * torch.ones(5)
    if settings.level == "sequence_sum" and name != "vespo":
        loss_BT = (loss_BT * MASK).sum(1, keepdim=True) * torch.ones(5)
    aggregate(loss_BT, MASK, settings.aggregation, 7)[0].backward()
    torch.testing.assert_close(new.grad, plain.grad)
    assert metrics["clip_fraction"] == 0 and metrics["kl_sampler"] == 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_splits_and_padding_change_nothing(name):
    settings = replace(POLICY_LOSSES[name], max_tokens=7, kl_coef=0.1)
    total, count, metrics = policy_loss(BATCH, settings)
    parts = []
    for part in (slice(0, 3), slice(3, 4)):
        rows = [getattr(BATCH, field)[part] for field in ("log_probs_BT", "sampler_BT", "advantages_BT", "mask_BT", "reference_BT")]
        wide = [torch.nn.functional.pad(row, (0, 2)) if row.shape[1] > 1 else row for row in rows]
        parts.append(policy_loss(PolicyBatch(*wide), settings))
    assert float(total) == pytest.approx(sum(float(part[0]) for part in parts), rel=1e-12)
    assert count == sum(part[1] for part in parts)
    assert metrics == pytest.approx({key: parts[0][2][key] + parts[1][2][key] for key in metrics})


def test_caps_of_a_negative_advantage():
    batch = PolicyBatch(f64([[3.0]]), f64([[0.0]]), f64([[-1.0]]), f64([[1.0]]))
    ratio = math.exp(3)
    for options, value in (({}, ratio), ({"ratio_cap": 2.0}, 2.0), ({"dual_clip": 3.0}, 3.0)):
        assert float(policy_loss(batch, PolicyLoss(**options))[0]) == pytest.approx(value)
    with pytest.raises(UserError, match="dual_clip=1.0 must be above 1"):
        PolicyLoss(dual_clip=1.0)


def test_an_empty_completion_counts_nowhere():
    mask = torch.stack([MASK[0], torch.zeros(5)])
    for how in ("token", "sequence_mean", "sequence_sum"):
        assert aggregate(NEW[:2], mask, how)[1] == aggregate(NEW[:1], mask[:1], how)[1]
    assert torch.isfinite(importance_ratio(NEW[:2], OLD[:2], mask, "sequence_mean")).all()


def test_settings_are_checked():
    with pytest.raises(UserError, match="level='word' is none of token"):
        PolicyLoss(level="word")
    with pytest.raises(UserError, match="Use level=token"):
        PolicyLoss(surrogate="weighted", level="sequence_mean")
    for options, text in (
        ({"surrogate": "gamma"}, "Use level=sequence_sum"),
        ({"mismatch": "tis"}, "mismatch='tis' is none of token_truncate"),
        ({"mismatch_cap": 0.5}, "must lie on both sides of 1"),
        ({"mismatch_floor": 4.0}, "must lie on both sides of 1"),
        ({"weight_cap": 0.0}, "weight_cap=0.0 must be positive"),
        ({"gamma_negative": (0.0, 1.0)}, r"gamma_negative=\(0.0, 1.0\): both numbers"),
    ):
        with pytest.raises(UserError, match=text):
            PolicyLoss(**options)
    with pytest.raises(ValueError, match="mismatch=token_mask needs engine_BT"):
        policy_loss(BATCH, PolicyLoss(mismatch="token_mask"))
    with pytest.raises(UserError, match="max_tokens=None"):
        policy_loss(BATCH, POLICY_LOSSES["dr_grpo"])
    with pytest.raises(ValueError, match="needs reference_BT"):
        policy_loss(replace(BATCH, reference_BT=None), PolicyLoss(kl_coef=0.1))


def test_value_loss_takes_the_worse_of_two_squares():
    values, old, returns = random(4, 5, seed=5), random(4, 5, seed=6), random(4, 5, seed=7)
    total, expected, clipped = 0.0, 0.0, 0
    for i, length in enumerate(LENGTHS):
        for v, o, r in zip(*(x[i, :length].tolist() for x in (values, old, returns))):
            near = o + min(max(v - o, -0.2), 0.2)
            expected += 0.5 * max((v - r) ** 2, (near - r) ** 2)
            clipped += (near - r) ** 2 > (v - r) ** 2
    total, count, metrics = value_loss(values, old, returns, MASK)
    assert float(total) == pytest.approx(expected, rel=1e-12) and count == sum(LENGTHS)
    assert metrics == {"value_clip_fraction": clipped}
    plain, _, _ = value_loss(values, old, returns, MASK, clip=None)
    assert float(plain) == pytest.approx(float(0.5 * ((values - returns) ** 2 * MASK).sum()))
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, MASK)[0], [values.clone().requires_grad_()])


def test_weights_of_a_mismatched_engine():
    """huggingface/trl#4159: what the engine drew is weighted by how much likelier the trainer finds it."""
    trainer, engine, mask = f64([[0.0, 0.0, -9.0]]), f64([[-2.0, 0.5, 0.0]]), f64([[1, 1, 0]])

    def weights(mode, **limits):
        return mismatch_weights(trainer, engine, mask, mode=mode, **limits)

    torch.testing.assert_close(weights("token_truncate", cap=2.0), f64([[2.0, math.exp(-0.5), 1.0]]))
    torch.testing.assert_close(weights("token_truncate", floor=0.9), f64([[3.0, 0.9, 1.0]]))
    torch.testing.assert_close(weights("token_mask", cap=2.0), f64([[0.0, math.exp(-0.5), 1.0]]))
    torch.testing.assert_close(weights("token_mask", cap=9.0, floor=0.9), f64([[math.exp(2), 0.0, 1.0]]))
    assert weights("sequence_truncate", cap=2.0).tolist() == [[2.0]] and weights("sequence_mask", cap=2.0).tolist() == [[0.0]]
    torch.testing.assert_close(weights("sequence_mask", cap=5.0), f64([[math.exp(1.5)]]))


def test_untruncated_weights_make_another_engines_samples_unbiased():
    """The expected gradient over what the engine draws is that over what the trainer draws, once the cap bounds nothing."""
    policy, engine = (random(6, seed=seed).log_softmax(0) for seed in (11, 12))
    advantages = random(6, 1, seed=13)

    def expected_gradient(drawn_from, **settings):
        logits = random(6, seed=11).requires_grad_()
        log_probs = logits.log_softmax(0)[:, None]
        batch = PolicyBatch(log_probs, policy[:, None], advantages * drawn_from.exp()[:, None], torch.ones(6, 1), engine_BT=engine[:, None])
        policy_loss(batch, PolicyLoss(**settings))[0].backward()
        return logits.grad

    plain = expected_gradient(policy)
    assert float((engine - policy).abs().max()) > 1
    torch.testing.assert_close(expected_gradient(engine, mismatch="token_truncate", mismatch_cap=1e3), plain)
    assert not torch.allclose(expected_gradient(engine), plain, atol=1e-2)


def test_gspo_token_is_gspo_where_all_tokens_have_one_advantage_and_differs_where_not():
    def gradient(name, advantages):
        new = NEW.clone().requires_grad_()
        settings = replace(POLICY_LOSSES[name], epsilon_low=0.9, epsilon_high=9.0)
        total, _, _ = policy_loss(replace(BATCH, log_probs_BT=new, advantages_BT=advantages), settings)
        total.backward()
        return total.detach(), new.grad

    one, each = ADVANTAGES, random(4, 5, seed=20)
    for whole, token in zip(gradient("gspo", one), gradient("gspo_token", one)):
        torch.testing.assert_close(token, whole)
    (value, whole), (same, token) = gradient("gspo", each), gradient("gspo_token", each)
    torch.testing.assert_close(same, value)
    ratio = importance_ratio(NEW, OLD, MASK, "sequence_mean")
    torch.testing.assert_close(token, -ratio * each * MASK / MASK.sum(1, keepdim=True))
    assert not torch.allclose(token, whole, atol=1e-3)


def test_the_gamma_weight_is_largest_at_its_mode_and_ends_at_nothing():
    """φ(1) = 1, its largest value lies at k/λ, and neither a vanished nor an exploded ratio trains anything."""

    def weight(ratio, advantage):
        batch = PolicyBatch(f64([[1.0]]), f64([[1.0 - math.log(ratio)]]), f64([[advantage]]), f64([[1]]))
        return float(policy_loss(batch, POLICY_LOSSES["vespo"])[0]) / -advantage

    for advantage, mode in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        assert weight(1.0, advantage) == pytest.approx(1.0)
        assert max((0.01 * i for i in range(1, 400)), key=lambda ratio: weight(ratio, advantage)) == pytest.approx(mode, abs=0.01)
        assert weight(1e-20, advantage) < 1e-30 and weight(1e300, advantage) == 0.0


def test_the_off_policy_mask_drops_what_went_wrong_under_another_policy():
    """A completion of negative advantage is dropped once its mean drift is above the threshold; a good one never is."""
    drift = f64([[0.3, 0.1], [0.3, 0.1], [0.1, 0.1], [0.9, -0.9]])
    advantages = f64([[1], [-1], [-1], [-1]])
    batch = PolicyBatch(torch.zeros(4, 2), drift, advantages, f64([[1, 1], [1, 1], [1, 0], [1, 1]]))
    settings = replace(POLICY_LOSSES["grpo"], off_policy_threshold=0.15, epsilon_low=0.9)
    total, count, metrics = policy_loss(batch, settings)
    plain = policy_loss(batch, replace(settings, off_policy_threshold=None))
    rows = [
        policy_loss(PolicyBatch(*(t[i : i + 1] for t in (batch.log_probs_BT, drift, advantages, batch.mask_BT))), settings)[0]
        for i in range(4)
    ]
    assert rows[1] == 0 and all(float(rows[i]) != 0 for i in (0, 2, 3)) and float(total) == pytest.approx(float(sum(rows)))
    assert count == plain[1] == 4 and metrics["off_policy_dropped"] == 1.0
    by_token = replace(batch, advantages_BT=f64([[1, 1], [1, -1], [-1, -1], [-1, -1]]))
    assert policy_loss(by_token, settings)[2]["off_policy_dropped"] == 0.5  # of a dropped completion, the token that is good stays


def test_gae_is_the_weighted_sum_of_later_errors():
    rewards, values, gamma, lam = random(3, 6, seed=8), random(3, 6, seed=9), 0.9, 0.7
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam)
    for b in range(3):
        v = [*values[b].tolist(), 0.0]
        deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards[b].tolist())]
        for t in range(6):
            assert float(advantages[b, t]) == pytest.approx(sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])))
    torch.testing.assert_close(returns, advantages + values)
    monte_carlo, _ = gae(rewards, values, gamma=1.0, lam=1.0)
    torch.testing.assert_close(monte_carlo, rewards.flip(1).cumsum(1).flip(1) - values)


def test_rewards_stand_at_the_last_counted_token():
    rewards = token_rewards(torch.ones(4, 5, dtype=torch.float64), f64([1, 2, 3, 4]), MASK, kl_coef=0.5)
    assert rewards[1].tolist() == [-0.5, -0.5, 1.5, 0, 0] and rewards[0, 4] == 0.5
    shifted = token_rewards(torch.zeros(4, 5, dtype=torch.float64), f64([1, 2, 3, 4]), MASK, kl_coef=0.5, past_end=True)
    assert shifted.argmax(1).tolist() == [4, 3, 1, 4]
    with pytest.raises(ValueError, match="no place for its score"):
        token_rewards(torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2), kl_coef=0.1)


def test_whitening():
    values = random(4, 5, seed=10)
    counted = values[MASK.bool()]
    white = whiten(values, MASK, epsilon=0.0)
    torch.testing.assert_close(white[MASK.bool()], (counted - counted.mean()) / counted.std())
    assert white[MASK == 0].eq(0).all()
    kept = whiten(values, MASK, shift_mean=False, unbiased=False, epsilon=0.0)[MASK.bool()]
    torch.testing.assert_close(kept, (counted - counted.mean()) / counted.std(correction=0) + counted.mean())
    with pytest.raises(ValueError, match="1 counted values have no spread"):
        whiten(torch.ones(1))


def test_kl_estimates_agree_with_the_exact_divergence():
    policy, reference = (random(6, seed=seed).log_softmax(0) for seed in (11, 12))
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_estimate(policy, reference, kind)).sum(), exact)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    torch.testing.assert_close(kl_estimate(policy, reference, "k2"), 0.5 * (policy - reference) ** 2)
    with pytest.raises(UserError, match="none of k1, k2, k3"):
        kl_estimate(policy, reference, "k4")


def test_only_some_kl_losses_have_the_gradient_of_the_kl():
    """E_π of the loss's gradient at sampled tokens: right for k2, and for k3 times the ratio; wrong for k3 alone."""
    reference = random(6, seed=12).log_softmax(0)

    def expected_gradient(loss_of):
        logits = random(6, seed=11).requires_grad_()
        policy = logits.log_softmax(0)
        (policy.detach().exp() * loss_of(policy)).sum().backward()
        return logits.grad

    logits = random(6, seed=11).requires_grad_()
    policy = logits.log_softmax(0)
    (policy.exp() * (policy - reference)).sum().backward()
    torch.testing.assert_close(expected_gradient(lambda p: kl_estimate(p, reference, "k2")), logits.grad)
    weighted = expected_gradient(lambda p: kl_estimate(p, reference, "k3") * torch.exp(p - p.detach()))
    torch.testing.assert_close(weighted, logits.grad)
    assert not torch.allclose(expected_gradient(lambda p: kl_estimate(p, reference, "k3")), logits.grad, atol=1e-3)


def test_the_adaptive_coefficient():
    assert adapted_kl_coef(0.15, 12.0, completions=500) == pytest.approx(0.15 * (1 + 0.2 * 500 / 10_000))
    assert adapted_kl_coef(0.15, 5.4, completions=500) == pytest.approx(0.15 * (1 - 0.1 * 500 / 10_000))


REWARDS = f64([[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [2, -1, 3, 0]])


def test_group_advantages():
    advantages = group_advantages(REWARDS)
    for row, result in zip(REWARDS, advantages):
        torch.testing.assert_close(result, (row - row.mean()) / (row.std() + 1e-4))
    centered = REWARDS - REWARDS.mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(REWARDS, scale="none"), centered)
    torch.testing.assert_close(group_advantages(REWARDS, scale="batch"), centered / (REWARDS.std() + 1e-4))
    torch.testing.assert_close(group_advantages(REWARDS, unbiased=False)[2], centered[2] / (REWARDS[2].std(correction=0) + 1e-4))
    with pytest.raises(UserError, match="none of group, batch, none"):
        group_advantages(REWARDS, scale="std")


def test_a_completion_without_a_score_counts_nowhere():
    some = group_advantages(f64([[1, 0, math.nan, 1], [math.nan] * 4]))
    torch.testing.assert_close(some[0, [0, 1, 3]], group_advantages(f64([[1, 0, 1]]))[0])
    assert some[0, 2] == 0 and some[1].eq(0).all()
    assert informative_groups(torch.cat([REWARDS, f64([[1, math.nan, 1, 1], [math.nan] * 4])])).tolist() == [
        True,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("kind", ["leave_one_out", "global", "global_baseline", "separate"])
def test_a_completion_without_a_score_counts_in_no_other_baseline_either(kind):
    """Those with a score have what they would have without it, it has 0; so has one whose group has no other, unless all are compared."""
    advantages = {
        "leave_one_out": leave_one_out_advantages,
        "global": global_advantages,
        "global_baseline": lambda rewards: global_advantages(rewards, group_baseline=True),
        "separate": lambda rewards: separate_reward_advantages(torch.stack([rewards, 1 - rewards**2]), f64([1, 0.5])),
    }[kind]
    plain = f64([[1, 0, 3, 0], [2, 0, 1, 1]])
    wide = torch.cat([plain[:, :2], f64([[math.nan], [math.nan]]), plain[:, 2:]], 1)
    found = advantages(wide)
    torch.testing.assert_close(found[:, [0, 1, 3, 4]], advantages(plain))
    assert not found[:, 2].any()
    lonely = advantages(f64([[1, 0], [5, math.nan], [math.nan, math.nan]]))
    assert torch.isfinite(lonely).all() and lonely[1:].flatten()[1:].eq(0).all() and (lonely[1, 0] == 0) == (kind != "global")
    assert not advantages(torch.full((2, 2), math.nan, dtype=torch.float64)).any()


def test_other_baselines():
    loo = leave_one_out_advantages(REWARDS)
    for p, row in enumerate(REWARDS.tolist()):
        for g, reward in enumerate(row):
            assert float(loo[p, g]) == pytest.approx(reward - (sum(row) - reward) / 3)
    with pytest.raises(ValueError, match="group_size=1"):
        leave_one_out_advantages(REWARDS[:, :1])
    assert greedy_baseline_advantages(REWARDS, f64([1, 0, 2]))[2].tolist() == [0, -3, 1, -2]
    torch.testing.assert_close(global_advantages(REWARDS), whiten(REWARDS))
    assert global_advantages(REWARDS, group_baseline=True)[1].eq(0).all()
    twice = separate_reward_advantages(torch.stack([REWARDS, 5 * REWARDS]), f64([1, 1]), epsilon=1e-12)
    torch.testing.assert_close(twice, separate_reward_advantages(REWARDS[None], f64([1]), epsilon=1e-12))
