"""Answers of a model by another program that reads it: a script for a process, or an environment, of its own.

`python export_oracles.py` reads {"program", "path", "inputs": file, "output", "texts", "answer": file} on standard input, writes the
answer to its file and {"version", "ids"} or {"missing"} to standard output. It imports nothing of Plinth: a peer may want libraries of
other ages, and may crash without taking the export along.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from typing import Any

import numpy as np

Answer = tuple[np.ndarray, list[list[int]]]


def llama_cpp_answers(path: str, inputs: dict[str, np.ndarray], output: str, texts: list[str]) -> Answer:
    """Return the logits (rows, T, V) of token rows of equal length, and the ids of texts, by llama.cpp with an fp32 cache."""
    rows = inputs["input_ids"].tolist()
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


def transformers_answers(path: str, inputs: dict[str, np.ndarray], output: str, texts: list[str]) -> Answer:
    """Return a field of the model's answer in fp32 arithmetic, and the ids of texts, by transformers."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(path)
    names = [name for name in config.architectures or [] if hasattr(transformers, name)]
    kind = getattr(transformers, names[0] if names else "AutoModelForCausalLM")
    model = kind.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = getattr(model(**{name: torch.from_numpy(array) for name, array in inputs.items()}), output)
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
    with np.load(question["inputs"]) as file:
        inputs = dict(file)
    answer, ids = ANSWERS[question["program"]](question["path"], inputs, question["output"], question["texts"])
    np.save(question["answer"], answer.astype(np.float32))
    print(json.dumps({"version": version, "ids": ids}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
