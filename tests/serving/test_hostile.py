"""Clients that are slow, rude or gone: each is answered or cut off, and the server goes on."""

import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from plinth.serving.limits import Limits
from plinth.serving.listening import Connection

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": 0}


class Hasty(Connection):
    """A connection whose clocks run out soon."""

    header_timeout_s = 0.3
    stall_timeout_s = 0.3


@pytest.fixture(scope="module")
def hasty_url(make_text_engine, start):
    limits = Limits(body_timeout_s=0.3, max_body_bytes=2**20)
    with start(make_text_engine(), limits=limits, connection=Hasty) as url:
        yield url


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def head(length: int) -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def read_all(peer: socket.socket) -> bytes:
    data = b""
    while part := peer.recv(65536):
        data += part
    return data


def still_answers(url: str) -> bool:
    return httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 200


@pytest.mark.parametrize("said", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_never_end(hasty_url, said):
    with connect(hasty_url) as peer:
        peer.sendall(said)
        assert read_all(peer) == b""
    assert still_answers(hasty_url)


def test_headers_byte_by_byte_get_no_more_time(hasty_url):
    with connect(hasty_url) as peer, pytest.raises(OSError):  # noqa: PT012 - which send fails depends on the clock
        for _ in range(1000):
            peer.sendall(b"X")
            time.sleep(0.01)
    assert still_answers(hasty_url)


def test_a_second_request_has_the_same_clock(hasty_url):
    with connect(hasty_url) as peer:
        peer.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        peer.recv(65536)
        peer.sendall(b"GET /hea")
        while peer.recv(65536):
            pass
    assert still_answers(hasty_url)


def test_a_body_that_never_ends(hasty_url):
    with connect(hasty_url) as peer:
        peer.sendall(head(1000) + b'{"model":')
        answer = read_all(peer)
    assert b" 408 " in answer.split(b"\r\n")[0] and b'"error"' in answer
    assert still_answers(hasty_url)


def test_what_is_no_http_gets_an_error_object(hasty_url):
    with connect(hasty_url) as peer:
        peer.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = read_all(peer)
    assert b" 400 " in answer.split(b"\r\n")[0] and json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "invalid_http"


def test_a_client_that_does_not_read_is_cut_off(make_text_engine, start, wait_until):
    with start(make_text_engine(max_seq_len=4096, eos=False), connection=Hasty) as url, connect(url) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({**BODY, "max_tokens": 4000, "n": 8, "logprobs": 20, "stream": True, "temperature": 1.5}).encode()
        peer.sendall(head(len(body)) + body)
        peer.recv(1000)
        wait_until(lambda: httpx.get(f"{url}/health").json()["active"] == 8, "all sequences run")
        wait_until(lambda: httpx.get(f"{url}/health").json()["active"] == 0, "the reader's places are free")


def test_a_full_buffer_ends_the_stream(make_text_engine, start):
    with start(make_text_engine(max_seq_len=4096, eos=False), limits=Limits(max_buffered_pieces=2)) as url:
        body = {**BODY, "max_tokens": 200, "n": 8, "stream": True}
        text = httpx.post(f"{url}/v1/completions", json=body, timeout=60).text
    assert '"slow_client"' in text or text.endswith("data: [DONE]\n\n")  # a step's eight pieces exceed two


def test_an_answer_that_takes_too_long(make_text_engine, start, wait_until):
    with start(make_text_engine(max_seq_len=4096, eos=False), limits=Limits(request_timeout_s=0.2)) as url:
        body = {**BODY, "max_tokens": 4000}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        streamed = httpx.post(f"{url}/v1/completions", json=body | {"stream": True}, timeout=60).text.split("\n\n")
        assert '"timeout"' in streamed[-2] and '"text"' in streamed[0] and "[DONE]" not in streamed[-2]
        wait_until(lambda: httpx.get(f"{url}/health").json()["active"] == 0, "the places are free")


@pytest.mark.parametrize("prompt", [[1] * 400_000, ["x"] * 400_000, [[1]] * 300_000, [[1] * 400_000], [1] * 300_000 + ["x"]])
def test_a_long_list_is_refused(base_url, prompt):
    answer = httpx.post(f"{base_url}/v1/completions", json={**BODY, "prompt": prompt}, timeout=60)
    assert answer.status_code == 400 and len(answer.json()["error"]["message"]) < 300


def test_a_long_text_is_refused_before_it_is_read(base_url):
    for body, path in (
        ({**BODY, "prompt": "word " * 1_500_000}, "completions"),
        ({"model": "tiny", "messages": [{"role": "user", "content": "a" * 7_000_000}]}, "chat/completions"),
    ):
        answer = httpx.post(f"{base_url}/v1/{path}", json=body, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("value", ["[" * 50_000 + "]" * 50_000, '{"a":' * 50_000 + "1" + "}" * 50_000])
def test_deep_json_is_refused(base_url, value):
    for name in ("prompt", "metadata", "stop", "unknown"):
        content = f'{{"model": "tiny", "{name}": {value}}}'
        answer = httpx.post(f"{base_url}/v1/completions", content=content, headers={"Content-Type": "application/json"}, timeout=60)
        assert answer.status_code == 400 and "error" in answer.json()


@pytest.mark.parametrize("content", [b'{"model": "tiny", "prompt": "\xff\xfe"}', b'{"model": "tiny", "prompt": "\\udc80"}', b"\x00" * 100])
def test_invalid_text_is_refused(base_url, content):
    answer = httpx.post(f"{base_url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_numbers_of_many_digits(base_url):
    for name in ("seed", "max_tokens", "temperature", "n"):
        content = f'{{"model": "tiny", "prompt": "x", "{name}": {"9" * 5000}}}'
        answer = httpx.post(f"{base_url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and len(answer.json()["error"]["message"]) < 300
