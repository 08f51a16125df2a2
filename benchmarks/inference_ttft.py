"""How long do 32 clients wait for their first token when their prompts share a prefix, against llama.cpp's server?

    python benchmarks/inference_ttft.py --llama-server PATH [--folder runs/bench-inference] [--size 124M] [--rounds 5]

Both serve the weights of inference_peers.py in bf16 on two threads. All clients ask at once over HTTP, streaming: a prefix of 256 tokens
that no earlier round had, then 16 of their own, 16 tokens to write. `seen` is the same again with other own tokens: the prefix is known.
Rounds alternate. A round is at its end when every client has its answer; its figures are the median and the 95th percentile of the 32.
llama-server has 32 slots, one cache for all, and flash attention, which made it faster here.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from inference_peers import SHAPES, prepare
from record import spread, write_record

CLIENTS, PREFIX, OWN, NEW = 32, 256, 16, 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, help="llama-server; without it only Plinth is measured")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-inference"), help="models and rounds")
    parser.add_argument("--size", choices=SHAPES, default="124M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="append rounds only")
    arguments = parser.parse_args()
    prepare(arguments.folder / arguments.size, arguments.size)
    journal = arguments.folder / "ttft.jsonl"
    measure(commands(arguments.folder / arguments.size, arguments.llama_server), arguments.size, arguments.rounds, journal)
    if not arguments.no_record:
        record(journal)
    return 0


def commands(folder: Path, llama_server: Path | None) -> dict[str, list[str]]:
    """Return the command of each side; the port follows."""
    sides = {"plinth": [sys.executable, "-m", "plinth", "serve", str(folder / "hf"), "--max-batch", str(CLIENTS), "--port"]}
    if llama_server:
        plain = [str(llama_server), "-m", str(folder / "bf16.gguf"), "-c", "16384", "-np", str(CLIENTS), "-kvu", "-t", "2", "-tb", "2"]
        sides["llama-server"] = [*plain, "-fa", "on", "--no-webui", "--port"]
    return sides


def measure(sides: dict[str, list[str]], size: str, rounds: int, journal: Path) -> None:
    servers = {}
    try:
        for side, command in sides.items():
            port = free_port()
            servers[side] = port, subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_until_up(port, servers[side][1])
        generator = random.Random(time.time_ns())
        for port, _ in servers.values():
            ask_all(port, [tokens(generator, size, OWN)] * 2)
        for number in range(rounds):
            prefix = tokens(generator, size, PREFIX)
            for side in list(sides) if number % 2 else reversed(list(sides)):
                for prefix_is in ("new", "seen"):
                    waits = ask_all(servers[side][0], [prefix + tokens(generator, size, OWN) for _ in range(CLIENTS)])
                    note(journal, {"size": size, "side": side, "prefix": prefix_is, "ttft_s": waits})
    finally:
        for _, process in servers.values():
            process.terminate()
            process.wait()


def tokens(generator: random.Random, size: str, count: int) -> list[int]:
    return [generator.randrange(300, 30_000) for _ in range(count)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_up(port: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"{process.args} ended with {process.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{process.args} does not answer")


def ask_all(port: int, prompts: list[list[int]]) -> list[float]:
    """Return each client's seconds from its request to the first token of the stream."""
    waits: list[float] = [0.0] * len(prompts)
    together = threading.Barrier(len(prompts))

    def client(i: int) -> None:
        body = json.dumps({"model": "hf", "prompt": prompts[i], "max_tokens": NEW, "temperature": 0, "stream": True})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.connect()
        together.wait()
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {answer.read()[:200]!r}")
        for line in answer:
            if line.startswith(b"data:") and not waits[i]:
                waits[i] = time.perf_counter() - started
        connection.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(waits):
        raise SystemExit("a client got no token")
    return waits


def note(journal: Path, line: dict[str, Any]) -> None:
    with journal.open("a") as file:
        file.write(json.dumps(line) + "\n")
    waits = sorted(line["ttft_s"])
    print(
        f"{line['size']} {line['side']}, prefix {line['prefix']}: median {waits[16]:.3f} s, last {waits[-1]:.3f} s",
        file=sys.stderr,
        flush=True,
    )


def record(journal: Path) -> None:
    """Write benchmarks/records/inference_ttft.json."""
    groups: dict[tuple[str, str], dict[str, list[list[float]]]] = {}
    for line in map(json.loads, journal.read_text().splitlines()):
        groups.setdefault((line["size"], line["prefix"]), {}).setdefault(line["side"], []).append(sorted(line["ttft_s"]))
    rows = []
    for (size, prefix), sides in sorted(groups.items()):
        figures = {}
        for side, rounds in sides.items():
            medians, tails = [statistics.median(waits) for waits in rounds], [waits[int(0.95 * len(waits))] for waits in rounds]
            figures[side] = {"ttft_median_s": spread(medians), "ttft_p95_s": spread(tails)}
        rows.append({"size": size, "prefix": prefix, "sides": figures})
    more = {"clients": CLIENTS, "prefix_tokens": PREFIX, "own_tokens": OWN, "new_tokens": NEW}
    write_record("inference_ttft", "How long do 32 clients wait for their first token, with a prefix that they share?", rows, **more)


if __name__ == "__main__":
    raise SystemExit(main())
