"""The pool of blocks: what is found is what was written, nothing is lost, the longest unused goes first."""

import random

import numpy as np
import pytest

from plinth.inference.blocks import BLOCK_TOKENS, BlockPool, OutOfBlocks, num_blocks

B = BLOCK_TOKENS


def table():
    return np.zeros(16, np.int32)


def prompt(*parts):
    return np.array([part for part, count in parts for _ in range(count)], np.int32)


def write(pool, sequence, tokens, publish=True):
    pool.grow(sequence, len(tokens))
    sequence.tokens += tokens[len(sequence.tokens) :].tolist()
    if publish:
        pool.publish(sequence, len(tokens))


def test_a_prefix_is_found_block_by_block_and_never_whole():
    pool = BlockPool(16)
    first = prompt((1, B), (2, B), (3, 5))
    a = pool.open(table(), first, 100)
    write(pool, a, first)
    assert pool.num_findable == 2
    assert pool.find(first)[0] == a.blocks[:2]
    assert pool.find(prompt((1, B), (2, B)))[0] == a.blocks[:1]  # the last token has to run
    assert pool.find(prompt((1, B), (3, B), (3, 1)))[0] == a.blocks[:1]
    assert pool.find(prompt((2, B), (1, 1)))[0] == []  # the same tokens behind another prefix are other blocks
    b = pool.open(table(), first, 100)
    assert b.blocks == a.blocks[:2] and b.tokens == first[: 2 * B].tolist() and b.table[:2].tolist() == b.blocks
    pool.check_integrity([a, b])
    pool.release(a), pool.release(b)
    pool.check_integrity([])
    assert pool.num_available == 16 and pool.find(first)[0]


def test_the_longest_unused_block_is_taken_first_and_deep_ones_before_those_they_stand_on():
    pool = BlockPool(4)
    for token in (1, 2):
        sequence = pool.open(table(), prompt((token, 2 * B)), 2 * B)
        write(pool, sequence, prompt((token, 2 * B)))
        pool.release(sequence)
    assert len(pool.find(prompt((1, 2 * B + 1)))[0]) == len(pool.find(prompt((2, 2 * B + 1)))[0]) == 2
    other = pool.open(table(), prompt((3, 1)), B)
    pool.grow(other, 1)
    assert len(pool.find(prompt((1, 2 * B + 1)))[0]) == 1 and len(pool.find(prompt((2, 2 * B + 1)))[0]) == 2


def test_what_is_reserved_is_there_and_nobody_else_gets_it():
    pool = BlockPool(8)
    a = pool.open(table(), prompt((1, 1)), 5 * B)
    assert pool.num_available == 3
    assert pool.open(table(), prompt((2, 1)), 4 * B) is None
    assert pool.open(table(), prompt((2, 1)), 3 * B, spare=1) is None
    b = pool.open(table(), prompt((2, 1)), 3 * B)
    pool.grow(b, 3 * B)
    with pytest.raises(OutOfBlocks):
        pool.grow(b, 3 * B + 1)
    pool.grow(a, 5 * B)
    pool.check_integrity([a, b])
    pool.release(a)
    assert pool.num_available == 5


def test_idle_blocks_that_are_shared_again_count_as_taken():
    pool = BlockPool(4)
    tokens = prompt((1, 3 * B + 1))
    a = pool.open(table(), tokens, len(tokens))
    write(pool, a, tokens)
    pool.release(a)
    assert pool.open(table(), tokens, 5 * B) is None
    b = pool.open(table(), tokens, 4 * B)
    assert pool.num_available == 0
    pool.check_integrity([b])


def test_a_fork_shares_until_one_of_the_two_grows():
    pool = BlockPool(8)
    tokens = prompt((1, B + 3))
    a = pool.open(table(), tokens, len(tokens))
    write(pool, a, tokens)
    b = pool.fork(a, table(), 2 * B)
    assert b.blocks == a.blocks and b.reserved == 1
    source, target = pool.make_writable(b)
    assert (source, target) == (a.blocks[1], b.blocks[1]) and b.table[1] == target and b.reserved == 0
    assert pool.make_writable(a) is None and pool.make_writable(b) is None
    pool.check_integrity([a, b])
    pool.release(a)
    pool.check_integrity([b])


def test_equal_blocks_written_twice_are_found_once():
    pool = BlockPool(8)
    tokens = prompt((1, 2 * B))
    a, b = (pool.open(table(), tokens, len(tokens)) for _ in range(2))
    write(pool, a, tokens)
    write(pool, b, tokens)
    assert pool.num_findable == 2 and pool.find(prompt((1, 2 * B + 1)))[0] == a.blocks
    pool.check_integrity([a, b])
    pool.release(b)
    pool.check_integrity([a])


def test_forgotten_blocks_are_free_and_unfindable():
    pool = BlockPool(4)
    tokens = prompt((1, 2 * B))
    a = pool.open(table(), tokens, len(tokens))
    write(pool, a, tokens)
    pool.release(a)
    pool.forget_all()
    assert pool.find(prompt((1, 3 * B)))[0] == [] and pool.num_available == 4
    pool.check_integrity([])


def test_without_caching_nothing_is_found():
    pool = BlockPool(4, prefix_caching=False)
    tokens = prompt((1, 2 * B))
    a = pool.open(table(), tokens, len(tokens))
    write(pool, a, tokens)
    assert pool.num_findable == 0 and pool.open(table(), tokens, 2 * B).tokens == []


def test_random_traces_keep_the_books():
    rng = random.Random(3)
    pool, alive = BlockPool(40), []
    for _ in range(3000):
        roll = rng.random()
        if roll < 0.35:
            tokens = prompt(*[(rng.randrange(3), B)] * rng.randrange(4), (rng.randrange(9), rng.randrange(1, 40)))
            sequence = pool.open(table(), tokens, len(tokens) + rng.randrange(60), spare=rng.randrange(4))
            if sequence is not None:
                write(pool, sequence, tokens)
                alive.append(sequence)
        elif roll < 0.5 and alive:
            parent = rng.choice(alive)
            child = pool.fork(parent, table(), len(parent.tokens) + rng.randrange(1, 50))
            if child is not None:
                pool.make_writable(child)
                alive.append(child)
        elif roll < 0.75 and alive:
            sequence = rng.choice(alive)
            room = (len(sequence.blocks) + sequence.reserved) * B - len(sequence.tokens)
            if room > 0 and not (pool.blocks_needed([sequence]) and sequence.reserved == 0):
                pool.make_writable(sequence)
                pool.grow(sequence, len(sequence.tokens) + 1)
                sequence.tokens.append(rng.randrange(3))
                pool.publish(sequence, len(sequence.tokens))
        elif alive:
            pool.release(alive.pop(rng.randrange(len(alive))))
        pool.check_integrity(alive)
    for sequence in alive:
        pool.release(sequence)
    pool.check_integrity([])
    assert pool.num_available == 40 and num_blocks(B + 1) == 2
