"""What does a step that checks guesses cost beside one that gives a single token, and what does prompt lookup give?

A random 124 M decoder on the runner that the command line would choose, one request. First the time of a step that checks k guesses,
in turn with plain steps: a step pays when it gives more tokens than it costs plain ones. Then greedy answers to a prompt that repeats
itself, with and without prompt lookup, the tokens compared. How often guesses are right depends on model and text, which random
weights say nothing about: this answer falls into a loop, the best case. Writes benchmarks/records/speculative.json; takes a minute.
"""

from __future__ import annotations

import random
import statistics
import time

import torch

from plinth.inference.engine import Engine
from plinth.inference.runners import make_runner
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.speculative import Speculation
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from record import spread, write_record

SHAPE = {"vocab_size": 50_304, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12, "head_dim": 64}
GUESSES = (1, 2, 4, 8, 15)


class Wrong:
    """Guesses a token that is never drawn, `count` of them at every other step."""

    def __init__(self, count: int):
        self.count, self.is_plain = count, True

    def propose(self, tokens, count):
        self.is_plain = not self.is_plain
        return [] if self.is_plain else [7] * self.count

    def observe(self, proposed, accepted):
        assert accepted == 0


def main() -> None:
    config = DecoderConfig(**SHAPE, intermediate_size=2048, max_seq_len=512)
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config).init_weights(generator).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    engine = Engine(make_runner(model), max_batch=2)
    draw = random.Random(0)
    rows = []
    for count in GUESSES:
        rows.append(check_cost(engine, [draw.randrange(config.vocab_size) for _ in range(32)], count))
        print(rows[-1], flush=True)
    rows.append(lookup(engine, [draw.randrange(config.vocab_size) for _ in range(8)] * 4))
    print(rows[-1], flush=True)
    write_record(
        "speculative", "What does checking guesses cost, and what does prompt lookup give?", rows, runner=type(engine.runner).__name__
    )


def check_cost(engine: Engine, prompt: list[int], count: int) -> dict:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logit_bias={7: -1e4})
    drafter = Wrong(count)
    request = engine.add(prompt, params, None, drafter)
    engine.step()
    times: dict[bool, list[float]] = {True: [], False: []}
    while engine.num_active:
        started = time.perf_counter()
        engine.step()
        times[drafter.is_plain].append((time.perf_counter() - started) * 1e3)
    engine.cancel(request)
    plain, checked = spread(times[True][1:]), spread(times[False][1:])
    return {"guesses": count, "plain_ms": plain, "checked_ms": checked, "costs_tokens": checked["median"] / plain["median"]}


def lookup(engine: Engine, prompt: list[int]) -> dict:
    params, rates, tokens = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True), {True: [], False: []}, {}
    for _ in range(3):
        for guessing in (False, True):
            engine.drafting = Speculation().drafter if guessing else None
            before, started = engine.counters.drafted, time.perf_counter()
            accepted = engine.counters.accepted
            tokens[guessing] = engine.generate([prompt], params)[0].tokens
            rates[guessing].append(100 / (time.perf_counter() - started))
            share = (engine.counters.accepted - accepted) / max(1, engine.counters.drafted - before)
    engine.drafting = None
    plain, guessed = statistics.median(rates[False]), statistics.median(rates[True])
    facts = {"acceptance": share, "same_tokens": tokens[True] == tokens[False], "speed_up": guessed / plain}
    return {"lookup": "greedy answer", "plain_tokens_per_s": spread(rates[False]), "guessed_tokens_per_s": spread(rates[True]), **facts}


if __name__ == "__main__":
    main()
