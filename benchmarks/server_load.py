"""Does the server's memory stay flat under clients at the queue's limit, and how long do they wait?

    python benchmarks/server_load.py RUN [--minutes 60] [--max-batch 16] [--max-queue 64] [--record NAME]

Starts `plinth serve RUN` and keeps one client more than it takes at once busy: streams of random length with prompts that share prefixes,
a tenth of them under a JSON schema, a tenth with n=2, a tenth whose client leaves after a few events. A refused client (429) waits a
little and asks again. The server's resident memory is sampled once a second; its growth is the median of the last tenth of the samples
over that of the second tenth. At the end no sequence may be left. Exit status 1 for a failure, a leak, or growth above 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import write_record

PREFIXES = ["def main(argv):\n", "class Path:\n    ", "The file is ", "Größe und 東京 "]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n", "ok"]}
MOST_GROWTH = 1.05


@dataclass
class Load:
    """What the clients saw."""

    ends: Counter[str] = field(default_factory=Counter)
    """answers by how they ended: done, left, 429, or what went wrong"""
    ttft_s: list[float] = field(default_factory=list)
    """from a request to the first event with text"""
    events: int = 0
    """events of all streams"""
    rss_bytes: list[int] = field(default_factory=list)
    """the server's resident memory, once a second"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--record", help="name of the record; none is written without it")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "plinth", "serve", str(arguments.run), "--port", "0", "--json", "--name", "load"]
    command += ["--max-batch", str(arguments.max_batch), "--max-queue", str(arguments.max_queue)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        clients = arguments.max_batch + arguments.max_queue + 1
        load, left_over = asyncio.run(run(int(url.rstrip("/").rpartition(":")[2]), server.pid, clients, 60 * arguments.minutes))
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    row = summary(load, clients, arguments.minutes) | {"left_over": left_over, "exit_status": status}
    print(json.dumps(row, indent=2))
    if arguments.record:
        write_record(arguments.record, "Does the server's memory stay flat under clients at the queue's limit?", [row])
    wrong = set(load.ends) - {"done", "left", "429"}
    return int(bool(wrong) or left_over != 0 or status != 0 or row["rss_growth"] > MOST_GROWTH)


async def run(port: int, pid: int, clients: int, seconds: float) -> tuple[Load, int]:
    """Let the clients work; return what they saw, and the sequences that were left when all had gone."""
    load, until = Load(), time.monotonic() + seconds
    watching = asyncio.create_task(watch(load, pid))
    await asyncio.gather(*(client(load, port, until, random.Random(number)) for number in range(clients)))
    watching.cancel()
    for _ in range(100):
        health = await ask_health(port)
        if not health["active"] + health["waiting"]:
            break
        await asyncio.sleep(0.1)
    return load, health["active"] + health["waiting"]


async def watch(load: Load, pid: int) -> None:
    while True:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        load.rss_bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(1)


async def client(load: Load, port: int, until: float, rng: random.Random) -> None:
    while time.monotonic() < until:
        try:
            end = await asyncio.wait_for(stream(load, port, rng), 120)
        except (OSError, TimeoutError) as error:
            end = type(error).__name__
        load.ends[end] += 1
        if end == "429":
            await asyncio.sleep(rng.uniform(0.1, 0.5))


async def stream(load: Load, port: int, rng: random.Random) -> str:
    """Ask once; return how it ended."""
    body: dict[str, Any] = {"model": "load", "prompt": rng.choice(PREFIXES) * rng.randint(1, 8), "max_tokens": rng.randint(1, 64)}
    body |= {"stream": True, "seed": rng.randrange(2**31), "temperature": rng.choice([0, 0.8])}
    kind = rng.random()
    if kind < 0.1:
        body |= {"structured_outputs": {"json": SCHEMA}, "max_tokens": 48}
    elif kind < 0.2:
        body |= {"n": 2, "logprobs": 3}
    leaves_after = rng.randint(1, 5) if 0.2 <= kind < 0.3 else None
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        started = time.perf_counter()
        writer.write(request_bytes("POST", "/v1/completions", json.dumps(body).encode()))
        status = (await reader.readline()).split()[1].decode()
        return status if status != "200" else await read_events(load, reader, started, leaves_after)
    finally:
        writer.close()


async def read_events(load: Load, reader: asyncio.StreamReader, started: float, leaves_after: int | None) -> str:
    count = 0
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return "done"
        if not line.startswith(b"data: "):
            continue
        if b'"error"' in line:
            return f"error event {line[:200]!r}"
        count += 1
        load.events += 1
        if count == 1:
            load.ttft_s.append(time.perf_counter() - started)
        if count == leaves_after:
            return "left"
    return "cut off"


async def ask_health(port: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes("GET", "/health", b""))
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def request_bytes(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def summary(load: Load, clients: int, minutes: float) -> dict[str, Any]:
    """Return the figures of one run."""
    tenth = max(1, len(load.rss_bytes) // 10)
    early, late = statistics.median(load.rss_bytes[tenth : 2 * tenth] or load.rss_bytes), statistics.median(load.rss_bytes[-tenth:])
    waits = sorted(load.ttft_s) or [float("nan")]
    return {
        "minutes": minutes,
        "clients": clients,
        "ends": dict(load.ends),
        "events_per_s": round(load.events / (60 * minutes), 1),
        "ttft_p50_s": round(waits[len(waits) // 2], 4),
        "ttft_p99_s": round(waits[int(0.99 * (len(waits) - 1))], 4),
        "rss_early_mb": round(early / 1e6, 1),
        "rss_late_mb": round(late / 1e6, 1),
        "rss_most_mb": round(max(load.rss_bytes) / 1e6, 1),
        "rss_growth": round(late / early, 4),
    }


if __name__ == "__main__":
    sys.exit(main())
