"""Laws of the schedules: the rate rises, stays and falls; stages share the tokens, and every step's rows follow from the step alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plinth.config import UserError
from plinth.training.schedule import BatchSchedule, Stage, warmup_stable_decay

stage = st.builds(Stage, st.floats(0.01, 1.0), st.sampled_from([4, 8, 16, 24]), st.integers(1, 9))


def test_the_schedule_rises_stays_and_falls():
    factors = [warmup_stable_decay(step, steps=20, warmup_steps=4, decay_steps=8) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[11] == 1.0 and factors[12] < 1.0
    assert factors[12:] == sorted(factors[12:], reverse=True)
    assert 0 < factors[-1] < 0.1


def test_one_stage_takes_the_rows_in_order():
    schedule = BatchSchedule([Stage(1.0, 16, 3)], 10)
    assert [schedule.rows(step) for step in (0, 1, 9)] == [(0, 3, 16), (3, 3, 16), (27, 3, 16)]
    assert schedule.tokens(10) == 10 * 3 * 16


def test_stages_worked_by_hand():
    # a third of the tokens in rows of 4, two thirds in rows of 8: 4 x 2 = 8 and 8 x 2 = 16 tokens a step, so as many steps of each
    schedule = BatchSchedule([Stage(1.0, 4, 2), Stage(2.0, 8, 2)], 6)
    assert [schedule.rows(step) for step in range(6)] == [(0, 2, 4), (2, 2, 4), (4, 2, 4), (3, 2, 8), (5, 2, 8), (7, 2, 8)]
    assert [schedule.tokens(step) for step in range(7)] == [0, 8, 16, 24, 40, 56, 72]


@given(st.lists(stage, min_size=1, max_size=4), st.integers(4, 400))
def test_every_stage_gets_its_share_to_the_nearest_step(stages, steps):
    schedule = BatchSchedule(stages, steps)
    starts = [0, *schedule.ends]
    assert schedule.ends[-1] == steps and all(a < b for a, b in zip(starts, schedule.ends))
    wanted = sum(s.share / s.tokens_per_step for s in stages)
    for i, (s, end) in enumerate(zip(stages, schedule.ends)):
        exact = steps * sum(t.share / t.tokens_per_step for t in stages[: i + 1]) / wanted
        if i < len(stages) - 1 and i + 1 < exact < steps - len(stages):
            assert abs(end - exact) <= len(stages)
        assert {schedule.rows(step)[1:] for step in range(starts[i], end)} == {(s.sequences_per_step, s.seq_len)}


@given(st.lists(stage, min_size=1, max_size=4), st.integers(4, 100))
def test_within_a_stage_no_row_is_skipped_or_repeated_and_tokens_add_up(stages, steps):
    schedule = BatchSchedule(stages, steps)
    tokens = 0
    for step in range(steps):
        rows = schedule.rows(step)
        assert schedule.tokens(step) == tokens
        assert 0 <= rows.first * rows.seq_len - tokens < rows.seq_len  # the next whole row
        tokens += rows.num_rows * rows.seq_len
    assert schedule.tokens(steps) == tokens


@pytest.mark.parametrize("bad", [(0.0, 8, 1), (1.0, 0, 1), (1.0, 8, 0)])
def test_impossible_stages_are_named(bad):
    with pytest.raises(UserError, match="share must be positive"):
        Stage(*bad)


def test_fewer_steps_than_stages_are_refused():
    with pytest.raises(UserError, match="2 stages need at least as many steps; steps=1"):
        BatchSchedule([Stage(0.5, 8, 1), Stage(0.5, 8, 2)], 1)
