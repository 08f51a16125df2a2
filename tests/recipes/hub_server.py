"""A hub of one model on this machine: what huggingface_hub asks, and no more."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path, name: str, asked: list[str]) -> Iterator[str]:
    """Serve the files of a folder as model `name`; gives the address, and adds every path asked for to `asked`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = unquote(self.path.split("?")[0])
            asked.append(path)
            files = sorted(p for p in folder.iterdir() if p.is_file())
            body, headers, status = b"{}", {"Content-Type": "application/json"}, 404
            if path.startswith(f"/api/models/{name}/tree/"):
                body, status = json.dumps([entry(file) for file in files]).encode(), 200
            elif path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": file.name} for file in files]
                body, status = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings, "private": False}).encode(), 200
            elif path.startswith(f"/{name}/resolve/") and (folder / path.rsplit("/", 1)[1]).is_file():
                body, status = (folder / path.rsplit("/", 1)[1]).read_bytes(), 200
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            else:
                headers["X-Error-Code"] = "RepoNotFound"
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


def entry(file: Path) -> dict[str, object]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
