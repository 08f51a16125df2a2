"""The log and the metrics: what they count, and that they hold no word of a prompt or of an answer."""

import io
import json
import logging

import httpx
import pytest

from plinth.serving.keys import ApiKeys
from plinth.serving.metrics import Histogram
from plinth.serving.records import log_json


@pytest.fixture
def log_lines():
    """The JSON lines that are logged meanwhile."""
    stream, kept = io.StringIO(), []
    for name in ("plinth", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        kept.append((logger, logger.handlers, logger.propagate, logger.level))
    log_json(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger, handlers, propagate, level in kept:
        logger.handlers, logger.propagate, logger.level = handlers, propagate, level
        logger.setLevel(level)


def test_a_line_for_each_request_without_its_words(make_text_engine, start, log_lines, wait_until):
    headers = {"Authorization": "Bearer open-sesame"}
    with start(make_text_engine(), keys=ApiKeys(["open-sesame"])) as url:
        body = {"model": "tiny", "prompt": "confidential", "max_tokens": 3, "temperature": 0, "n": 2}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        httpx.post(f"{url}/v1/completions", json=body | {"stream": True}, headers=headers, timeout=60)
        httpx.post(f"{url}/v1/completions", json=body | {"temperature": -1}, headers=headers)
        httpx.post(f"{url}/v1/completions", json=body)
        wait_until(lambda: len([line for line in log_lines() if line["event"] == "request"]) >= 5, "all requests are logged")
    lines = {line["id"]: line for line in log_lines() if line["event"] == "request" and line["path"] == "/v1/completions"}
    whole = lines[answer.headers["x-request-id"]]
    assert whole["status"] == 200 and whole["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert whole["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"] and len(whole["finish_reasons"]) == 2
    assert 0 < whole["ttft_s"] <= whole["duration_s"] and len(whole["key"]) == 8
    assert sorted(line["status"] for line in lines.values()) == [200, 200, 400, 401]
    assert [line["streamed"] for line in lines.values() if "streamed" in line] == [False, True]
    assert "confidential" not in json.dumps(log_lines()) and "sesame" not in json.dumps(log_lines())


def test_metrics_count_what_was_answered(make_text_engine, start):
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    with start(make_text_engine()) as url:
        body = {"model": "tiny", "prompt": "def main", "max_tokens": 4, "n": 2, "seed": 1}
        usage = [httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"] for _ in range(2)]
        httpx.post(f"{url}/v1/completions", json=body | {"n": 0})
        httpx.get(f"{url}/no/such/place")
        answer = httpx.get(f"{url}/metrics")
    families = {family.name: family for family in parser.text_string_to_metric_families(answer.text)}
    samples = {
        (sample.name, sample.labels.get("finished_reason"), sample.labels.get("route"), sample.labels.get("status")): sample.value
        for family in families.values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert answer.headers["content-type"].startswith("text/plain")
    assert all(sample.labels["model_name"] == "tiny" for family in families.values() for sample in family.samples)
    assert samples["vllm:generation_tokens_total", None, None, None] == sum(one["completion_tokens"] for one in usage)
    assert samples["vllm:prompt_tokens_total", None, None, None] == 2 * sum(one["prompt_tokens"] for one in usage)  # n = 2 sequences
    assert samples["vllm:num_requests_running", None, None, None] == samples["vllm:num_requests_waiting", None, None, None] == 0
    assert sum(value for key, value in samples.items() if key[0] == "vllm:request_success_total") == 4
    assert samples["plinth:http_responses_total", None, "/v1/completions", "200"] == 2
    assert samples["plinth:http_responses_total", None, "/v1/completions", "400"] == 1
    assert samples["plinth:http_responses_total", None, "unknown", "404"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert samples[f"vllm:{name}_seconds_count", None, None, None] == 4, name
    assert samples["vllm:inter_token_latency_seconds_count", None, None, None] == sum(one["completion_tokens"] for one in usage) - 4
    assert samples["vllm:request_generation_tokens_sum", None, None, None] == sum(one["completion_tokens"] for one in usage)


def test_histogram_counts_up_to_each_bound():
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 6), ("5.0", 7), ("+Inf", 8)] and histogram.total == 23.0
