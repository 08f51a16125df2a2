"""A listening socket, the address that a browser finds it at, and the server on it until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from plinth.config import UserError
from plinth.serving.errors import bad_request

INTERRUPT_TIMEOUT_S = 3.0  # running answers get this long after Ctrl-C
CUT_TIMEOUT_S = 3  # for the error that ends an answer to reach its client


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError when the port is taken, forbidden, or the host is not ours."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise UserError(f"host={host} is not an address: {error.strerror}. Use 127.0.0.1, or 0.0.0.0 for all.") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere this option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(why_not_bound(error, host, port)) from None
    return listener


def why_not_bound(error: OSError, host: str, port: int) -> str:
    """Return the one line that says why a socket could not be bound, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken. Pass --port with another one, or --port 0 for any free one."
    if error.errno == errno.EACCES:
        return f"port {port} of {host} needs rights that you lack. Pass --port with one above 1023."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host={host} is not an address of this machine. Use 127.0.0.1, or 0.0.0.0 for all."
    return f"cannot listen on port {port} of {host}: {error.strerror}."


def url_host(host: str) -> str:
    """Return the host as a browser on this machine reaches it."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class Connection(H11Protocol):
    """A connection with clocks: one for a client that is slow to ask, one for a client that does not read its answer."""

    header_timeout_s = 10.0  # from the connection, or the first byte of a next request, to the end of a request's headers
    stall_timeout_s = 30.0  # a client that takes none of its answer for so long is cut off
    asking: asyncio.TimerHandle | None = None
    stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the headers are whole
            self._stop("asking")
        elif self.asking is None and not self.transport.is_closing():
            self._ask()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # a next request has begun behind this one
            self._ask()

    def _ask(self) -> None:
        self._stop("asking")
        self.asking = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop("stalled")
        self.stalled = self.loop.call_later(self.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("stalled")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("asking")
        self._stop("stalled")
        super().connection_lost(exc)

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP at all, as an error object too."""
        body = json.dumps(bad_request(msg, code="invalid_http").body()).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        events = (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


class StoppingServer(uvicorn.Server):
    """Stops in order: takes nothing new, lets running answers end for a while, then ends them with an error that says why.

    SIGTERM gives them `stop_timeout_s`; Ctrl-C little time, for the one who waits at the terminal; a second one none.
    """

    def __init__(self, config: uvicorn.Config, stop_timeout_s: float, end_answers: Callable[[], None]):
        super().__init__(config)
        self.stop_timeout_s, self.end_answers = stop_timeout_s, end_answers

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT:
            self.stop_timeout_s = min(self.stop_timeout_s, INTERRUPT_TIMEOUT_S)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self.stop_timeout_s)
        await asyncio.to_thread(self.end_answers)


def run_server(
    app: FastAPI,
    listener: socket.socket,
    *,
    stop_timeout_s: float = INTERRUPT_TIMEOUT_S,
    end_answers: Callable[[], None] = lambda: None,
    keeps_logging: bool = False,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM; then let answers end for `stop_timeout_s`, and call `end_answers` for the rest.

    `keeps_logging` leaves the logging as it was set up, instead of uvicorn's lines on standard error.
    """
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(stop_timeout_s) + CUT_TIMEOUT_S,
        lifespan="on",
        **({"log_config": None} if keeps_logging else {}),
    )
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # its warnings of writes to clients that have left
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again after it has shut down
    try:
        with contextlib.suppress(KeyboardInterrupt):
            StoppingServer(config, stop_timeout_s, end_answers).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
