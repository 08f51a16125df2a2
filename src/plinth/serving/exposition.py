"""The metrics as Prometheus' text, through prometheus-client. Imported at the first scrape: starting up does not wait for it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from plinth.inference.engine import Engine
from plinth.serving.server import Server

__all__ = ["CONTENT_TYPE_LATEST", "exposition"]


def exposition(server: Server) -> bytes:
    """Return all metrics of the server in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(server))
    return generate_latest(registry)


class _Snapshot:
    """Collects the values of this moment."""

    def __init__(self, server: Server):
        self.server = server

    def collect(self) -> Iterator[Metric]:
        yield from gauges(self.server)
        yield from counters(self.server)
        yield from histograms(self.server)


def gauges(server: Server) -> Iterator[Metric]:
    """Yield what goes up and down."""
    batcher, pool = server.batcher, server.engine.pool
    values = {
        "vllm:num_requests_running": ("Sequences in the batch.", batcher.num_active),
        "vllm:num_requests_waiting": ("Sequences that wait for a place.", batcher.num_waiting),
        "vllm:kv_cache_usage_perc": (
            "Share of the cache's blocks that are used or reserved, 0 to 1.",
            1 - pool.num_available / pool.num_blocks,
        ),
        "plinth:max_batch": ("Sequences that the batch holds.", batcher.max_batch),
        "plinth:engine_up": ("1 while the engine's thread runs.", float(batcher.is_alive)),
    }
    for name, (text, value) in values.items():
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([server.model_name], value)
        yield family


def counters(server: Server) -> Iterator[Metric]:
    """Yield what only grows."""
    metrics = server.metrics
    values: dict[str, tuple[str, float]] = {
        "vllm:prompt_tokens": ("Prompt tokens of the sequences that were begun.", metrics.prompt_tokens),
        "vllm:generation_tokens": ("Tokens made.", metrics.generation_tokens),
    }
    for name, (text, value) in (values | engine_counters(server.engine)).items():
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([server.model_name], value)
        yield family
    ended = CounterMetricFamily("vllm:request_success", "Sequences that ended, by reason.", labels=["model_name", "finished_reason"])
    for reason, count in sorted(metrics.finished.items()):
        ended.add_metric([server.model_name, reason], count)
    yield ended
    answers = CounterMetricFamily("plinth:http_responses", "HTTP answers.", labels=["model_name", "route", "status"])
    for (route, status), count in sorted(metrics.responses.items()):
        answers.add_metric([server.model_name, route, str(status)], count)
    yield answers


def histograms(server: Server) -> Iterator[Metric]:
    """Yield distributions."""
    metrics = server.metrics
    for name, text, histogram in (
        ("vllm:time_to_first_token_seconds", "From a request's headers to a sequence's first token.", metrics.ttft_s),
        ("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", metrics.itl_s),
        ("vllm:e2e_request_latency_seconds", "From a request's headers to a sequence's end.", metrics.duration_s),
        ("vllm:request_queue_time_seconds", "From the queue into the engine.", metrics.queue_s),
        ("vllm:request_prompt_tokens", "Prompt tokens of a sequence.", metrics.prompt_lengths),
        ("vllm:request_generation_tokens", "Tokens made for a sequence.", metrics.generation_lengths),
    ):
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        family.add_metric([server.model_name], buckets=histogram.cumulative(), sum_value=histogram.total)
        yield family


def engine_counters(engine: Engine) -> dict[str, tuple[str, float]]:
    """Return the engine's own counts, by name with a description."""
    counted = engine.counters
    return {
        "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", counted.prompt_tokens),
        "vllm:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", counted.cached_tokens),
        "vllm:spec_decode_num_draft_tokens": ("Tokens that were drafted.", counted.drafted),
        "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted.", counted.accepted),
        "plinth:engine_steps": ("Model calls.", counted.steps),
        "plinth:known_answers": ("Sequences answered from the cache of answers.", counted.known_answers),
        "plinth:forced_tokens": ("Tokens that a grammar left no choice about.", counted.forced_tokens),
    }
