"""`plinth serve`: an OpenAI-compatible server and a chat page for one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from plinth.cli.output import emit, say
from plinth.config import UserError, read_json
from plinth.inference.text import TextEngine
from plinth.run import find_model
from plinth.serving.app import create_app
from plinth.serving.limits import LOOPBACK_NAMES
from plinth.serving.listening import listen, run_server, url_host


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model: OpenAI's /v1/completions and /v1/chat/completions, and a chat page."""

    run: Annotated[Path, tyro.conf.Positional]
    """a build, a run, or a model folder in Hugging Face's format"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 opens the server to the network, without a password"""
    port: int = 8000
    """TCP port, 0 to 65535; 0 = any free one"""
    name: str | None = None
    """the model's name on the wire; None = the name of the run's directory"""
    max_batch: int = 16
    """sequences that are generated together"""
    max_queue: int = 64
    """sequences that may wait for a place; further requests get 429"""
    allow_origin: tuple[str, ...] = ()
    """origins such as https://example.org whose pages may use the server, beside its own"""
    json: bool = False
    """print one JSON object on standard output when the server is ready"""

    def check(self) -> None:
        """Raise UserError for a number that is out of range."""
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port} is not a TCP port. Use 0 to 65535.")
        for name in ("max_batch", "max_queue"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")


def main(argv: list[str]) -> int:
    """Serve until Ctrl-C; returns 0. Raises UserError when there is no model or the port is taken."""
    config = tyro.cli(ServeConfig, args=argv, prog="plinth serve")
    config.check()
    model_dir = find_model(config.run)
    listener = listen(config.host, config.port)
    try:
        say(f"loading {model_dir} …")
        app, facts = make_app(config, model_dir)
        port = listener.getsockname()[1]
        url = f"http://{url_host(config.host)}:{port}"
        facts |= {"url": f"{url}/", "api": f"{url}/v1"}
        announce(config, facts)
        run_server(app, listener)
    finally:
        listener.close()
    say("stopped.")
    return 0


def make_app(config: ServeConfig, model_dir: Path) -> tuple[Any, dict[str, Any]]:
    """Load the model; return the application and what there is to say about it."""
    text_engine = TextEngine.load(model_dir, max_batch=config.max_batch)
    is_chat = speaks_chat(model_dir, text_engine)
    is_loopback = config.host in LOOPBACK_NAMES
    name = config.name or model_name(config.run)
    app = create_app(
        text_engine,
        name,
        max_queue=config.max_queue,
        is_chat=is_chat,
        host_names=LOOPBACK_NAMES if is_loopback else None,
        origins=config.allow_origin,
    )
    return app, {"model": name, "path": str(model_dir), "chat": is_chat, "max_seq_len": text_engine.engine.max_seq_len}


def model_name(path: Path) -> str:
    """Return the name of a run's directory; for a `model` folder the run's that holds it."""
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def speaks_chat(model_dir: Path, text_engine: TextEngine) -> bool:
    """Whether the model was tuned to answer: its run is not a pretraining run, and its tokenizer has the headers."""
    provenance = model_dir.parent / "provenance.json"
    stage = read_json(provenance).get("stage") if model_dir.name == "model" and provenance.exists() else None
    return stage != "pretrain" and text_engine.tokenizer.assistant_id is not None


def announce(config: ServeConfig, facts: dict[str, Any]) -> None:
    """Say where the page is; on an open address say that it is open."""

    def render(console: Console) -> None:
        console.print(f"chat page   {facts['url']}", highlight=False, soft_wrap=True)
        console.print(f"OpenAI API  {facts['api']}   model {facts['model']}", highlight=False, markup=False, soft_wrap=True)
        console.print("Ctrl-C stops the server.", highlight=False)

    if config.host not in LOOPBACK_NAMES:
        say(f"host={config.host}: whoever reaches this machine can use the server; there is no password.")
    emit(facts, config.json, render)
