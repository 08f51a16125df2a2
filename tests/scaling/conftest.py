"""A machine and a text of known properties, so that a plan's arithmetic can be checked without measuring anything."""

import pytest

from plinth.scaling.corpus import CorpusStats, VocabularyPoint
from plinth.scaling.probe import Probe
from plinth.scaling.timing import TimeModel


@pytest.fixture
def corpus():
    points = (VocabularyPoint(1024, 2.4), VocabularyPoint(2048, 2.9), VocabularyPoint(4096, 3.3), VocabularyPoint(8192, 3.7))
    return CorpusStats(text_bytes=13_000_000, documents=9000, vocabularies=points, has_instructions=True)


@pytest.fixture
def probe():
    """Two cores with bf16 matrix units: some 19,000 tokens/s at 6 layers x 256."""
    return Probe(
        cpu="two cores",
        cores=2,
        memory_bytes=16_000_000_000,
        memory_source="the machine",
        dtype="bfloat16",
        matmul_flops_per_s={"float32": 0.3e12, "bfloat16": 2.3e12},
        bandwidth_bytes_per_s=50e9,
        train_points=(),
        time_model=TimeModel(1 / 1.2e12, 1e-10, 2e-11, 1e-3, num_points=3),
        probe_s=6.0,
    )
