"""A web application on a port of this machine, for tests."""

import contextlib
import socket
import threading

import httpx
import uvicorn

from plinth.serving.listening import Connection


@contextlib.contextmanager
def serve(app, connection=Connection):
    """Run the application in a thread, on a port that the system picks; yield its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    server = uvicorn.Server(uvicorn.Config(app, http=connection, log_level="warning", lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        httpx.get(f"{url}/healthz", timeout=60).raise_for_status()
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
