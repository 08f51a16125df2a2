"""What the server counts and times, under vLLM's names where they mean the same.

All of it is written in the event loop's thread only. plinth.serving.exposition turns it into Prometheus' text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
TOKENS = tuple(2.0**power for power in range(0, 18))


@dataclass
class Histogram:
    """Counts of observations at most as large as each bound."""

    bounds: tuple[float, ...]
    """upper bounds of the buckets, rising; one more bucket has no bound"""
    counts: list[int] = field(default_factory=list)
    """observations of each bucket alone"""
    total: float = 0.0
    """sum of all observations"""

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Add an observation, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """Return (bound, observations up to it), the last bound +Inf."""
        names = [str(bound) for bound in self.bounds] + ["+Inf"]
        return [(name, float(sum(self.counts[: i + 1]))) for i, name in enumerate(names)]


@dataclass
class Metrics:
    """Everything that is counted for one model."""

    model_name: str
    """value of the label model_name"""
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """HTTP answers by route and status"""
    finished: Counter[str] = field(default_factory=Counter)
    """sequences by why they ended: stop, length, …, abort for those whose client left or that failed"""
    prompt_tokens: int = 0
    """prompt tokens of all sequences that were begun"""
    generation_tokens: int = 0
    """tokens made"""
    ttft_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """from a request's headers to a sequence's first token"""
    itl_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """between two tokens of a sequence"""
    duration_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """from a request's headers to the end of a sequence"""
    queue_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """from the queue into the engine"""
    prompt_lengths: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    """prompt tokens a sequence"""
    generation_lengths: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    """tokens made for a sequence that ended"""

    def answered(self, route: str, status: int) -> None:
        """Count one HTTP answer."""
        self.responses[route, status] += 1
