"""What changes logits before the temperature: values worked by hand, then the same from transformers."""

import numpy as np
import pytest
import torch

from plinth.inference import penalties
from plinth.inference.penalties import TokenCounts
from plinth.inference.sampling import SamplingParams, change_logits, choose_tokens

ROWS, IDS = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1])


def test_bias_and_bans_by_hand():
    logits = torch.zeros(2, 4)
    penalties.add_bias(logits, ROWS, IDS, torch.tensor([1.5, -2.0, 3.0]))
    assert logits.tolist() == [[0, 1.5, -2.0, 0], [0, 3.0, 0, 0]]
    penalties.forbid(logits, ROWS[:1], IDS[:1])
    assert logits[0].tolist() == [0, -np.inf, -2.0, 0]


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[1.0, 3.0, -2.0, 0.0], [5.0, -1.0, 0.0, 2.0]])
    penalties.penalise_repetition(logits, ROWS, IDS, torch.tensor([2.0, 2.0, 0.5]))
    assert logits.tolist() == [[1.0, 1.5, -4.0, 0.0], [5.0, -0.5, 0.0, 2.0]]


def test_presence_and_frequency_by_hand():
    logits = torch.zeros(2, 4)
    penalties.penalise_counts(
        logits, ROWS, IDS, torch.tensor([3.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, -1.0]), torch.tensor([0.25, 0.25, 2.0])
    )
    assert logits.tolist() == [[0, -1.25, 0, 0], [0, -1.0, 0, 0]]


def test_counts_tell_prompt_from_completion():
    counts = TokenCounts([5, 5, 2])
    for token in (5, 9, 9):
        counts.add(token)
    twin = counts.copy()
    twin.add(2)
    twin.add(100)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist())) == {2: 0, 5: 1, 9: 2}
    assert dict(zip(twin.ids.tolist(), twin.counts.tolist())) == {2: 1, 5: 1, 9: 2, 100: 1}


def test_counts_are_those_of_a_plain_count():
    generator = np.random.default_rng(0)
    prompt, completion = generator.integers(0, 60, 40).tolist(), generator.integers(0, 90, 500).tolist()
    counts = TokenCounts(prompt)
    for token in completion:
        counts.add(token)
    expected = {token: completion.count(token) for token in {*prompt, *completion}}
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist())) == expected


def test_mask_of_ids():
    assert np.unpackbits(penalties.mask_of_ids((1, 8, 10), 11), bitorder="little").nonzero()[0].tolist() == [1, 8, 10]


def test_ends_are_banned_until_min_tokens():
    params = SamplingParams(min_tokens=2, stop_token_ids=(3,))
    for index, banned in ((0, [1, 3]), (1, [1, 3]), (2, [])):
        logits = torch.zeros(1, 5)
        change_logits(logits, [params], [index], eos_ids=(1,))
        assert logits[0].isinf().nonzero()[:, 0].tolist() == banned


def test_a_mask_and_allowed_ids_are_both_kept():
    mask = np.packbits([1, 0, 1, 1, 0, 0, 0, 0, 0, 1], bitorder="little")
    params = [SamplingParams(allowed_token_ids=(0, 1, 9), seed=i) for i in range(200)]
    logits = torch.zeros(200, 10)
    assert set(choose_tokens(logits, params, range(200), [0] * 200, masks=[mask] * 200).tokens) == {0, 9}
    assert set(choose_tokens(logits, params, range(200), [0] * 200).tokens) == {0, 1, 9}
    assert not logits.any()


def test_penalties_come_after_the_bias_and_touch_their_own_row():
    params = [SamplingParams(logit_bias={1: 4.0}, repetition_penalty=2.0, presence_penalty=1.0), SamplingParams(frequency_penalty=2.0)]
    histories = [TokenCounts([1]), TokenCounts([1])]
    histories[0].add(2)
    histories[1].add(1)
    histories[1].add(1)
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    change_logits(logits, params, [1, 2], histories)
    assert logits.tolist() == [[1.0, 3.0, 0.5], [1.0, -2.0, 3.0]]


@pytest.mark.oracle
def test_transformers_processors_give_the_same_logits():
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 3
    prompt, completion = [4, 4, 7, 30], [7, 8, 8]
    history = TokenCounts(prompt)
    for token in completion:
        history.add(token)
    params = SamplingParams(logit_bias={2: 1.5, 7: -2.0}, repetition_penalty=1.3, min_tokens=9, stop_token_ids=(11,))
    ours = logits.clone()
    change_logits(ours, [params], [len(completion)], [history], eos_ids=(12,))
    ids, theirs = torch.tensor([prompt + completion]), logits.clone()
    for processor in (
        transformers.SequenceBiasLogitsProcessor([[[2], 1.5], [[7], -2.0]]),
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 9, [11, 12], device="cpu"),
    ):
        theirs = processor(ids, theirs)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
