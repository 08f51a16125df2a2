"""How many tokens a second does the native runner give, and what share of the memory's rate is that?

Random decoders of 25 M (384 wide, 7 layers, vocabulary 32,000) and 124 M parameters (768, 12, 50,304) through the engine, greedy:
decoding at batches of 1 and 16 behind prompts of 32 tokens, and reading one prompt of 512. Decoding a lone sequence reads every weight
once, so its limit is the rate at which the same threads read as much memory and do nothing else; that rate is measured beside each
figure, in alternation. Writes benchmarks/records/decode_speed.json. Takes about a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from plinth.inference.engine import Engine
from plinth.inference.native_runner import NativeRunner
from plinth.inference.sampling_params import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.ops.roofline import read_bandwidth
from record import spread, write_record

SHAPES = {
    "25M": {"vocab_size": 32_000, "hidden_size": 384, "num_layers": 7, "num_heads": 6, "num_kv_heads": 6, "intermediate_size": 1024},
    "124M": {"vocab_size": 50_304, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12, "intermediate_size": 2048},
}
PROMPT_TOKENS, COMPLETION_TOKENS, LONG_PROMPT_TOKENS = 32, 32, 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--weights", nargs="+", default=["bf16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        model = random_model(size)
        for weights in arguments.weights:
            runner = NativeRunner(model, weights)
            engine = Engine(runner, max_batch=max(arguments.batches), max_seq_len=LONG_PROMPT_TOKENS + 1, prefix_caching=False)
            for threads in arguments.threads:
                runner.num_threads = threads
                torch.set_num_threads(threads)
                row = {"size": size, "weights": weights, "threads": threads, "weight_bytes": runner.weight_bytes}
                rows.append(row | measure(engine, arguments.batches, arguments.repeats))
                print(rows[-1], flush=True)
    write_record("decode_speed", "How many tokens a second does the native runner give, and what share of the memory's rate is that?", rows)
    return 0


def random_model(size: str) -> Transformer:
    model, generator = Transformer(DecoderConfig(max_seq_len=1024, **SHAPES[size])), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def measure(engine: Engine, batches: list[int], repeats: int) -> dict:
    """Return tokens a second of every batch and of the long prompt, and the share of the memory's rate that a lone sequence reaches."""
    runner = engine.runner
    rates: dict[str, list[float]] = {}
    for _ in range(repeats):
        for batch in batches:
            rates.setdefault(f"decode {batch}", []).append(decode_rate(engine, batch))
        rates.setdefault("prefill 512", []).append(prefill_rate(engine))
        rates.setdefault("read bytes", []).append(read_bandwidth(runner.weight_bytes, runner.num_threads, limit_s=0.2))
    result = {name: spread(values) for name, values in rates.items()}
    if 1 in batches:
        shares = [tokens * runner.weight_bytes / read for tokens, read in zip(rates["decode 1"], rates["read bytes"])]
        result["share of read rate"] = spread(shares)
    return result


def decode_rate(engine: Engine, batch: int) -> float:
    """Return tokens a second of the steps in which all requests decode: the median step's."""
    generator = torch.Generator().manual_seed(batch)
    for prompt in torch.randint(engine.vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist():
        engine.add(prompt, SamplingParams(temperature=0, max_tokens=COMPLETION_TOKENS))
    times_s = []
    while engine.num_active:
        started = time.perf_counter()
        events = engine.step()
        times_s += [time.perf_counter() - started] if len(events) == batch else []
    return batch / statistics.median(times_s[1:])


def prefill_rate(engine: Engine) -> float:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(engine.vocab_size, (LONG_PROMPT_TOKENS,), generator=generator).tolist()
    started = time.perf_counter()
    engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
    return LONG_PROMPT_TOKENS / (time.perf_counter() - started)


if __name__ == "__main__":
    raise SystemExit(main())
