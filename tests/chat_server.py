"""A server of chat completions on a port of this machine, whose answers a function gives, for tests."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """`reply(body)` returns a choice {message, logprobs}, or a status code of an error; `bodies` and `headers` are what was asked."""

    def __init__(self, reply):
        self.reply, self.bodies, self.headers, self.lock = reply, [], [], threading.Lock()

    def answer(self, body, headers):
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            choice = self.reply(body)
        return (200, {"choices": [choice]}) if isinstance(choice, dict) else (choice, {"error": {"message": f"no, {choice}"}})


def options_choice(**logprobs):
    """Return a choice whose first token has these alternatives."""
    top = [{"token": token.removeprefix("t"), "logprob": value} for token, value in logprobs.items()]
    return {"message": {"content": ""}, "logprobs": {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": top}]}}


@contextlib.contextmanager
def chat_server(reply):
    """Yield (address of the API, server)."""
    server = ChatServer(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and content leave in one piece

        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = server.answer(body, dict(self.headers))
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1", server
        finally:
            http.shutdown()
            thread.join(30)
