"""What does each format of the weights give in speed and memory, and what does it cost in loss?

Speed: greedy decoding by the engine behind prompts of 32 tokens, random decoders of 25 M and 124 M parameters, medians over rounds in
which the formats alternate. Loss: a trained model (--model) reads a text (--text) in windows of its context; beside the loss, the
divergence of the next token's distribution from that in fp32 and how often the most probable token is the same. Writes
benchmarks/records/weight_formats.json; takes two minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from plinth.inference.engine import Engine
from plinth.inference.native_runner import NativeRunner
from plinth.inference.runner import BLOCK_TOKENS, Rows, Runner
from plinth.inference.runners import make_runner
from plinth.inference.sampling import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer
from record import spread, write_record

SIZES = {
    "25M": DecoderConfig(vocab_size=32_000, hidden_size=384, num_layers=7, num_heads=6, num_kv_heads=6, intermediate_size=1024),
    "124M": DecoderConfig(vocab_size=50_304, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, intermediate_size=2048),
}
FORMATS = ("fp32", "bf16", "int8", "int4")
BATCHES = (1, 2, 4, 8, 16)
PROMPT_TOKENS = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="trained model for the loss, such as the base model of `make demo`; none: speed only")
    parser.add_argument("--text", type=Path, nargs="+", help="files that it reads; default: some of Python's standard library")
    parser.add_argument("--rounds", type=int, default=3, help="measurements a figure")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a measurement, for each sequence")
    arguments = parser.parse_args()
    rows = [row for size in SIZES for threads in (1, 2) for row in speeds(size, threads, arguments.rounds, arguments.tokens)]
    losses = measure_losses(arguments.model, arguments.text or library_texts()) if arguments.model else None
    print(write_record("weight_formats", __doc__.splitlines()[0], rows, losses=losses))
    return 0


def speeds(size: str, threads: int, rounds: int, tokens: int) -> list[dict]:
    """Return one row a format: memory, and tokens a second by batch."""
    torch.set_num_threads(threads)
    model = Transformer(SIZES[size]).init_weights(torch.Generator().manual_seed(0)).eval()
    engines = {name: Engine(NativeRunner(model, name), max_batch=max(BATCHES)) for name in FORMATS[1:]}
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            for batch in BATCHES if turn else (1,):  # the first turn warms up
                elapsed = timed(engine, batch, tokens)
                if turn:
                    seconds.setdefault((name, batch), []).append(elapsed)
    rows = []
    for name, engine in engines.items():
        rates = {str(batch): spread([batch / s for s in seconds[name, batch]]) for batch in BATCHES}
        rows.append({"size": size, "threads": threads, "format": name, "weight_bytes": engine.runner.weight_bytes, "tokens_per_s": rates})
        print(size, threads, name, {batch: round(rate["median"], 1) for batch, rate in rates.items()}, file=sys.stderr, flush=True)
    return rows


def timed(engine: Engine, batch: int, tokens: int) -> float:
    """Return the seconds of a step in which `batch` sequences get a token each, all prompts read before."""
    generator = torch.Generator().manual_seed(0)
    for prompt in torch.randint(engine.vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist():
        engine.add(prompt, SamplingParams(temperature=0, max_tokens=tokens + 8, ignore_eos=True))
    started = set()
    while len(started) < batch:
        started |= {event.id for event in engine.step()}
    began, steps = time.perf_counter(), tokens
    for _ in range(steps):
        engine.step()
    elapsed = time.perf_counter() - began
    while engine.num_active:
        engine.step()
    return elapsed / steps


def library_texts() -> list[Path]:
    return [Path(sys.modules["argparse"].__file__).with_name(f"{name}.py") for name in ("fractions", "gzip", "heapq", "imaplib", "inspect")]


def measure_losses(path: Path, texts: list[Path]) -> dict:
    """Return loss, divergence and agreement of each format on the texts, over windows of the model's context."""
    folder = find_model(path)
    model, tokenizer = load_decoder(folder, dtype=torch.float32).eval(), Tokenizer.load(folder)
    length = min(model.config.max_seq_len, 256)
    ids = tokenizer.encode("\n".join(text.read_text() for text in texts))
    windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:100]
    found: dict[str, list[torch.Tensor]] = {}
    for name in FORMATS:
        runner = make_runner(model, name)
        runner.allocate(-(-length // BLOCK_TOKENS))
        found[name] = [logprobs(runner, window) for window in windows]
    rows = [{"format": name, **compared(found[name], found["fp32"], windows)} for name in FORMATS]
    for row in rows:
        print(row, file=sys.stderr)
    return {
        "rows": rows,
        "tokens": len(windows) * (length - 1),
        "hidden_size": model.config.hidden_size,
        "num_layers": model.config.num_layers,
    }


def logprobs(runner: Runner, tokens: list[int]) -> torch.Tensor:
    """Return log-probabilities of the next token at every place, (T, V)."""
    count = len(tokens)
    places, table = np.arange(count, dtype=np.int32), np.arange(-(-count // BLOCK_TOKENS), dtype=np.int32)[None]
    rows = Rows(np.array(tokens, np.int32), places, np.zeros(count, np.int32), table, places, np.ones(count, bool))
    return runner.forward(rows).log_softmax(-1)


def compared(found: list[torch.Tensor], exact: list[torch.Tensor], windows: list[list[int]]) -> dict:
    nats = [-a[:-1].gather(1, torch.tensor(window)[1:, None]).mean() for a, window in zip(found, windows)]
    divergence = [(b.exp() * (b - a)).sum(-1).mean() for a, b in zip(found, exact)]
    same = [(a.argmax(-1) == b.argmax(-1)).float().mean() for a, b in zip(found, exact)]
    loss, kl, share = (torch.stack(values).mean().item() for values in (nats, divergence, same))
    return {"loss_nats": loss, "divergence_nats": kl, "same_first_token": share}


if __name__ == "__main__":
    raise SystemExit(main())
