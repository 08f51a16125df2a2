"""How many tokens a second does the engine give, and what does its batch invariance cost?

A random 6-layer decoder, 256 wide, vocabulary 4096: greedy and sampled decoding at batches of 1, 16 and 64 behind
20-token prompts, reading prompts, and a stand-in for an evaluation (200 prompts of 20 tokens, 20 tokens each). Each
figure alternates between the engine as it is and the same engine with plain linear layers, whose results depend on the
batch. Prints one JSON record; takes one to three minutes. --cpu-time counts the process's CPU time, for a busy machine; use
it with one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import plinth.inference.engine
import plinth.inference.torch_runner
import plinth.models.attention
import plinth.models.mlp
import plinth.models.transformer
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.linear import linear_rows, pad_rows
from plinth.run import describe_hardware, installed_versions

PROMPT_TOKENS, COMPLETION_TOKENS = 20, 40
LINEAR_USERS = (plinth.models.attention, plinth.models.mlp, plinth.models.transformer)
PADDING_USERS = (plinth.inference.torch_runner,)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    parser.add_argument("--repeats", type=int, default=5, help="measurements a figure; the best counts")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time instead of wall time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(dtype)
        for name, prompts, params in workloads():
            engine = Engine(model, max_batch=min(64, len(prompts)), prefix_caching=False)  # each repeat reads its prompts
            rows.append(measure(name, dtype, engine, prompts, params, arguments.repeats, clock))
            print(rows[-1], file=sys.stderr, flush=True)
    record = {
        "question": "How many tokens a second does the engine give, and what does its batch invariance cost?",
        "value": {f"{row['dtype']} {row['workload']}": row["tokens_per_s"] for row in rows},
        "unit": "tokens a second" + (" of CPU time" if arguments.cpu_time else ""),
        "n": arguments.repeats,
        "spread": {f"{row['dtype']} {row['workload']}": row["spread"] for row in rows},
        "rows": rows,
        "threads": arguments.threads,
        "hardware": describe_hardware(),
        "versions": installed_versions(),
    }
    print(json.dumps(record))
    return 0


def random_model(dtype: torch.dtype) -> Transformer:
    config = DecoderConfig(vocab_size=4096, hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=4, head_dim=64, max_seq_len=512)
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5, generator=generator)
    return model.to(dtype).eval()


def workloads():
    """Yield (name, prompts, parameters); only the first token of `prefill` is generated."""
    generator = torch.Generator().manual_seed(1)

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(0, 4096, (count, length), generator=generator).tolist()

    greedy = SamplingParams(temperature=0, max_tokens=COMPLETION_TOKENS)
    for batch in (1, 16, 64):
        yield f"decode {batch}", prompts(batch, PROMPT_TOKENS), greedy
    yield "decode 64 sampled", prompts(64, PROMPT_TOKENS), SamplingParams(seed=1, max_tokens=COMPLETION_TOKENS)
    yield "decode 64 top_p", prompts(64, PROMPT_TOKENS), SamplingParams(seed=1, top_p=0.9, max_tokens=COMPLETION_TOKENS)
    yield "prefill 20", prompts(64, 20), SamplingParams(temperature=0, max_tokens=1)
    yield "prefill 256", prompts(16, 256), SamplingParams(temperature=0, max_tokens=1)
    yield "evaluation", prompts(200, PROMPT_TOKENS), SamplingParams(temperature=0, max_tokens=20)


def measure(name: str, dtype: torch.dtype, engine: Engine, prompts, params, repeats: int, clock) -> dict:
    """Time one workload both ways in alternation; decode figures exclude the steps that read prompts."""
    repeats = 2 if name == "evaluation" else repeats
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for invariant in (True, False):
            use(invariant)
            tokens, elapsed = timed(name, engine, prompts, params, clock)
            if repeat:  # the first round warms up
                seconds[invariant].append(elapsed)
    use(True)
    best, plain = min(seconds[True]), min(seconds[False])
    return {
        "workload": name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "seconds": best,
        "tokens_per_s": round(tokens / best, 1),
        "spread": round(statistics.median(seconds[True]) / best - 1, 3),
        "plain_tokens_per_s": round(tokens / plain, 1),
        "cost_of_invariance": round(best / plain - 1, 3),
    }


def use(invariant: bool) -> None:
    """Switch between tiled linear layers and plain ones without filling."""
    for module in LINEAR_USERS:
        module.linear_rows = linear_rows if invariant else F.linear
    for module in PADDING_USERS:
        module.pad_rows = pad_rows if invariant else int


def timed(name: str, engine: Engine, prompts, params, clock) -> tuple[int, float]:
    """Return the tokens that count for this workload and the seconds they took."""
    for prompt in prompts:
        engine.add(prompt, params)
    tokens = sum(map(len, prompts)) if name.startswith("prefill") else 0
    if name.startswith("decode"):
        while len(engine._scheduler.decoding) < engine.num_active:
            engine.step()
    started = clock()
    while engine.num_active:
        count = len(engine.step())
        tokens += 0 if name.startswith("prefill") else count
    return tokens, clock() - started


if __name__ == "__main__":
    raise SystemExit(main())
