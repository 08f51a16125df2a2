"""How much of JSON Schema is enforced, how right, and what does it cost?

Three sets: schemas of MaskBench's kinds, drawn by schema_set.py; with --suite the official JSON-Schema-Test-Suite (its folder
tests/draft2020-12, which lies in jsonschema's source archive: pip download --no-deps --no-binary jsonschema jsonschema==4.26.0);
with --schemas a folder of schemas without documents, which are compiled only. A document is walked token by token: the mask, the
document's own bit in it, the step; then the end's bit must agree with jsonschema's judgement. Labels come from the sets, confirmed
by plain jsonschema. Then hostile grammars, and the engine's tokens a second with a grammar and without, in turns.
Writes benchmarks/records/structured_output.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.grammar import Grammar
from plinth.inference.grammar_constraint import GrammarCompiler
from plinth.inference.runners import make_runner
from plinth.inference.sampling import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from record import write_record
from schema_set import Case, draw_cases

VOCAB_SIZE = 32_000
SHAPES = {  # Llama's shape: 25 M and 124 M parameters
    "25M": {"hidden_size": 384, "num_layers": 8, "num_heads": 6, "num_kv_heads": 6, "head_dim": 64, "intermediate_size": 1024},
    "124M": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12, "head_dim": 64, "intermediate_size": 2560},
}
RECORDS_SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
            "note": {"type": ["string", "null"], "maxLength": 200},
        },
        "required": ["name", "age", "tags", "note"],
        "additionalProperties": False,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, help="folder tests/draft2020-12 of the JSON-Schema-Test-Suite")
    parser.add_argument("--schemas", type=Path, help="folder of *.json schemas, compiled only")
    parser.add_argument("--cases", type=int, default=600, help="schemas drawn")
    parser.add_argument("--parts", nargs="*", default=["sets", "hostile", "cost"], help="what to measure")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="models of the cost part")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; made there when absent")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records", help="folder of the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tokenizer = load_tokenizer(arguments.tokenizer)
    rows: list[dict[str, Any]] = []
    if "sets" in arguments.parts:
        rows += set_rows(arguments, tokenizer)
    if "hostile" in arguments.parts:
        rows += hostile_rows(tokenizer)
    if "cost" in arguments.parts:
        for shape in arguments.shapes:
            rows += cost_rows(shape, tokenizer)
    path = write_record("structured_output", (__doc__ or "").splitlines()[0], rows, arguments.out, vocab_size=VOCAB_SIZE, threads=1)
    print(path)
    return 0


def load_tokenizer(folder: Path | None) -> Tokenizer:
    """Return a byte-level BPE of 32,000 tokens, trained on the standard library's sources."""
    if folder and (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    tokenizer = train_tokenizer((file.read_text(encoding="utf-8", errors="replace") for file in files), VOCAB_SIZE)
    if folder:
        tokenizer.save(folder)
    return tokenizer


def set_rows(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    sets = {"drawn": draw_cases(arguments.cases)}
    if arguments.suite:
        sets["test suite 2020-12"] = suite_cases(arguments.suite)
    if arguments.schemas:
        files = sorted(arguments.schemas.glob("*.json"))
        sets["configuration files"] = [Case(file.stem, json.loads(file.read_text()), []) for file in files]
    rows = []
    for name, cases in sets.items():
        for mode in ("strict", "lenient"):
            rows.append({"part": "sets", "set": name, "mode": mode} | measure_set(cases, mode, tokenizer))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def suite_cases(folder: Path) -> list[Case]:
    """Return the suite's groups; those that refer to documents elsewhere are left out."""
    groups = [(file.stem, group) for file in sorted(folder.glob("*.json")) for group in json.loads(file.read_text())]
    return [
        Case(stem, group["schema"], [(test["data"], test["valid"]) for test in group["tests"]])
        for stem, group in groups
        if "localhost" not in json.dumps(group["schema"])
    ]


def measure_set(cases: list[Case], mode: str, tokenizer: Tokenizer) -> dict[str, Any]:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, (tokenizer.end_of_text_id, tokenizer.end_id))
    first_ms, mask_us, compiled, right = [], [], 0, 0
    counts = dict.fromkeys(("valid accepted", "valid", "invalid rejected", "invalid"), 0)
    unsupported: dict[str, int] = {}
    for case in cases:
        started = time.perf_counter()
        try:
            grammar = Grammar.json_schema(case.schema, mode=mode)
            compiler.start(grammar)
        except UserError as error:
            first_ms.append(1e3 * (time.perf_counter() - started))
            reason = str(error).split("enforced: ")[-1].split(". Take")[0][:70]
            unsupported[reason] = unsupported.get(reason, 0) + 1
            continue
        first_ms.append(1e3 * (time.perf_counter() - started))
        compiled += 1
        agreed = [accepts(compiler, grammar, document, mask_us) == valid for document, valid in case.documents]
        right += all(agreed)
        for (_, valid), agrees in zip(case.documents, agreed):
            name = "valid accepted" if valid else "invalid rejected"
            counts[name] += agrees
            counts[name.split()[0]] += 1
    percentiles = np.percentile(mask_us, [50, 90, 99, 99.9]).round(2).tolist() if mask_us else None
    return {
        "schemas": len(cases),
        "compiled": compiled,
        "fully_right": right if mask_us else None,
        **counts,
        "first_mask_ms_p50_p99_max": [*np.percentile(first_ms, [50, 99]).round(2).tolist(), round(max(first_ms), 1)],
        "mask_us_p50_p90_p99_p999": percentiles,
        "masks": len(mask_us),
        "not_compiled": dict(sorted(unsupported.items(), key=lambda item: -item[1])[:12]),
    }


def accepts(compiler: GrammarCompiler, grammar: Grammar, document: Any, mask_us: list[float]) -> bool:
    """Return whether the masks let a document through and its end come; adds the time of each mask."""
    constraint = compiler.start(grammar)
    for token in compiler.tokenizer.encode(json.dumps(document, ensure_ascii=False)):
        started = time.perf_counter()
        mask = constraint.allowed()
        mask_us.append(1e6 * (time.perf_counter() - started))
        if not mask[token // 8] >> token % 8 & 1:
            return False
        constraint.advance(token)
    mask = constraint.allowed()
    end = compiler.end_ids[0]
    return constraint.error is None and bool(mask[end // 8] >> end % 8 & 1)


def hostile_rows(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return how long each hostile grammar holds its caller, and whether it is answered with an error."""
    wide = [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}, "required": [f"p{i}{j}"]} for j in range(4)]} for i in range(14)]
    doubling = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {"type": "string"}}
    hostile = {
        "schema 2,000 levels deep": lambda: Grammar.json_schema('{"items":' * 2_000 + "{}" + "}" * 2_000),
        "enum of 60,000 texts": lambda: Grammar.json_schema({"enum": [f"value {i}" for i in range(60_000)]}),
        "20,000 properties": lambda: Grammar.json_schema({"properties": {f"p{i}": {"type": "string"} for i in range(20_000)}}),
        "14 alternatives of 4 at once": lambda: Grammar.json_schema({"allOf": wide}),
        "references that double 40 times": lambda: Grammar.json_schema({"$defs": doubling, "$ref": "#/$defs/d0"}),
        "(a*)*b": lambda: Grammar.regex("(a*)*b"),
        "((a{1,100}){1,100}){1,100}": lambda: Grammar.regex("((a{1,100}){1,100}){1,100}"),
        "(a|b)*a(a|b){1000}c": lambda: Grammar.regex("(a|b)*a(a|b){1000}c"),
        "50,000 brackets": lambda: Grammar.regex("(" * 50_000 + "a" + ")" * 50_000),
        "Lark of 1 MB": lambda: Grammar.lark("start: " + '"a" ' * 250_000),
    }
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, (tokenizer.end_id,))
    rows = []
    for name, make in hostile.items():
        started = time.perf_counter()
        try:
            constraint, answer = compiler.start(make()), "compiled"
            slowest = 0.0
            for token in tokenizer.encode("a" * 60):
                before = time.perf_counter()
                if constraint.allowed()[token // 8] >> token % 8 & 1:
                    constraint.advance(token)
                slowest = max(slowest, time.perf_counter() - before)
        except UserError:
            slowest, answer = None, "error"
        row = {"part": "hostile", "grammar": name, "answer": answer, "ms": round(1e3 * (time.perf_counter() - started), 1)}
        rows.append(row | {"slowest_mask_ms": None if slowest is None else round(1e3 * slowest, 2)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def cost_rows(
    shape: str, tokenizer: Tokenizer, batches: tuple[int, ...] = (1, 16), rounds: int = 3, count: int = 64
) -> list[dict[str, Any]]:
    """Return tokens a second with and without a grammar, in turns on one engine; random weights, so texts are long and wild."""
    vocab_size = -(-tokenizer.vocab_size // 64) * 64
    config = DecoderConfig(vocab_size=vocab_size, max_seq_len=512, **SHAPES[shape])
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).to(torch.bfloat16).eval()
    engine = Engine(make_runner(model), max_batch=max(batches), prefix_caching=False)
    compiler = GrammarCompiler(tokenizer, vocab_size, ())
    rows = []
    for batch in batches:
        for whitespace in ("bounded", "none"):
            grammar, rates = Grammar.json_schema(RECORDS_SCHEMA, whitespace=whitespace), {True: [], False: []}
            compiler.start(grammar)
            for turn in range(2 * rounds + 2):
                constrained = bool(turn % 2)
                rate = decode_rate(engine, batch, count, (lambda: compiler.start(grammar)) if constrained else None)  # noqa: B023
                if turn >= 2:
                    rates[constrained].append(rate)
            with_it, without = statistics.median(rates[True]), statistics.median(rates[False])
            row = {"part": "cost", "model": shape, "batch": batch, "whitespace": whitespace, "tokens_per_s": round(with_it, 1)}
            rows.append(row | {"unconstrained_tokens_per_s": round(without, 1), "cost_percent": round(100 * (1 - with_it / without), 2)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def decode_rate(engine: Engine, batch: int, count: int, start) -> float:
    """Return tokens a second of decoding; reading the prompts is not counted."""
    params = [SamplingParams(max_tokens=count, seed=i, ignore_eos=True) for i in range(batch)]
    for i in range(batch):
        engine.add([7, 8, 9, 10 + i], params[i], start() if start else None)
    engine.step()  # reads the prompts
    started, tokens = time.perf_counter(), 0
    while engine.num_active:
        tokens += len(engine.step())
    return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
