"""Concurrent requests share the engine: same texts as alone, bounded waiting, and places freed when a client leaves."""

import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from plinth.serving.limits import Limits


def requests(count: int) -> list[dict]:
    """Requests of different lengths, prompts, seeds and stops."""
    return [
        {
            "model": "tiny", "prompt": ["def main", "東京", "class Path:\n    def", "🙂"][i % 4] * (1 + i % 3), "seed": i,
            "max_tokens": 5 + 7 * (i % 5), "temperature": [0, 0.8, 1.4][i % 3], "logprobs": 2, **({"stop": "e"} if i % 2 else {}),
        }
        for i in range(count)
    ]  # fmt: skip


def test_a_concurrent_batch_equals_singles(base_url):
    bodies = requests(24)

    def ask(body):
        return httpx.post(f"{base_url}/v1/completions", json=body, timeout=120).json()

    singles = [ask(body)["choices"] for body in bodies]
    with ThreadPoolExecutor(24) as pool:
        together = [answer["choices"] for answer in pool.map(ask, bodies)]
    assert [[c["text"] for c in choices] for choices in together] == [[c["text"] for c in choices] for choices in singles]
    for mine, alone in zip(together, singles):
        assert mine[0]["finish_reason"] == alone[0]["finish_reason"]
        assert mine[0]["logprobs"]["token_logprobs"] == pytest.approx(alone[0]["logprobs"]["token_logprobs"], abs=1e-5)


def long_stream(url: str, seed: int = 0):
    """Open a stream that runs for very many tokens."""
    body = {"model": "tiny", "prompt": "x", "seed": seed, "max_tokens": 4000, "stream": True}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120)


def health(url: str) -> dict:
    return httpx.get(f"{url}/healthz").json()


def test_full_queue_is_429_and_a_leaving_client_frees_its_place(make_text_engine, start, wait_until):
    with start(make_text_engine(max_batch=1, max_seq_len=4096, eos=False), limits=Limits(max_queue=1)) as url:
        with long_stream(url) as first:
            lines = first.iter_lines()  # kept: a generator that is thrown away closes the stream
            next(lines)
            assert health(url)["active"] == 1
            second = threading.Thread(target=leave_soon, args=(url,))
            second.start()
            wait_until(lambda: health(url)["waiting"] == 1, "the second request waits")
            refused = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x"})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "queue_full"
            second.join()
            wait_until(lambda: health(url)["waiting"] == 0, "the second request left the queue")
        wait_until(lambda: health(url)["active"] == 0, "the stream's place is free")
        answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200


def leave_soon(url: str) -> None:
    """Ask for a whole answer, not a stream, and hang up before it comes."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=1.0)


def test_leaving_frees_all_choices_of_a_running_request(make_text_engine, start, wait_until):
    with start(make_text_engine(max_batch=4, max_seq_len=4096, eos=False)) as url:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "n": 4}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=1.0)
        wait_until(lambda: health(url)["active"] == 0, "all four places are free")


def test_a_short_request_does_not_wait_for_a_long_one(make_text_engine, start):
    with start(make_text_engine(max_batch=2, max_seq_len=4096, eos=False)) as url:
        with long_stream(url) as stream:
            lines = stream.iter_lines()
            next(lines)
            answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 3}, timeout=60)
            assert answer.status_code == 200 and health(url)["active"] == 1
            assert json.loads(next(line for line in lines if line).removeprefix("data: "))["choices"]


def test_stopping_the_server_ends_a_stream(make_text_engine, start):
    with start(make_text_engine(max_batch=1, max_seq_len=4096, eos=False)) as url:
        stream = long_stream(url)
        lines = stream.__enter__().iter_lines()
        next(lines)
    with pytest.raises((httpx.HTTPError, StopIteration)):
        while True:
            next(lines)


def test_a_client_that_leaves_frees_its_blocks_before_the_next_step(make_text_engine, start, wait_until):
    text_engine = make_text_engine(max_batch=2, max_seq_len=4096, eos=False)
    engine = text_engine.engine
    steps, step = [], engine.step

    def counted():
        steps.append(engine.num_active)
        return step()

    engine.step = counted
    free = engine.pool.num_available
    for streams in (True, False):
        with start(text_engine) as url:
            body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "n": 2, "stream": streams}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) if streams else patient(url, body):
                wait_until(lambda: health(url)["active"] == 2, "both run")
            wait_until(lambda: health(url)["active"] == 0, "nobody runs")
            assert engine.pool.num_available == free and engine.num_active == 0
            done = len(steps)
            assert httpx.get(f"{url}/health").status_code == 200 and len(steps) == done  # not one step more
    engine.check_integrity()


@contextlib.contextmanager
def patient(url: str, body: dict):
    """Ask for a whole answer over a connection of one's own, and hang up at the end of the block."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as peer:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        peer.sendall(head.encode() + content)
        yield
