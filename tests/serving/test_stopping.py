"""Stopping in order: nothing new, running answers end within the limit, the rest end with an error that says why."""

import contextlib
import socket
import threading

import httpx
import pytest
import uvicorn

from plinth.serving.app import create_app
from plinth.serving.listening import Connection, StoppingServer

LONG = {"model": "tiny", "prompt": "x", "seed": 1, "max_tokens": 4000, "stream": True}


@contextlib.contextmanager
def stopping_server(text_engine, stop_timeout_s: float):
    """Yield the address of a server and the function that asks it to stop, as a signal does."""
    app = create_app(text_engine, "tiny")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(app, http=Connection, log_level="critical", timeout_graceful_shutdown=30)
        server = StoppingServer(config, stop_timeout_s, app.state.server.batcher.close)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", lambda: setattr(server, "should_exit", True)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def make_long_engine(make_text_engine):
    return lambda max_seq_len: make_text_engine(max_batch=2, max_seq_len=max_seq_len, eos=False)


def test_a_running_stream_ends_and_new_clients_are_not_taken(make_long_engine, wait_until):
    with stopping_server(make_long_engine(1024), stop_timeout_s=120) as (url, stop):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"max_tokens": 1000}, timeout=120) as stream:
            lines = stream.iter_lines()
            next(lines)
            stop()
            wait_until(lambda: refuses(url), "new connections are refused")
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"length"' in rest[-2]


def refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.TransportError:
        return True
    return False


def test_what_is_not_done_in_time_ends_with_an_error(make_long_engine):
    with stopping_server(make_long_engine(4096), stop_timeout_s=0.2) as (url, stop):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as stream:
            lines = stream.iter_lines()
            next(lines)
            stop()
            rest = [line for line in lines if line]
    assert '"stopping"' in rest[-1] and "[DONE]" not in rest[-1]


def test_an_answer_that_is_no_stream_gets_503(make_long_engine, wait_until):
    answers = []
    with stopping_server(make_long_engine(4096), stop_timeout_s=0.2) as (url, stop):
        ask = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=LONG | {"stream": False}, timeout=120))
        )
        wait_until(lambda: not refuses(url), "the server runs")
        ask.start()
        wait_until(lambda: httpx.get(f"{url}/health").json()["active"], "the request runs")
        stop()
        ask.join(60)
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "stopping"
