"""`plinth serve`: an OpenAI-compatible server and a chat page for one model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from plinth.cli.answers import keep_answers
from plinth.cli.generate import load_text_engine
from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.cli.speculate import speculate
from plinth.config import UserError, read_json
from plinth.inference.text import TextEngine
from plinth.run import find_model
from plinth.serving.app import create_app
from plinth.serving.keys import ApiKeys, read_keys
from plinth.serving.limits import LOOPBACK_NAMES, Limits
from plinth.serving.listening import listen, run_server, url_host
from plinth.serving.records import log_json
from plinth.serving.replicas import serve_replicas, wait_for_interrupt
from plinth.watch.beside import add_run


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model: OpenAI's /v1/completions and /v1/chat/completions, and a chat page."""

    run: Annotated[Path, tyro.conf.Positional]
    """a build, a run, or a model folder in Hugging Face's format"""
    adapter: Path | None = None
    """run with --adapter.rank, or a folder that PEFT saved, whose adapter is merged into the model in memory; None = the model as it is"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 opens the server to the network: see api_key_file"""
    port: int = 8000
    """TCP port, 0 to 65535; 0 = any free one"""
    name: str | None = None
    """the model's name on the wire; None = the name of the run's directory"""
    max_batch: int = 16
    """sequences that are generated together"""
    weights: Literal["fp32", "bf16", "int8", "int4"] | None = None
    """format of the weights while running; None = bf16 where this processor has our kernels, else fp32"""
    limits: Limits = field(default_factory=Limits)
    """how much the server takes on"""
    api_key_file: Path | None = None
    """file of API keys, one a line; the variable PLINTH_API_KEY may hold one too; None and no variable = open to all who reach it"""
    speculate: str | None = None
    """guess tokens ahead, which changes no answer: prompt-lookup, or a smaller model of the same tokenizer"""
    draft_tokens: int | None = None
    """with speculate: tokens guessed at a time, 1 to 15; None = 8 by prompt-lookup, 4 by a model"""
    answer_cache: Path | None = None
    """file that keeps answers which would come out the same again (greedy or seeded), to give them without computing; None = none kept"""
    min_likeness: float | None = None
    """with answer_cache: cosine (0 to 1) from which a prompt takes another's answer, perhaps wrongly; None = equal prompts only"""
    stop_timeout_s: float = 30.0
    """seconds that running answers get to end after SIGTERM; Ctrl-C gives them 3"""
    log_json: bool = False
    """log each request, never its words, and all else as JSON Lines on standard error"""
    allow_origin: tuple[str, ...] = ()
    """origins such as https://example.org whose pages may use the server, beside its own"""
    ray_replicas: int | None = None
    """serve with so many processes of a Ray cluster behind this address, through Ray Serve (extra `cluster`)"""
    json: bool = False
    """print one JSON object on standard output when the server is ready"""

    def check(self) -> None:
        """Raise UserError for a number that is out of range."""
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port} is not a TCP port. Use 0 to 65535.")
        self.limits.check()
        if self.max_batch < 1:
            raise UserError(f"max_batch={self.max_batch} must be at least 1.")
        if not self.stop_timeout_s >= 0:
            raise UserError(f"stop_timeout_s={self.stop_timeout_s} must be 0 seconds or more.")


def main(argv: list[str]) -> int:
    """Serve until Ctrl-C; returns 0. Raises UserError when there is no model or the port is taken."""
    config = read_options(ServeConfig, args=argv, prog="plinth serve", config=(tyro.conf.OmitArgPrefixes,))
    config.check()
    keys = read_keys(config.api_key_file, os.environ.get("PLINTH_API_KEY"))
    if config.log_json:
        log_json(sys.stderr)
    model_dir = find_model(config.run)
    if config.ray_replicas is not None:
        return serve_on_ray(config, config.ray_replicas, model_dir, keys)
    listener = listen(config.host, config.port)
    try:
        say(f"loading {model_dir} …")
        app, facts = make_app(config, model_dir, keys)
        port = listener.getsockname()[1]
        url = f"http://{url_host(config.host)}:{port}"
        facts |= {"url": f"{url}/", "api": f"{url}/v1"}
        announce(config, facts, is_open=not keys)
        run_server(
            app,
            listener,
            stop_timeout_s=config.stop_timeout_s,
            end_answers=app.state.server.batcher.close,
            keeps_logging=config.log_json,
        )
    finally:
        listener.close()
    say("stopped.")
    return 0


def serve_on_ray(config: ServeConfig, replicas: int, model_dir: Path, keys: ApiKeys) -> int:
    """Serve from several processes of a Ray cluster until Ctrl-C."""
    if config.port == 0:
        raise UserError("port=0 has no meaning with ray_replicas: name a port.")
    listen(config.host, config.port).close()  # says in one line that the port is taken
    here = replace(config, run=config.run.absolute(), adapter=config.adapter and config.adapter.absolute())
    build = partial(build_replica, here, model_dir.absolute(), keys)
    held = config.max_batch + config.limits.max_queue
    stop = serve_replicas(build, replicas, host=config.host, port=config.port, requests_each=held)
    url = f"http://{url_host(config.host)}:{config.port}"
    facts = {"model": config.name or model_name(config.run), "path": str(model_dir), "replicas": replicas}
    announce(config, facts | {"url": f"{url}/", "api": f"{url}/v1"}, is_open=not keys)
    wait_for_interrupt()
    stop()
    say("stopped.")
    return 0


def build_replica(config: ServeConfig, model_dir: Path, keys: ApiKeys) -> Any:
    """Return the application of one replica, in its own process."""
    return make_app(config, model_dir, keys)[0]


def make_app(config: ServeConfig, model_dir: Path, keys: ApiKeys) -> tuple[Any, dict[str, Any]]:
    """Load the model; return the application and what there is to say about it."""
    text_engine = load_text_engine(model_dir, config.weights, config.max_batch, config.adapter)
    speculate(text_engine, config.speculate, config.draft_tokens, config.weights)
    keep_answers(text_engine, model_dir, config.answer_cache, config.min_likeness, config.adapter)
    is_chat = speaks_chat(model_dir, text_engine, config.adapter)
    is_loopback = config.host in LOOPBACK_NAMES
    name = config.name or model_name(config.run)
    app = create_app(
        text_engine,
        name,
        limits=config.limits,
        keys=keys,
        is_chat=is_chat,
        host_names=LOOPBACK_NAMES if is_loopback else None,
        origins=config.allow_origin,
    )
    add_run(app, config.run, has_keys=bool(keys))
    return app, {"model": name, "path": str(model_dir), "chat": is_chat, "max_seq_len": text_engine.engine.max_seq_len}


def model_name(path: Path) -> str:
    """Return the name of a run's directory; for a `model` folder the run's that holds it."""
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def speaks_chat(model_dir: Path, text_engine: TextEngine, adapter: Path | None = None) -> bool:
    """Whether the model was tuned to answer: its run is not a pretraining run or it has an adapter, and its tokenizer can chat."""
    provenance = model_dir.parent / "provenance.json"
    stage = read_json(provenance).get("stage") if model_dir.name == "model" and provenance.exists() else None
    return (stage != "pretrain" or adapter is not None) and text_engine.tokenizer.can_chat


def announce(config: ServeConfig, facts: dict[str, Any], is_open: bool) -> None:
    """Say where the page is; on an open address say that it is open."""

    def render(console: Console) -> None:
        console.print(f"chat page   {facts['url']}", highlight=False, soft_wrap=True)
        console.print(f"OpenAI API  {facts['api']}   model {facts['model']}", highlight=False, markup=False, soft_wrap=True)
        console.print("Ctrl-C stops the server.", highlight=False)

    if config.host not in LOOPBACK_NAMES and is_open:
        say(f"host={config.host}: whoever reaches this machine can use the server. Pass --api-key-file to ask for a key.")
    emit(facts, config.json, render)
