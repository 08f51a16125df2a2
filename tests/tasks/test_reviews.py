"""The world of reviews: rewards by hand, a distribution that enumeration and sampling agree with, and the best that can be had."""

import json
import math
import random
from collections import Counter

import pytest

from plinth.config import UserError
from plinth.posttraining.formats import read_examples
from plinth.tasks.reviews import (
    NUM_SENTENCES,
    OPTIMUM,
    PHRASINGS,
    POINT_SHARES,
    POINTS_OF,
    THINGS,
    ReviewsConfig,
    best_mean,
    best_of_n_mean,
    conversations,
    draw_review,
    label_pair,
    preferences,
    prompts,
    reward,
    reward_distribution,
    stories,
    write_reviews,
)

PROMPT = "Review the lamp."


@pytest.mark.parametrize(
    ("completion", "points"),
    [
        ("", 0),
        ("The lamp is lovely.", 2),
        ("The lamp is lovely. It looks dusty.", 1),
        ("It is lovely.", -1),  # nothing was named yet
        ("The chair is lovely. It is superb.", -2),  # another thing
        ("The chair is lovely. The lamp is superb. It is neat.", 2),
        ("The lamp is lovely. It is lovely. It is lovely.", 0),  # praise repeated
        ("The lamp is lovely. It is superb. It is perfect. It is splendid.", 8),
        ("The lamp is lovely. It is superb. It is perfect. It is splendid. It is wonderful.", 7),  # too long
        ("The lamp is lovely. It is", 1),  # cut off
        ("The lamp is very lovely.", -1),
        ("What a lamp!", -1),
        ("The lamp is shiny.", -1),
        ("The lamp is awful. It is hideous. It is rotten. It is broken. It is useless. It is broken.", -8),  # not below the least
    ],
)
def test_rewards_by_hand(completion, points):
    assert reward(PROMPT, completion) == points / 8


def test_a_prompt_must_name_one_thing():
    for prompt in ("Review the moon.", "Is the lamp on the table?"):
        with pytest.raises(UserError, match="a review is of one"):
            reward(prompt, "The lamp is lovely.")


def test_splits_share_things_and_phrasings_but_no_prompt():
    train, heldout = prompts("train"), prompts("heldout")
    assert len(train) + len(heldout) == len(set(train) | set(heldout)) == len(THINGS) * len(PHRASINGS)
    for prompt_list in (train, heldout):
        assert all(any(thing in prompt for prompt in prompt_list) for thing in THINGS)
    with pytest.raises(UserError, match="neither train nor heldout"):
        prompts("test")


def test_the_distribution_is_that_of_the_grammar():
    known = reward_distribution()
    assert math.isclose(math.fsum(known.values()), 1) and max(known) == OPTIMUM
    best = NUM_SENTENCES[4] * POINT_SHARES[2] ** 4
    assert math.isclose(known[OPTIMUM], best)
    rng = random.Random(0)
    drawn = Counter(reward(PROMPT, draw_review(PROMPT, rng)) for _ in range(4000))
    assert set(drawn) <= set(known)
    for value, p in known.items():
        assert abs(drawn[value] / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000) + 1e-3


def test_the_best_policy_at_a_distance_against_brute_force():
    known = reward_distribution()
    kl, mean = best_mean(0.2)
    weights = [p * math.exp(value / 0.2) for value, p in known.items()]
    tilted = [weight / sum(weights) for weight in weights]
    assert math.isclose(mean, sum(q * value for q, value in zip(tilted, known)))
    assert math.isclose(kl, sum(q * math.log(q / p) for q, p in zip(tilted, known.values())))
    near, far = best_mean(100.0), best_mean(0.005)
    assert near[0] < 1e-4 and far[1] > 0.999 and math.isclose(far[0], -math.log(known[OPTIMUM]), rel_tol=1e-3)
    with pytest.raises(UserError, match="beta=0"):
        best_mean(0)


def test_best_of_n_against_simulation():
    values, shares = zip(*reward_distribution().items())
    assert math.isclose(best_of_n_mean(1), sum(v * p for v, p in zip(values, shares)))
    rng = random.Random(1)
    found = [max(rng.choices(values, shares, k=8)) for _ in range(3000)]
    assert abs(sum(found) / 3000 - best_of_n_mean(8)) < 0.02


def test_pairs_follow_the_gold_reward_and_noise_turns_that_share():
    rows = preferences(300, seed=3)
    assert all(reward(row["prompt"], row["chosen"]) > reward(row["prompt"], row["rejected"]) for row in rows)
    noisy = preferences(1000, seed=3, noise=0.2)
    wrong = sum(reward(row["prompt"], row["chosen"]) < reward(row["prompt"], row["rejected"]) for row in noisy)
    assert 150 < wrong < 250
    assert label_pair(PROMPT, "The lamp is neat.", "The lamp is tidy.", random.Random(0)) is None
    with pytest.raises(UserError, match="noise=0.5"):
        preferences(1, noise=0.5)


def test_the_grammar_never_repeats_an_adjective():
    for row in conversations(200, seed=5):
        words = [word for word in row["messages"][1]["content"].replace(".", "").split() if word in POINTS_OF]
        assert len(words) == len(set(words)) >= 1


def test_files_are_read_as_what_they_are_and_equal_seeds_give_equal_bytes(tmp_path):
    config = ReviewsConfig(20, 5, 20, 20, 10, 0.1, seed=2)
    manifest = write_reviews(tmp_path / "a", config)
    assert write_reviews(tmp_path / "b", config)["sha256"] == manifest["sha256"]
    for name, kind in (("sft", "messages"), ("pairs", "preference"), ("pairs_heldout", "preference"), ("stories", "text")):
        found = read_examples(tmp_path / "a" / f"{name}.jsonl", kind)
        assert len(found.rows) == manifest["rows"][name] and not found.rejected
    assert json.loads((tmp_path / "a" / "prompts.jsonl").read_text().splitlines()[0])["prompt"] in prompts("train")
    assert not set(stories(20, 2)) & set(stories(5, -3))
