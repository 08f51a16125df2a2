"""What does the engine itself cost, and what does it save?

Three questions, each answered on one thread:
- the time of a step with a runner that gives prepared logits at once: all that is the engine's own, sampling among it;
- the time to the first token of a prompt whose first 1024 tokens were read before, against one that is new, both in turn;
- the time of sixteen completions of one 512-token prompt together, against sixteen prompts of that length.

The model is a random 25 M decoder on the runner that the command line would choose. Writes benchmarks/records/engine_steps.json;
takes half a minute.
"""

from __future__ import annotations

import time

import torch

from plinth.inference.engine import Engine
from plinth.inference.runners import make_runner
from plinth.inference.sampling_params import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from record import spread, write_record

VOCAB, CONTEXT = 32000, 2048
GREEDY, DRAWN = SamplingParams(temperature=0, max_tokens=400), SamplingParams(seed=1, max_tokens=400)
FIRST = SamplingParams(temperature=0, max_tokens=1)


class PreparedLogits:
    """A runner without a model."""

    vocab_size, max_seq_len, device, uniform = VOCAB, CONTEXT, torch.device("cpu"), True

    def __init__(self):
        self.logits_MV = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0))

    def allocate(self, num_blocks):
        pass

    def block_bytes(self):
        return 1

    def forward(self, rows):
        return self.logits_MV[: len(rows.wanted)]

    def copy_blocks(self, pairs):
        pass


def step_times(batch: int, params: SamplingParams) -> list[float]:
    """Return the seconds of each of 300 steps in which `batch` requests decode."""
    engine = Engine(PreparedLogits(), max_batch=batch)
    for i in range(batch):
        engine.add(list(range(i, i + 40)), params)
    return [timed(engine.step) for _ in range(305)][5:]


def timed(work, *arguments) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def random_model() -> Transformer:
    heads = {"num_heads": 6, "num_kv_heads": 6, "head_dim": 64}
    config = DecoderConfig(VOCAB, hidden_size=384, num_layers=7, intermediate_size=1024, max_seq_len=CONTEXT, **heads)
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def hits_and_misses(engine: Engine, repeats: int) -> tuple[list[float], list[float]]:
    """Return the seconds to the first token behind a known prefix of 1024 tokens, and behind one that is new."""
    known = prompts(1, 1024, seed=1)[0]
    engine.generate([known + [1]], FIRST)
    hits, misses = [], []
    for new, end in zip(prompts(repeats, 1024, seed=2), prompts(repeats, 16, seed=3)):
        hits.append(timed(engine.generate, [known + end], FIRST))
        misses.append(timed(engine.generate, [new + end], FIRST))
    return hits, misses


def shared_and_separate(engine: Engine, repeats: int) -> tuple[list[float], list[float]]:
    """Return the seconds of sixteen one-token completions of one prompt, and of sixteen prompts; of reading, that is."""
    shared, separate = [], []
    for i in range(repeats):
        many = prompts(17, 512, seed=10 + i)
        shared.append(timed(engine.generate, [many[16]] * 16, FIRST))
        separate.append(timed(engine.generate, many[:16], FIRST))
    return shared, separate


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for batch in (1, 16):
        for name, params in (("greedy", GREEDY), ("drawn", DRAWN)):
            rows.append({"what": f"a step without a model, {name}, batch {batch}", "time_s": spread(step_times(batch, params))})
    runner = make_runner(random_model())
    engine = Engine(runner, max_batch=16)
    hits, misses = hits_and_misses(engine, repeats=7)
    shared, separate = shared_and_separate(engine, repeats=3)
    rows.append({"what": "first token behind 1024 known tokens and 16 new ones", "time_s": spread(hits)})
    rows.append({"what": "first token behind 1040 new tokens", "time_s": spread(misses)})
    rows.append({"what": "sixteen first tokens behind one prompt of 512", "time_s": spread(shared)})
    rows.append({"what": "sixteen first tokens behind prompts of 512 of their own", "time_s": spread(separate)})
    for row in rows:
        print(f"{row['time_s']['median'] * 1e3:9.3f} ms  {row['what']}")
    ratios = {"hit_over_miss": rows[4]["time_s"]["median"] / rows[5]["time_s"]["median"]}
    ratios["shared_over_separate"] = rows[6]["time_s"]["median"] / rows[7]["time_s"]["median"]
    print(ratios)
    write_record("engine_steps", __doc__.splitlines()[0], rows, ratios=ratios, runner=type(runner).__name__, threads=1)


if __name__ == "__main__":
    main()
