"""Batches of parallel text are a function of (seed, step), and show each pair once an epoch."""

import torch

from plinth.data.parallel import ParallelText
from plinth.recipes.parallel_batches import ParallelBatches
from plinth.tokenizer.train import train_tokenizer

PAIRS = [("a " * (1 + i % 7) + str(i), "b " * (1 + i % 5) + str(i)) for i in range(50)]


def batches(seed=0):
    tokenizer = train_tokenizer([text for pair in PAIRS for text in pair], vocab_size=270)
    return ParallelBatches(ParallelText(PAIRS, tokenizer, tokenizer), pairs_per_step=16, micro_batch_size=8, seed=seed), tokenizer


def test_an_epoch_shows_each_pair_once():
    made, tokenizer = batches()
    parts = [part for step in range(made.steps_per_epoch) for part in made.at(step)]
    rows = [row[shown] for source_BS, mask_BS, *_ in parts for row, shown in zip(source_BS, mask_BS)]
    assert sorted(tokenizer.decode(row.tolist()) for row in rows) == sorted(source for source, _ in PAIRS)


def test_a_step_is_the_same_from_wherever_it_is_reached():
    straight, _ = batches()
    seen = [straight.at(step) for step in range(10)]
    jumping, _ = batches()
    for step in (9, 2, 5):
        for ours, theirs in zip(jumping.at(step), seen[step]):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    seeds = {int(part[4][0]) for step in seen for part in step}
    assert len(seeds) == sum(map(len, seen)), "each micro-batch drops otherwise"


def test_a_batch_is_described_by_its_sources():
    made, tokenizer = batches()
    source, mask = made.at(1)[0][:2]
    assert tokenizer.decode(source[1][mask[1]].tolist())[:20] in made.describe(1, [1], tokenizer.decode)
