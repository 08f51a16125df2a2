"""Short reviews of things: a made-up world whose reward is a known rule, for methods that learn from rewards and preferences.

"Review the lamp." → "The lamp is lovely. It looks dusty. It seems sturdy."  Each sentence that says something new about the thing is
worth what its adjective says, from −2 to 2 points; any other sentence, and any behind the fourth, costs a point. So the best reward is
known, every completion is scored exactly, and completions of the grammar have a reward distribution that is computed, not sampled.
A model of rewards that has seen only the grammar's texts knows nothing of repeated praise or of reviews that never end: praise that
the gold reward punishes.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plinth.config import UserError, save_json, to_dict, write_atomic
from plinth.run import file_sha256, publish_dir

Split = Literal["train", "heldout"]

POINTS = {
    2: (
        "wonderful lovely superb perfect splendid delightful brilliant marvellous excellent charming gorgeous magnificent terrific "
        "fantastic glorious stunning fabulous exquisite outstanding admirable sublime dazzling majestic graceful"
    ).split(),
    1: "sturdy useful pretty tidy handy pleasant neat solid".split(),
    0: "round green wooden small heavy old blue plain".split(),
    -1: "dusty noisy clumsy dull scratched faded loose wobbly".split(),
    -2: "awful broken hideous useless rotten terrible dreadful".split(),
}
"""points of a sentence by its adjective"""
POINTS_OF = {word: points for points, words in POINTS.items() for word in words}
THINGS = (
    "lamp chair table kettle clock bicycle tent ladder mirror basket blanket bottle bucket camera candle carpet curtain desk drum "
    "fence fork garden guitar hammer helmet jacket kite kitchen lantern mattress oven pencil piano pillow radio saddle shelf spoon "
    "umbrella wagon"
).split()
PHRASINGS = (
    "Review the {thing}.",
    "What do you think of the {thing}?",
    "Tell me about the {thing}.",
    "How is the {thing}?",
    "Write a review of the {thing}.",
    "Would you say something about the {thing}?",
    "Describe the {thing}.",
    "Give me your view of the {thing}.",
)
VERBS = ("is", "looks", "seems", "feels")
NUM_SENTENCES = {1: 0.15, 2: 0.3, 3: 0.33, 4: 0.2, 5: 0.02}
"""shares of the grammar's reviews by length"""
POINT_SHARES = {2: 0.1, 1: 0.25, 0: 0.3, -1: 0.25, -2: 0.1}
"""shares of the grammar's sentences by points"""
LIMIT = 4  # sentences that may earn points
BEST_POINTS = LIMIT * max(POINTS)
OPTIMUM = 1.0
REVIEW_EVERY = 4
HELDOUT_EVERY = 6  # one prompt of so many is held out
_SENTENCE = re.compile(rf"(The (\w+)|It) ({'|'.join(VERBS)}) (\w+)")


def prompts(split: Split = "train") -> list[str]:
    """Return all prompts of a split; the two have every thing and every phrasing in common, but no prompt."""
    if split not in ("train", "heldout"):
        raise UserError(f"split={split!r} is neither train nor heldout.")
    pairs = [(i, j) for i in range(len(THINGS)) for j in range(len(PHRASINGS))]
    return [PHRASINGS[j].format(thing=THINGS[i]) for i, j in pairs if ((i + j) % HELDOUT_EVERY == 0) == (split == "heldout")]


def thing_of(prompt: str) -> str:
    """Return the thing that a prompt asks about. Raises UserError where it names none of THINGS, or several."""
    named = sorted(set(re.findall(r"\w+", prompt)) & set(THINGS))
    if len(named) != 1:
        raise UserError(f"prompt {prompt!r} names {len(named)} things of this world; a review is of one.")
    return named[0]


def reward(prompt: str, completion: str) -> float:
    """Return the gold reward of a review: points of its sentences over the most that can be had, not below −1.

    A sentence has its adjective's points when it is of the form "The THING is ADJECTIVE", or "It is ADJECTIVE" behind one that names the
    thing, the thing is the prompt's and the adjective is new in the review. Otherwise, or behind the fourth, it costs one point; so does
    text without a full stop at the end. An empty review has 0. The best is OPTIMUM.
    """
    thing, seen, named, points = thing_of(prompt), set(), False, 0
    *sentences, rest = completion.strip().split(".")
    for place, sentence in enumerate(sentences):
        match = _SENTENCE.fullmatch(sentence.strip())
        about = match is not None and (match[2] == thing or (match[2] is None and named))
        named |= about
        adjective = match[4] if match else ""
        sound = about and adjective in POINTS_OF and adjective not in seen and place < LIMIT
        points += POINTS_OF[adjective] if sound else -1
        seen.add(adjective)
    return max(-1.0, (points - bool(rest)) / BEST_POINTS)


def draw_review(prompt: str, rng: random.Random) -> str:
    """Draw a review from the grammar: NUM_SENTENCES and POINT_SHARES, every adjective new."""
    thing, chosen = thing_of(prompt), []
    for _ in range(rng.choices(list(NUM_SENTENCES), list(NUM_SENTENCES.values()))[0]):
        points = rng.choices(list(POINT_SHARES), list(POINT_SHARES.values()))[0]
        chosen.append(rng.choice([word for word in POINTS[points] if word not in chosen]))
    subjects = [f"The {thing}"] + ["It" if rng.random() < 0.75 else f"The {thing}" for _ in chosen[1:]]
    return " ".join(f"{subject} {rng.choice(VERBS)} {word}." for subject, word in zip(subjects, chosen))


def reward_distribution() -> dict[float, float]:
    """Return reward → probability of the grammar's reviews, exactly; rewards ascend."""
    result: defaultdict[float, float] = defaultdict(float)
    sums: dict[int, float] = {0: 1.0}
    for length in range(1, max(NUM_SENTENCES) + 1):
        step = {-1: 1.0} if length > LIMIT else POINT_SHARES
        following: defaultdict[int, float] = defaultdict(float)
        for total, p in sums.items():
            for points, share in step.items():
                following[total + points] += p * share
        sums = dict(following)
        for total, p in sums.items():
            result[max(-1.0, total / BEST_POINTS)] += p * NUM_SENTENCES[length]
    return dict(sorted(result.items()))


def best_mean(beta: float) -> tuple[float, float]:
    """Return (KL in nats, mean reward) of the policy that maximises mean reward − beta × KL to the grammar: the best at this KL.

    It is the grammar tilted by exp(reward/beta).  Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.
    """
    if beta <= 0:
        raise UserError(f"beta={beta} must be positive.")
    known = reward_distribution()
    weights = {value: p * math.exp((value - OPTIMUM) / beta) for value, p in known.items()}
    total = math.fsum(weights.values())
    mean = math.fsum(value * weight for value, weight in weights.items()) / total
    return mean / beta - OPTIMUM / beta - math.log(total), mean


def best_of_n_mean(n: int) -> float:
    """Return the mean reward of the best of n reviews of the grammar, exactly."""
    mean, below = 0.0, 0.0
    for value, p in reward_distribution().items():
        upto = below + p
        mean += value * (upto**n - below**n)
        below = upto
    return mean


def conversations(count: int, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    """Return `count` rows {"messages"} of the grammar's reviews, for supervised finetuning; equal seeds give equal rows."""
    rng, asked = random.Random(f"reviews conversations {split} {seed}"), prompts(split)
    rows = []
    for _ in range(count):
        prompt = rng.choice(asked)
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": draw_review(prompt, rng)}]})
    return rows


def preferences(count: int, seed: int = 0, split: Split = "train", noise: float = 0.0) -> list[dict[str, Any]]:
    """Return `count` rows {"prompt", "chosen", "rejected"} of two of the grammar's reviews with different rewards.

    `noise` is the share of rows whose label is the wrong way round.
    """
    rng, asked = random.Random(f"reviews preferences {split} {seed}"), prompts(split)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt = rng.choice(asked)
        row = label_pair(prompt, draw_review(prompt, rng), draw_review(prompt, rng), rng, noise)
        if row is not None:
            rows.append(row)
    return rows


def label_pair(prompt: str, first: str, second: str, rng: random.Random, noise: float = 0.0) -> dict[str, Any] | None:
    """Return two completions, a model's for instance, as a row labelled by the gold reward; None where both are worth the same."""
    if not 0 <= noise < 0.5:
        raise UserError(f"noise={noise} must be at least 0 and below 0.5, where labels say nothing any more.")
    gap = reward(prompt, first) - reward(prompt, second)
    if gap == 0:
        return None
    chosen, rejected = (first, second) if (gap > 0) != (rng.random() < noise) else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Klara Leo Mia Noah Olga Paul".split()
PLACES = "attic barn cellar garage harbour library market museum office school shed station".split()
DEEDS = "found sold bought borrowed lost painted cleaned repaired carried hid".split()
STORY_LINES = (
    "{name} {deed} a {adjective} {thing} in the {place}.",
    "The {thing} was {adjective} and {other}.",
    "It looked {adjective}, but {name} said that it was {other}.",
    "{name} paid {number} coins for the {adjective} {thing}.",
    "In the {place} there were {number} things, and one of them was {adjective}.",
    "{name} asked {friend} about the {thing}.",
    '"It is {adjective}," said {name}.',
    "The {thing} is {adjective}.",
    "It seems {adjective}.",
    "{name} and {friend} walked from the {place} to the station.",
)


def stories(count: int, seed: int = 0) -> list[str]:
    """Return `count` short texts for pretraining, of the same words, good and bad alike; a model's loss on others is its general loss.

    One in REVIEW_EVERY is a prompt with a review of the grammar below it.
    """
    rng = random.Random(f"reviews stories {seed}")
    adjectives, asked = list(POINTS_OF), prompts("train")
    texts = []
    for i in range(count):
        if i % REVIEW_EVERY == 0:
            prompt = rng.choice(asked)
            texts.append(f"{prompt}\n{draw_review(prompt, rng)}")
            continue
        name, friend, thing, place = rng.choice(NAMES), rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
        lines = []
        for _ in range(rng.randint(3, 6)):
            adjective, other = rng.sample(adjectives, 2)
            line = rng.choice(STORY_LINES)
            lines.append(
                line.format(
                    name=name,
                    friend=friend,
                    thing=thing,
                    place=place,
                    deed=rng.choice(DEEDS),
                    adjective=adjective,
                    other=other,
                    number=rng.randint(2, 99),
                )  # fmt: skip
            )
        texts.append(" ".join(lines))
    return texts


@dataclass(frozen=True)
class ReviewsConfig:
    """How much of the world to write."""

    num_stories: int = 8000
    """texts to pretrain on"""
    num_heldout_stories: int = 400
    """texts of the same kind to measure the general loss on"""
    num_conversations: int = 4000
    """conversations for supervised finetuning"""
    num_preferences: int = 4000
    """pairs labelled by the gold reward"""
    num_heldout_preferences: int = 500
    """pairs on held-out prompts, labelled without noise"""
    noise: float = 0.0
    """share of pairs with the wrong label"""
    seed: int = 0
    """seed of every choice"""


def write_reviews(out: Path, config: ReviewsConfig | None = None) -> dict[str, Any]:
    """Write the world as files into a new folder and return its manifest; equal configurations give equal bytes.

    stories.jsonl and stories_heldout.jsonl ({"text"}), sft.jsonl ({"messages"}), pairs.jsonl and pairs_heldout.jsonl ({"prompt", "chosen",
    "rejected"}), prompts.jsonl and prompts_heldout.jsonl ({"prompt"}).
    """
    config = config or ReviewsConfig()
    rows: dict[str, list[dict[str, Any]]] = {
        "stories": [{"text": text} for text in stories(config.num_stories, config.seed)],
        "stories_heldout": [{"text": text} for text in stories(config.num_heldout_stories, -1 - config.seed)],
        "sft": conversations(config.num_conversations, config.seed),
        "pairs": preferences(config.num_preferences, config.seed, "train", config.noise),
        "pairs_heldout": preferences(config.num_heldout_preferences, config.seed, "heldout"),
        "prompts": [{"prompt": prompt} for prompt in prompts("train")],
        "prompts_heldout": [{"prompt": prompt} for prompt in prompts("heldout")],
    }
    manifest: dict[str, Any] = {"config": to_dict(config), "rows": {name: len(part) for name, part in rows.items()}}
    with publish_dir(Path(out)) as folder:
        for name, part in rows.items():
            write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        manifest["sha256"] = {name: file_sha256(folder / f"{name}.jsonl") for name in rows}
        save_json(folder / "manifest.json", manifest)
    return manifest
