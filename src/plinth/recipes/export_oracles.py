"""Logits of an exported model by the program that it was exported for: a script for a process, or an environment, of its own.

`python export_oracles.py` reads {"program", "path", "rows", "texts"} on standard input and writes {"logits": file, "ids"} or {"missing"}
on standard output. It imports nothing of Plinth: a peer may want libraries of other ages, and may crash without taking the export along.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from typing import Any

import numpy as np


def llama_cpp_answers(path: str, rows: list[list[int]], texts: list[str]) -> tuple[np.ndarray, list[list[int]]]:
    """Return the logits (rows, T, V) of token rows of equal length, and the ids of texts, by llama.cpp with an fp32 cache."""
    lib: Any = importlib.import_module("llama_cpp.llama_cpp")
    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model_params, params = lib.llama_model_default_params(), lib.llama_context_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = False  # repacked weights crash on some processors with AMX
    params.n_ctx = params.n_batch = params.n_ubatch = len(rows[0])
    params.n_outputs_max = len(rows[0])
    params.type_k = params.type_v = 0  # fp32
    params.flash_attn_type = 0
    model = lib.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    vocab, context = lib.llama_model_get_vocab(model), lib.llama_init_from_model(model, params)
    logits = np.stack([_llama_row(lib, context, row, lib.llama_vocab_n_tokens(vocab)) for row in rows])
    return logits, [_llama_tokens(lib, vocab, text.encode()) for text in texts]


def _llama_row(lib: Any, context: Any, row: list[int], vocab_size: int) -> np.ndarray:
    batch = lib.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for i, token in enumerate(row):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    if lib.llama_decode(context, batch):
        raise SystemExit("llama.cpp failed to decode")
    return np.ctypeslib.as_array(lib.llama_get_logits(context), shape=(len(row), vocab_size)).copy()


def _llama_tokens(lib: Any, vocab: Any, text: bytes) -> list[int]:
    room = (lib.llama_token * (len(text) + 8))()
    return list(room[: lib.llama_tokenize(vocab, text, len(text), room, len(room), False, False)])


def transformers_answers(path: str, rows: list[list[int]], texts: list[str]) -> tuple[np.ndarray, list[list[int]]]:
    """Return the logits (rows, T, V) in fp32 arithmetic, and the ids of texts, by transformers."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(rows)).logits
    if not texts:
        return logits.numpy(), []
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return logits.numpy(), [tokenizer.encode(text, add_special_tokens=False) for text in texts]


ANSWERS = {"llama_cpp": llama_cpp_answers, "transformers": transformers_answers}


def main() -> int:
    question = json.load(sys.stdin)
    try:
        version = getattr(importlib.import_module(question["program"]), "__version__", "")
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return 0
    logits, ids = ANSWERS[question["program"]](question["path"], question["rows"], question["texts"])
    np.save(question["logits"], logits.astype(np.float32))
    print(json.dumps({"version": version, "ids": ids}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
