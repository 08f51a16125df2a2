"""Answers kept on disk: the same question, to the same weights, decoded the same way, is computed once.

A key covers all that an answer depends on: the weights and their format, the tokenizer, the prompt's tokens, every decoding
parameter, and ANSWER_VERSION. Only answers that would come out the same again are kept: greedy ones and seeded ones, without a
grammar. What is kept is the tokens as the engine gave them, so that a kept answer passes through the same code as a new one.

By option a prompt that only resembles an earlier one takes its answer. That can be wrong; benchmarks/answer_cache.py measures how often.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from plinth.config import UserError
from plinth.inference.request import Event
from plinth.inference.sampling_params import SamplingParams

ANSWER_VERSION = 1  # raise it when the engine's arithmetic or sampling changes what an answer is
DEFAULT_MAX_BYTES = 256 * 2**20
SKETCH_SIZE = 2048
SCHEMA = """
create table if not exists answers (key text primary key, likeness_key text, sketch blob, tokens text, bytes integer, used_s real);
create index if not exists by_likeness on answers (likeness_key);
create index if not exists by_use on answers (used_s);
"""


class AnswerCache:
    """Answers in one SQLite file, which several processes may share.

    identity: what answers depend on beside the request, such as the hashes of weights and tokenizer. max_bytes: of tokens kept;
    beyond it the answers that were used longest ago go. min_likeness: cosine (0 to 1) of prompts from which one takes the
    other's answer; None = only equal prompts. Raises UserError when the file is no such cache.
    """

    def __init__(
        self, path: Path | str, identity: Mapping[str, Any], *, max_bytes: int = DEFAULT_MAX_BYTES, min_likeness: float | None = None
    ):
        if max_bytes < 1:
            raise UserError(f"max_bytes={max_bytes} must be at least 1.")
        if min_likeness is not None and not 0 < min_likeness <= 1:
            raise UserError(f"min_likeness={min_likeness} is not above 0 and at most 1. Use None for equal prompts only.")
        self._identity = json.dumps([ANSWER_VERSION, dict(identity)], sort_keys=True)
        self._max_bytes, self._min_likeness = max_bytes, min_likeness
        self.exact_hits = self.like_hits = self.misses = 0
        try:
            self._store = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
            self._store.execute("pragma journal_mode=wal")
            self._store.execute("pragma synchronous=normal")
            self._store.executescript(SCHEMA)
            self._store.execute("select key, likeness_key, sketch, tokens, bytes, used_s from answers limit 1")
        except sqlite3.Error as error:
            raise UserError(f"{path} is no cache of answers ({error}). Name another file, or remove this one.") from None

    def key(self, prompt: Sequence[int], params: SamplingParams) -> str | None:
        """Return what stands for a request, or None for one whose answer would differ each time."""
        if params.temperature > 0 and params.seed is None:
            return None
        return self._digest([list(map(int, prompt)), *self._decoding(params)])

    def _decoding(self, params: SamplingParams) -> list[Any]:
        values = asdict(params) | ({"seed": None} if params.temperature == 0 else {})
        return [sorted((name, str(value)) for name, value in values.items())]

    def _digest(self, values: list[Any]) -> str:
        return hashlib.sha256(json.dumps([self._identity, *values]).encode()).hexdigest()

    def get(self, prompt: Sequence[int], params: SamplingParams) -> list[Event] | None:
        """Return the events of a kept answer, with id -1, or None."""
        key = self.key(prompt, params)
        if key is None:
            return None
        row = self._store.execute("select key, tokens from answers where key = ?", (key,)).fetchone()
        self.exact_hits += row is not None
        if row is None and self._min_likeness is not None:
            row = self._most_alike(prompt, params)
            self.like_hits += row is not None
        if row is None:
            self.misses += 1
            return None
        self._store.execute("update answers set used_s = ? where key = ?", (time.time(), row[0]))
        return [Event(-1, token, logprob, [tuple(pair) for pair in top], reason) for token, logprob, top, reason in json.loads(row[1])]

    def _most_alike(self, prompt: Sequence[int], params: SamplingParams) -> tuple[str, str] | None:
        likeness_key = self._digest(self._decoding(params))
        rows = self._store.execute("select key, sketch from answers where likeness_key = ?", (likeness_key,)).fetchall()
        if not rows:
            return None
        sketches = np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(len(rows), SKETCH_SIZE)
        likeness = sketches @ sketch(prompt)
        best = int(likeness.argmax())
        if likeness[best] < (self._min_likeness or 1):
            return None
        return self._store.execute("select key, tokens from answers where key = ?", (rows[best][0],)).fetchone()

    def put(self, prompt: Sequence[int], params: SamplingParams, events: Sequence[Event]) -> None:
        """Keep a finished answer; one that would differ each time is not kept."""
        key = self.key(prompt, params)
        if key is None:
            return
        tokens = json.dumps([[event.token, event.logprob, event.top_logprobs, event.finish_reason] for event in events])
        likeness_key, likeness = None, None
        if self._min_likeness is not None:
            likeness_key, likeness = self._digest(self._decoding(params)), sketch(prompt).tobytes()
        size = len(tokens) + len(likeness or b"")
        if size > self._max_bytes:
            return
        with self._store:
            self._store.execute("begin immediate")
            row = (key, likeness_key, likeness, tokens, size, time.time())
            self._store.execute("insert or replace into answers values (?, ?, ?, ?, ?, ?)", row)
            self._shrink()

    def _shrink(self) -> None:
        total = self._store.execute("select coalesce(sum(bytes), 0) from answers").fetchone()[0]
        while total > self._max_bytes:
            key, size = self._store.execute("select key, bytes from answers order by used_s, rowid limit 1").fetchone()
            self._store.execute("delete from answers where key = ?", (key,))
            total -= size

    def __len__(self) -> int:
        return self._store.execute("select count(*) from answers").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._store.close()


def sketch(prompt: Sequence[int]) -> np.ndarray:
    """Return a prompt's hashed counts of runs of one to three tokens, scaled to length 1, float32 (SKETCH_SIZE,)."""
    counts = np.zeros(SKETCH_SIZE, np.float32)
    for length in (1, 2, 3):
        for start in range(len(prompt) - length + 1):
            run = np.array(prompt[start : start + length], np.int64).tobytes()
            counts[int.from_bytes(hashlib.blake2b(run, digest_size=4).digest(), "little") % SKETCH_SIZE] += 1.0
    return counts / max(float(np.linalg.norm(counts)), 1e-30)
