"""Losses of pairs and of single answers against scalar loops, their gradients, their limits and their error texts."""

import inspect
import math

import pytest
import torch

from plinth.config import UserError
from plinth.posttraining.pair_scores import Pairs, divergence_score, shared_length_log_probs, wpo_weights
from plinth.posttraining.preference_config import PAIR_OPTIONS, REFERENCE_FREE, SINGLE_OPTIONS, SORTING
from plinth.posttraining.preference_losses import PREFERENCE_LOSSES, mixed_loss, preference_loss
from plinth.posttraining.reward_losses import bradley_terry_loss, ranking_loss
from plinth.posttraining.unpaired_losses import UNPAIRED_LOSSES, bco, kto, kto_reference_point


def logsig(x):
    return -math.log1p(math.exp(-x))


def sig(x):
    return 1 / (1 + math.exp(-x))


def log_odds(mean):
    return mean - math.log(1 - math.exp(mean))


# name → the loss of one pair from c, r (policy), their ratios a, b to the reference, and the lengths m, n; all at the default options
SCALAR = {
    "sigmoid": lambda c, r, a, b, m, n: -logsig(0.1 * (a - b)),
    "cdpo": lambda c, r, a, b, m, n: -0.9 * logsig(0.1 * (a - b)) - 0.1 * logsig(-0.1 * (a - b)),
    "robust": lambda c, r, a, b, m, n: (-0.9 * logsig(0.1 * (a - b)) + 0.1 * logsig(-0.1 * (a - b))) / 0.8,
    "hinge": lambda c, r, a, b, m, n: max(0.0, 1 - 0.1 * (a - b)),
    "ipo": lambda c, r, a, b, m, n: (a / m - b / n - 5) ** 2,
    "sigmoid_norm": lambda c, r, a, b, m, n: -logsig(5 * (a / m - b / n)),
    "exo_pair": lambda c, r, a, b, m, n: sum(
        sig(s * 0.1 * (a - b)) * (logsig(s * 0.1 * (a - b)) - math.log(q)) for s, q in ((1, 0.999), (-1, 0.001))
    ),
    "nca_pair": lambda c, r, a, b, m, n: -logsig(0.1 * a) - 0.5 * logsig(-0.1 * a) - 0.5 * logsig(-0.1 * b),
    "bco_pair": lambda c, r, a, b, m, n: -logsig(0.1 * a) - logsig(-0.1 * b),
    "sppo_hard": lambda c, r, a, b, m, n: (a - 5) ** 2 + (b + 5) ** 2,
    "apo_zero": lambda c, r, a, b, m, n: sig(-0.1 * a) + sig(0.1 * b),
    "apo_down": lambda c, r, a, b, m, n: sig(0.1 * a) + sig(-0.1 * (a - b)),
    "discopop": lambda c, r, a, b, m, n: -logsig(0.1 * (a - b)) * sig(-2 * (a - b)) + math.exp(-0.1 * (a - b)) * sig(2 * (a - b)),
    "ropo": lambda c, r, a, b, m, n: (-logsig(0.1 * (a - b)) + 14 * sig(-0.1 * (a - b))) * 56 / 225,
    "sft": lambda c, r, a, b, m, n: -c / m,
    "odds_ratio": lambda c, r, a, b, m, n: -0.1 * logsig(log_odds(c / m) - log_odds(r / n)),
    "orpo": lambda c, r, a, b, m, n: -c / m - 0.1 * logsig(log_odds(c / m) - log_odds(r / n)),
    "simpo": lambda c, r, a, b, m, n: -logsig(2 * (c / m - r / n) - 1),
    "cpo": lambda c, r, a, b, m, n: -logsig(0.1 * (c - r)) - c / m,
}


def sums(seed=0, size=6):
    """c, r and both references' log-probabilities, and the two lengths."""
    generator = torch.Generator().manual_seed(seed)
    values = [-12 * torch.rand(size, generator=generator, dtype=torch.float64) - 0.5 for _ in range(4)]
    return values, [torch.randint(2, 9, (size,), generator=generator) for _ in range(2)]


def loss_rows(name, values, lengths):
    return PREFERENCE_LOSSES[name](Pairs(*values, *lengths))


@pytest.mark.parametrize("name", SCALAR)
def test_a_loss_equals_a_scalar_loop(name):
    values, lengths = sums()
    columns = [column.tolist() for column in (*values, *lengths)]
    expected = [SCALAR[name](c, r, c - p, r - q, m, n) for c, r, p, q, m, n in zip(*columns)]
    torch.testing.assert_close(loss_rows(name, values, lengths), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_every_loss_has_a_loop():
    assert set(SCALAR) | {"aot", "aot_unpaired"} == set(PREFERENCE_LOSSES)


def test_aot_sorts_before_it_compares():
    (c, r, p, q), lengths = sums()
    paired = zip(sorted((c - r).tolist()), sorted((p - q).tolist()))
    unpaired = zip(sorted((c - p).tolist()), sorted((r - q).tolist()))
    for name, couples in (("aot", paired), ("aot_unpaired", unpaired)):
        expected = torch.tensor([-logsig(0.1 * (x - y)) for x, y in couples], dtype=torch.float64)
        torch.testing.assert_close(loss_rows(name, (c, r, p, q), lengths), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_gradients_equal_finite_differences(name):
    values, lengths = sums(1, 3)
    policy = [value.requires_grad_() for value in values[:2]]
    assert torch.autograd.gradcheck(lambda c, r: loss_rows(name, (c, r, *values[2:]), lengths), policy)


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"aot", "aot_unpaired"}))
def test_a_split_of_the_batch_changes_neither_sum_nor_count(name):
    values, lengths = sums(2)
    parts = [preference_loss(name, Pairs(*(x[part] for x in (*values, *lengths)))) for part in (slice(0, 1), slice(1, 6))]
    total, count, metrics = preference_loss(name, Pairs(*values, *lengths))
    assert float(total) == pytest.approx(sum(float(part[0]) for part in parts), rel=1e-12)
    assert count == sum(part[1] for part in parts)
    assert metrics == pytest.approx({key: parts[0][2][key] + parts[1][2][key] for key in metrics})


def test_losses_without_a_reference_need_none_and_the_others_say_so():
    (c, r, *_), lengths = sums()
    for name in PREFERENCE_LOSSES:
        pairs = Pairs(c, r, chosen_tokens_B=lengths[0], rejected_tokens_B=lengths[1])
        if name in REFERENCE_FREE:
            preference_loss(name, pairs)
        else:
            with pytest.raises(ValueError, match="reference_chosen_B is None"):
                preference_loss(name, pairs)


def test_limits():
    values, lengths = sums()
    pairs = Pairs(*values, *lengths)
    plain = preference_loss("sigmoid", pairs)[0]
    assert torch.equal(preference_loss("cdpo", pairs, epsilon=0.0)[0], plain)
    assert torch.equal(preference_loss("robust", pairs, epsilon=0.0)[0], plain)
    near = preference_loss("sigmoid", pairs, divergence="alpha", divergence_alpha=1 - 1e-7)[0]
    assert float(near) == pytest.approx(float(plain), rel=1e-5)
    sums_ipo = preference_loss("ipo", pairs, per_token=False)[0]
    assert float(sums_ipo) == pytest.approx(float(((pairs.difference_B - 5) ** 2).sum()))


def test_the_table_of_options_is_what_the_losses_read():
    tie = {"divergence", "divergence_alpha", "length_penalty"}
    for table, losses in ((PAIR_OPTIONS, PREFERENCE_LOSSES), (SINGLE_OPTIONS, UNPAIRED_LOSSES)):
        for name, function in losses.items():
            read = {key for key, argument in inspect.signature(function).parameters.items() if argument.kind is argument.KEYWORD_ONLY}
            assert set(table[name]) - tie == read - {"tokens_per_pair"}, name
        assert list(table) == list(losses)


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - REFERENCE_FREE - SORTING))
def test_another_divergence_is_offered_where_the_difference_alone_counts(name):
    """The partition function of a prompt adds one number to both scores: where that changes the loss, f-DPO has no meaning."""
    (c, r, p, q), _ = sums()
    lengths = [torch.full((6,), 3), torch.full((6,), 3)]
    shifted = loss_rows(name, (c, r, p - 0.7, q - 0.7), lengths)
    invariant = torch.allclose(shifted, loss_rows(name, (c, r, p, q), lengths), rtol=1e-9)
    assert invariant == ("divergence" in PAIR_OPTIONS[name])


@pytest.mark.parametrize("name", [name for name, options in PAIR_OPTIONS.items() if "length_penalty" in options])
def test_a_length_penalty_shifts_the_margin_by_the_difference_of_lengths(name):
    """R-DPO's βΔ + α(|chosen| − |rejected|), with any β, and beside another divergence."""
    values, lengths = sums()
    c, r, p, q = values
    moved = 0.07 * (lengths[0] - lengths[1]).double()  # of βΔ, so that of c it is as much over β
    for beta in (0.1, 0.7):
        options = {"beta": beta, "length_penalty": 0.07}
        expected = preference_loss(name, Pairs(c + moved / beta, r, p, q, *lengths), beta=beta)[0]
        torch.testing.assert_close(preference_loss(name, Pairs(*values, *lengths), **options)[0], expected, rtol=1e-11, atol=1e-11)
    columns = [column.tolist() for column in (*values, *lengths)]
    plain = [-logsig(0.1 * (c - p - r + q) + 0.07 * (m - n)) for c, r, p, q, m, n in zip(*columns)]
    found = preference_loss("sigmoid", Pairs(*values, *lengths), length_penalty=0.07)[0]
    assert float(found) == pytest.approx(sum(plain), abs=1e-9)
    scores = [divergence_score(ratio, "js") for ratio in (c - p, r - q)]
    both = preference_loss(name, Pairs(*values, *lengths), divergence="js", length_penalty=0.07)[0]
    zeros = torch.zeros_like(c)
    torch.testing.assert_close(
        both, preference_loss(name, Pairs(scores[0] + moved / 0.1, scores[1], zeros, zeros))[0], rtol=1e-11, atol=1e-11
    )


def test_ropo_gives_most_weight_to_the_undecided_and_none_more_than_one():
    for noise_weight in (1.0, 6.0, 14.0):
        margin = torch.linspace(-60, 60, 2001, dtype=torch.float64).div(0.1).requires_grad_()
        zero = torch.zeros(2001, dtype=torch.float64)
        loss = PREFERENCE_LOSSES["ropo"](Pairs(margin, zero, zero, zero), noise_weight=noise_weight)
        slope = -torch.autograd.grad(loss.sum(), margin)[0] / 0.1
        share = torch.sigmoid(-0.1 * margin.detach())
        closed = 4 * noise_weight / (1 + noise_weight) ** 2 * share * (1 + noise_weight * (1 - share))
        torch.testing.assert_close(slope, closed, rtol=1e-9, atol=1e-9)
        assert 0.99 < float(slope.max()) <= 1 + 1e-9
    assert float(slope[0]) == pytest.approx(4 * 14 / 15**2)  # what the policy holds to be the wrong way round


def test_a_divergence_survives_an_answer_that_has_all_but_vanished():
    values = [torch.tensor([x], requires_grad=i < 2) for i, x in enumerate((-1.0, -4000.0, -1.0, -2.0))]
    for name in ("forward_kl", "js", "alpha"):
        total = preference_loss("hinge", Pairs(*values), divergence=name)[0]
        grads = torch.autograd.grad(total, values[:2])
        assert torch.isfinite(total) and all(torch.isfinite(grad).all() for grad in grads), name


def test_scores_of_divergences_are_derivatives():
    """f′(u) up to a constant, by finite differences of f, u the ratio of probabilities."""
    ratio = torch.tensor([-1.3, -0.2, 0.4, 2.0], dtype=torch.float64)
    generators = {
        "reverse_kl": lambda u: u * u.log(),
        "forward_kl": lambda u: -u.log(),
        "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha": lambda u: (u**0.5 - 1) / (0.5 * -0.5),  # α = 0.5
    }
    for name, f in generators.items():
        u, step = ratio.exp(), 1e-6
        slope = (f(u + step) - f(u - step)) / (2 * step)
        score = divergence_score(ratio, name)
        torch.testing.assert_close(score - score[0], slope - slope[0], rtol=1e-6, atol=1e-7)


def test_odds_survive_both_ends():
    one = torch.ones(2, dtype=torch.float64)
    chosen = torch.tensor([-1e-12, -800.0], dtype=torch.float64, requires_grad=True)
    pairs = Pairs(chosen, torch.tensor([-800.0, -1e-12], dtype=torch.float64), chosen_tokens_B=one, rejected_tokens_B=one)
    loss = PREFERENCE_LOSSES["orpo"](pairs)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "sigmoid",
            {"epsilon": 0.1},
            "epsilon=0.1 is not read by the loss sigmoid, which takes beta, divergence, divergence_alpha, length_penalty",
        ),
        ("dpo", {}, "loss='dpo' is not one of sigmoid, cdpo"),
        ("cdpo", {"epsilon": 0.5}, r"epsilon=0.5 is not in \[0, 0.5\)"),
        ("exo_pair", {"epsilon": 0.0}, "the loss is infinite at 0"),
        ("sigmoid", {"divergence": "kl"}, "none of reverse_kl"),
        ("sigmoid", {"divergence": "alpha", "divergence_alpha": 1}, "divides by zero"),
    ],
)
def test_options_are_never_ignored(name, options, text):
    """As TRL does with label_smoothing under the sigmoid loss."""
    values, lengths = sums()
    with pytest.raises(UserError, match=text):
        preference_loss(name, Pairs(*values, *lengths), **options)


def test_pairs_are_checked():
    values, _ = sums()
    with pytest.raises(ValueError, match="shapes differ"):
        Pairs(values[0], values[1][:2])
    with pytest.raises(ValueError, match="without counted tokens"):
        Pairs(values[0], values[1], chosen_tokens_B=torch.zeros(6), rejected_tokens_B=torch.ones(6)).per_token()
    with pytest.raises(UserError, match="parts is empty"):
        mixed_loss(Pairs(*values), {})


def test_shared_length_counts_only_counted_tokens():
    log_probs = torch.tensor([[-9.0, -1.0, -9.0, -2.0, -4.0]])
    mask = torch.tensor([[0, 1, 0, 1, 1]])
    assert shared_length_log_probs(log_probs, mask, torch.tensor([2]), 0.5).tolist() == [-5.0]
    assert shared_length_log_probs(log_probs, mask, torch.tensor([2]), 1.0).tolist() == [-7.0]


def test_wpo_weights_are_detached_and_at_most_one():
    values = torch.tensor([[0.5, 0.5], [-1.0, -2.0]], requires_grad=True)
    weights = wpo_weights(values, torch.ones(2, 2), values, torch.ones(2, 2))
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-3)]))
    assert not weights.requires_grad


def test_kto_bco_and_their_reference_point():
    generator = torch.Generator().manual_seed(3)
    ratio = torch.randn(5, generator=generator, dtype=torch.float64)
    good = torch.tensor([1, 0, 0, 1, 1])
    loop = [1.5 * (1 - sig(0.1 * (x - 0.3))) if g else 0.7 * (1 - sig(0.1 * (0.3 - x))) for x, g in zip(ratio.tolist(), good)]
    loss = kto(ratio, good, reference_point=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    torch.testing.assert_close(loss, torch.tensor(loop, dtype=torch.float64))
    loop = [-logsig(0.1 * x - 0.2) if g else -logsig(0.2 - 0.1 * x) for x, g in zip(ratio.tolist(), good)]
    torch.testing.assert_close(bco(ratio, good, shift=0.2), torch.tensor(loop, dtype=torch.float64))
    for name, options in (("kto", {"reference_point": 0.3}), ("apo_zero_unpaired", {}), ("bco", {})):
        inputs = ratio.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, name=name, options=options: UNPAIRED_LOSSES[name](x, good, **options), [inputs])
    point = kto_reference_point(torch.tensor([1.0, -3.0], requires_grad=True), torch.zeros(2))
    assert point.item() == 0 and not point.requires_grad


def test_rankings_count_every_pair_of_a_prompt_once():
    scores = torch.tensor([[2.0, 1.0, -1.0], [0.5, 0.5, 9.0], [1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[0, 1, 2], [1, 0, -1], [0, 0, 0]])  # three pairs, one pair, none
    total, count, metrics = ranking_loss(scores, ranks)
    expected = -(logsig(1.0) + logsig(3.0) + logsig(2.0)) / 3 - logsig(0.0)
    assert count == 2 and float(total.detach()) == pytest.approx(expected, rel=1e-12)
    assert metrics == {"accuracy": 1.0, "margin": 2.0, "mean_score": pytest.approx(2 / 3 + 0.5)}
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, ranks)[0], [scores])
    with pytest.raises(ValueError, match="they must agree"):
        ranking_loss(scores, ranks[:1])


def test_a_ranking_of_two_is_bradley_terry():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    ranked = ranking_loss(torch.stack([rejected, chosen], 1), torch.tensor([[1, 0], [1, 0]]))
    plain = bradley_terry_loss(chosen, rejected)
    assert float(ranked[0]) == pytest.approx(float(plain[0])) and ranked[1] == plain[1] and ranked[2]["accuracy"] == 1.0
