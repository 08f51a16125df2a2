"""A listening socket, the address that a browser finds it at, and the server on it until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Any

import uvicorn

from plinth.config import UserError

STOP_TIMEOUT_S = 3  # open streams get this long after Ctrl-C


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


def run_server(app: Any, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_TIMEOUT_S, lifespan="on")
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has shut down
        server.run(sockets=[listener])
