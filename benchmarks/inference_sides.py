"""The sides of inference_peers.py that run under this interpreter: Plinth's engine and transformers, each in a process of its own.

    python benchmarks/inference_sides.py plinth-bf16|plinth-int8|plinth-int4|transformers-bf16 FOLDER THREADS

Reads one JSON object a line, a workload, and answers each with {"tokens", "seconds", ...}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

CONTEXT = 1024
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}}},
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 50}


class Plinth:
    """The engine on the native runner, as `plinth serve` runs it."""

    def __init__(self, folder: Path, weights: str, threads: int):
        from plinth.inference.engine import Engine
        from plinth.inference.native_runner import NativeRunner
        from plinth.models.hub import load_decoder

        self.folder = folder
        self.runner = NativeRunner(load_decoder(folder), weights, num_threads=threads)
        self.engine = Engine(self.runner, max_batch=16, max_seq_len=CONTEXT)

    def run(self, work: dict[str, Any]) -> dict[str, Any]:
        if "bandwidth" in work:
            return self.bandwidth()
        if "beams" in work:
            return self.beam(work)
        if "samples" in work:
            return self.samples(work)
        if "schema" in work:
            return self.constrained(work)
        return self.tokens(work["prompts"], work["new"])

    def tokens(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Time reading the prompts (new == 1), or all tokens but each prompt's first."""
        from plinth.inference.sampling_params import SamplingParams

        engine = self.engine
        engine.forget_prefixes()
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        started = time.perf_counter()
        ids = [engine.add(prompt, params) for prompt in prompts]
        begun: set[int] = set()
        while len(begun) < len(ids):
            begun |= {event.id for event in engine.step()}
        if new == 1:
            return {"tokens": sum(map(len, prompts)), "seconds": time.perf_counter() - started}
        started, count = time.perf_counter(), 0
        while engine.num_active:
            count += len(engine.step())
        return {"tokens": count, "seconds": time.perf_counter() - started}

    def samples(self, work: dict[str, Any]) -> dict[str, Any]:
        """Time drawing completions of one prompt: together, or one call after another, each reading the prompt."""
        from plinth.inference.sampling_params import SamplingParams

        engine, count = self.engine, work["samples"]
        params = [SamplingParams(seed=i, max_tokens=work["new"], ignore_eos=True) for i in range(count)]
        engine.forget_prefixes()
        started = time.perf_counter()
        if work["together"]:
            engine.generate([work["prompts"][0]] * count, params)
        else:
            for each in params:
                engine.forget_prefixes()
                engine.generate([work["prompts"][0]], each)
        return {"tokens": count * work["new"], "seconds": time.perf_counter() - started}

    def constrained(self, work: dict[str, Any]) -> dict[str, Any]:
        """Time drawing a completion under a JSON schema or without it; then each mask of it on its own."""
        from plinth.inference.grammar import Grammar
        from plinth.inference.grammar_constraint import GrammarCompiler
        from plinth.inference.sampling_params import SamplingParams
        from plinth.tokenizer.encode import Tokenizer

        if not hasattr(self, "compiler"):
            self.compiler = GrammarCompiler(Tokenizer.load(self.folder), self.engine.vocab_size, (0,))
        grammar = Grammar.json_schema(SCHEMA)
        constraint = self.compiler.start(grammar) if work["schema"] else None
        self.engine.forget_prefixes()
        self.engine.add(
            work["prompts"][0], SamplingParams(seed=work["seed"], max_tokens=work["new"], ignore_eos=not work["schema"]), constraint
        )
        events = []
        while not events:
            events = self.engine.step()
        started, first = time.perf_counter(), len(events)
        while self.engine.num_active:
            events += self.engine.step()
        seconds, masks = time.perf_counter() - started, []
        state = self.compiler.start(grammar)
        for event in events if work["schema"] else ():
            begun = time.perf_counter()
            state.allowed()
            masks.append(time.perf_counter() - begun)
            state.advance(event.token)
        return {"tokens": len(events) - first, "seconds": seconds, **({"masks_s": masks} if masks else {})}

    def beam(self, work: dict[str, Any]) -> dict[str, Any]:
        from plinth.inference.beam import BeamParams, beam_search

        self.engine.forget_prefixes()
        started = time.perf_counter()
        with self.engine.search() as space:
            found = beam_search(space, work["prompts"], BeamParams(num_beams=work["beams"], max_tokens=work["new"]))
        return {"tokens": work["new"], "seconds": time.perf_counter() - started, "ids": list(found[0][0].tokens)}

    def bandwidth(self) -> dict[str, Any]:
        """Time reading as many bytes as a token reads, from memory that holds nothing else."""
        from plinth.ops import kernels

        size, threads = self.runner.weight_bytes, self.runner.num_threads
        memory = torch.ones(size, dtype=torch.uint8)
        started = time.perf_counter()
        for i in range(9):
            if i == 1:  # the first one warms up
                started = time.perf_counter()
            kernels.call("read_memory", memory.data_ptr(), size, threads)
        return {"tokens": 8, "seconds": time.perf_counter() - started, "weight_bytes": size}


class Transformers:
    """transformers' generate with its defaults, greedy, in bf16."""

    def __init__(self, folder: Path, dtype: torch.dtype, threads: int):
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def generate(self, prompts: list[list[int]], new: int, **options: Any) -> tuple[float, torch.Tensor]:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
        )
        return time.perf_counter() - started, out

    def run(self, work: dict[str, Any]) -> dict[str, Any]:
        prompts, new = work["prompts"], work["new"]
        if "beams" in work:
            seconds, out = self.generate(prompts, new, num_beams=work["beams"])
            return {"tokens": new, "seconds": seconds, "ids": out[0, len(prompts[0]) :].tolist()}
        reading = self.generate(prompts, 1)[0]
        if new == 1:
            return {"tokens": sum(map(len, prompts)), "seconds": reading}
        return {"tokens": (new - 1) * len(prompts), "seconds": self.generate(prompts, new)[0] - reading}


def make(side: str, folder: Path, threads: int) -> Plinth | Transformers:
    name, _, weights = side.partition("-")
    if name == "plinth":
        return Plinth(folder, weights, threads)
    return Transformers(folder, {"bf16": torch.bfloat16, "fp32": torch.float32}[weights], threads)


def main() -> None:
    side, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    worker = make(side, folder, threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
