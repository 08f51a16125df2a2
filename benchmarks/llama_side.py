"""llama.cpp's side of inference_peers.py: runs under the interpreter of an environment that has llama-cpp-python, knows nothing of Plinth.

    python benchmarks/llama_side.py FILE.gguf THREADS

Reads one JSON object a line, a workload, and answers each with {"tokens", "seconds"}. Plain calls of the library, tokens chosen by its own
greedy sampler, so that nothing of Python's bindings is in the time but one call a step.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp.llama_cpp as lib

CONTEXT = 1024


class Side:
    def __init__(self, path: str, threads: int):
        self.silent = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self.silent, ctypes.c_void_p(0))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        # Repacked weights (AMX) end the process on some virtual machines when they are quantised.
        params.use_extra_bufts = "BF16" in path and not os.environ.get("LLAMA_NO_REPACK")
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.threads, self.contexts = threads, {}
        self.sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(self.sampler, lib.llama_sampler_init_greedy())

    def context(self, sequences: int, flash: bool, ubatch: int) -> Any:
        """Return a context, made once for each setting."""
        key = (sequences, flash, ubatch)
        if key not in self.contexts:
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, CONTEXT, ubatch, sequences
            params.n_threads = params.n_threads_batch = self.threads
            params.flash_attn_type = int(flash)
            params.kv_unified = True
            self.contexts[key] = lib.llama_init_from_model(self.model, params), lib.llama_batch_init(CONTEXT, 0, sequences)
        return self.contexts[key]

    def put(self, batch: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, position, 1, sequence, wanted

    def run(self, work: dict[str, Any]) -> dict[str, float]:
        prompts, new = work["prompts"], work["new"]
        context, batch = self.context(len(prompts), work.get("flash", False), work.get("ubatch", 512))
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        started = time.perf_counter()
        self.put(batch, [(t, p, s, p == len(row) - 1) for s, row in enumerate(prompts) for p, t in enumerate(row)])
        check(lib.llama_decode(context, batch))
        ends = [sum(map(len, prompts[: i + 1])) - 1 for i in range(len(prompts))]
        tokens = [lib.llama_sampler_sample(self.sampler, context, end) for end in ends]
        if new == 1:
            return {"tokens": sum(map(len, prompts)), "seconds": time.perf_counter() - started}
        started = time.perf_counter()
        for step in range(new - 1):
            self.put(batch, [(t, len(prompts[s]) + step, s, True) for s, t in enumerate(tokens)])
            check(lib.llama_decode(context, batch))
            tokens = [lib.llama_sampler_sample(self.sampler, context, s) for s in range(len(tokens))]
        return {"tokens": (new - 1) * len(prompts), "seconds": time.perf_counter() - started}


def check(code: int) -> None:
    if code:
        raise SystemExit(f"llama_decode returned {code}")


def main() -> None:
    side = Side(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"ready": True, "version": lib.__name__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(side.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
