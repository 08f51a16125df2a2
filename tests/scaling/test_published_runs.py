"""The cluster model against runs that others published, with one set of constants; see docs/cluster_planning.md for the table."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from plinth.scaling.accelerators import find_accelerator
from plinth.scaling.cluster_time import CONSTANTS
from plinth.scaling.published import PUBLISHED_RUNS, fit_constants

LONG_CONTEXT = 32768
HELD_OUT = [run for run in PUBLISHED_RUNS if not run.calibration]


def error(run):
    return run.predict()[0] / run.published_tokens_per_s - 1


@pytest.mark.parametrize("run", HELD_OUT, ids=lambda run: run.name)
def test_speed_of_runs_that_the_constants_never_saw(run):
    """Within 15 %, but for MPT at a context of 32,768, whose attention kernel of 2023 was slow: within 55 %."""
    old_kernel = run.model.startswith("mpt") and run.seq_len >= LONG_CONTEXT
    assert abs(error(run)) < (0.55 if old_kernel else 0.15)


def test_the_middle_error_of_held_out_runs_is_small_and_has_no_large_bias():
    errors = [error(run) for run in HELD_OUT]
    assert statistics.median(map(abs, errors)) < 0.08
    assert abs(statistics.median(errors)) < 0.04


@pytest.mark.parametrize("run", [run for run in PUBLISHED_RUNS if run.memory_bytes], ids=lambda run: run.name)
def test_memory_of_published_runs(run):
    _, _, memory = run.predict()
    assert memory.used == pytest.approx(run.memory_bytes, rel=0.2)


def test_the_fitted_constants_are_what_the_calibration_rows_give():
    assert len(PUBLISHED_RUNS) - len(HELD_OUT) == 5
    contention, hopper, ampere = fit_constants()
    assert contention == CONSTANTS.contention
    assert (hopper, ampere) == (find_accelerator("h100-sxm").sustained_share, find_accelerator("a100-sxm").sustained_share)


def test_the_order_of_the_three_stages_of_llama_3_is_kept():
    """Twice the accelerators at the same batch cost utilisation, through the pipeline's bubble."""
    first, second, _ = [run for run in PUBLISHED_RUNS if run.source.startswith("Llama 3")]
    assert first.predict()[0] > second.predict()[0]
    assert second.predict()[1].bubble_s / second.predict()[1].total_s > first.predict()[1].bubble_s / first.predict()[1].total_s


def test_utilisation_published_by_olmo_core_is_met():
    """47 to 48 % for 7 B and 41 to 42 % for 13 B: README of OLMo-core 1.2.0."""
    for name, low, high in (("OLMo-core 7B, h100, 4096", 0.45, 0.50), ("OLMo-core 13B, h100, 4096", 0.39, 0.45)):
        run = next(run for run in PUBLISHED_RUNS if run.name == name)
        assert low < run.mfu(run.predict()[0]) < high


def test_names_and_layouts_are_sound():
    assert len({run.name + run.source + run.dtype + str(run.layout) for run in PUBLISHED_RUNS}) == len(PUBLISHED_RUNS)
    for run in PUBLISHED_RUNS:
        assert (run.tokens_per_s is None) != (run.flops_per_s is None)
        assert run.shape.decoder.num_heads % run.layout.tensor == 0


@pytest.mark.slow
def test_the_page_quotes_what_the_code_gives():
    script = Path(__file__).parents[2] / "benchmarks" / "cluster_plan.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run python benchmarks/cluster_plan.py\n{done.stderr}"
