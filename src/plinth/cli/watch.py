"""`plinth watch`: a run or a build as it goes, in the terminal or in the browser."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.live import Live

from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError
from plinth.watch.state import Watcher
from plinth.watch.terminal import frame

ENDS = ("done", "failed", "stopped")


@dataclass(frozen=True)
class Options:
    """Show a run or a build as it goes: loss beside the predicted curve, speed, MFU, energy, incidents. Nothing is written."""

    run: Annotated[Path, tyro.conf.Positional]
    """run or build directory; it need not be there yet"""
    stage: Literal["pretrain", "sft", "dpo"] | None = None
    """training stage of a build (default: the newest)"""
    once: bool = False
    """show the state of now and end"""
    serve: bool = False
    """show it as a page in the browser instead of in the terminal"""
    host: str = "127.0.0.1"
    """address that the page is served on; 0.0.0.0 opens it to the network, without a password"""
    port: int = 8001
    """TCP port of the page; 0 = any free one"""
    every_s: float = 1.0
    """seconds between two looks"""
    json: bool = False
    """print the state of now as one JSON object and end; with --serve, the page's address"""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port} is not a TCP port. Use 0 to 65535.")
        if not self.every_s > 0:
            raise UserError(f"every_s={self.every_s} must be positive.")


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when there is nothing to show once, or the port is taken."""
    options = read_options(Options, prog="plinth watch", args=argv)
    if options.serve:
        return serve(options)
    watcher = Watcher(options.run)
    if options.json or options.once:
        state = watcher.state(options.stage)
        if state["status"] == "waiting":
            raise UserError(f"{options.run} holds no run yet. Without --once and --json this command waits for it.")
        emit(state, options.json, lambda console: console.print(frame(state, watcher.curves(options.stage), console.width)))
        return 0
    follow(watcher, options)
    return 0


def follow(watcher: Watcher, options: Options) -> None:
    """Draw until the run ends or Ctrl-C."""
    console = Console()
    with Live(console=console, auto_refresh=False, screen=False, transient=False) as live:
        while True:
            state = watcher.state(options.stage)
            live.update(frame(state, watcher.curves(options.stage), console.width), refresh=True)
            if state["status"] in ENDS and not state["message"].startswith("The build goes on"):
                return
            time.sleep(options.every_s)


def serve(options: Options) -> int:
    """Serve the page until Ctrl-C; returns 0."""
    from plinth.serving.limits import LOOPBACK_NAMES
    from plinth.serving.listening import listen, run_server, url_host
    from plinth.watch.app import create_app

    is_loopback = options.host in LOOPBACK_NAMES
    listener = listen(options.host, options.port)
    try:
        url = f"http://{url_host(options.host)}:{listener.getsockname()[1]}/"
        if not is_loopback:
            say(f"host={options.host}: whoever reaches this machine can see the run; there is no password.")
        emit({"url": url}, options.json, lambda console: console.print(f"{options.run}  {url}   Ctrl-C stops the page.", highlight=False))
        run_server(create_app(options.run, LOOPBACK_NAMES if is_loopback else None), listener)
    finally:
        listener.close()
    return 0
