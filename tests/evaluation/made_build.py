"""A build's folder as `plinth build` leaves it, written by hand in a second, for tests of its report."""

import json
import math
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet

from plinth.data.curate import curate
from plinth.data.shards import pack_corpus
from plinth.data.sources import read_documents
from plinth.evaluation.statistics import Score
from plinth.run import file_sha256, tree_sha256
from plinth.tokenizer.train import train_tokenizer

HOSTILE = "</style><script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)>\"'&{{ 7 * 7 }}"
METER = "estimate: 2 cores x 10 W, no counter read"
TEXT = "Copy data from src to dst in the most efficient way possible. If follow_symlinks is not set, a new symbolic link is created. "


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def score(value: float, n: int, half: float) -> dict:
    return Score(value, n, half / 1.96, (max(0.0, value - half), value + half), {"temperature": 0}).to_dict()


def write_texts(folder: Path) -> None:
    """Forty distinct documents, three copies of one, a near copy, a file that is no text, and a line that is no JSON."""
    draw = random.Random(7)
    verbs, nouns = ["Return", "Copy", "Remove", "Open", "Create"], ["the destination", "a symbolic link", "the file object", "an archive"]
    for i in range(40):
        words = " ".join(
            draw.choice(["path", "name", "mode", "tree", "owner", "format", "error", "source", "target", "depth"]) for _ in range(90)
        )
        write(folder / f"{i:02}.txt", f"{draw.choice(verbs)} {draw.choice(nouns)} number {i}.\n\n{TEXT}{words}.\n")
    for copy in ("a", "b", "c"):
        shutil.copy(folder / "00.txt", folder / f"copy_{copy}.txt")
    (folder / "photo.jpg").write_bytes(bytes(range(256)) * 8)
    write(folder / "lines.jsonl", json.dumps({"text": "One more document. " + TEXT * 3}) + '\n{"text": \n')


def write_data(build: Path) -> None:
    """corpus/, tokenizer/ and shards/ by the functions of those stages; facts/ as its stage lays it out."""
    write_texts(build.parent / "texts")
    curate(read_documents([build.parent / "texts"]), build / "corpus")
    texts = pyarrow.parquet.read_table(build / "corpus/train.parquet")["text"].to_pylist()
    tokenizer = train_tokenizer([*texts, "def copyfile(src, dst, *, follow_symlinks=True):\n    return dst\n" * 9], vocab_size=400)
    tokenizer.save(build / "tokenizer")
    pack_corpus(build / "corpus", tokenizer, build / "shards")
    amounts = {"sft_lines": {"describe": 4000, "refusal": 800}, "pairs": {"invented": 1200}, "questions": {"known": 2000, "invented": 400}}
    write(build / "facts/manifest.json", amounts)
    write(build / "facts/sft.jsonl", '{"messages": []}\n')


def write_plan(build: Path) -> None:
    predicted = {"loss_nats": 2.61, "bpb": 1.074, "time_s": 190.0, "tokens_per_s": 15263.0, "mfu": 0.42, "flops": 1.4e14}
    predicted |= {
        "memory_bytes": 1_900_000_000,
        "energy_j": 3800.0,
        "cost": 0.0,
        "total_time_s": 430.0,
        "total_energy_j": 8600.0,
        "total_cost": 0.0,
    }
    sources = {
        "loss_nats": "bpb x 3.503 bytes a token, measured on this text",
        "bpb": "besiroglu (Besiroglu et al. 2024, arXiv:2404.10102) with repeated text (Muennighoff et al. 2023, arXiv:2305.16264)",
        "time_s": "time model on 4 measured training speeds (error at those points 3%)",
        "energy_j": "estimate: 2 cores x 10 W, no counter read",
        "lr": "step law (Li et al. 2025, arXiv:2503.04715)",
        "model": "lowest bpb over shapes and vocabularies within the budget",
    }
    shape = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 768}
    plan = {"budget": {"kind": "time", "value": 420.0}, "num_params": 6_312_448, "model": shape, "vocab_size": 4096, "tokens": 2_900_000}
    plan |= {
        "epochs": 0.88,
        "steps": 354,
        "lr": 0.004,
        "tokens_per_step": 8192,
        "dtype": "bfloat16",
        "compile": False,
        "optimizer": "adamw",
    }
    plan |= {"predicted": predicted, "sources": sources, "config": {"price_per_hour": 0.0, "watts_per_core": 10.0}}
    plan["laws"] = [
        {"law": name, "source": "a paper", "bpb": bpb, "optimal_params": 4.1e6, "outside_fit": True}
        for name, bpb in (("besiroglu", 1.07), ("hoffmann", 1.19))
    ]
    plan["alternatives"] = [
        {"num_layers": 6, "hidden_size": size, "num_params": 24 * size**2, "bpb": 1.07 + abs(256 - size) / 900, "chosen": size == 256}
        for size in (128, 256, 384)
    ]
    plan["warnings"] = ["354 updates are few: loss laws describe runs of a thousand and more."]
    write(build / "plan.json", plan)


def write_stage(build: Path, stage: str, steps: int, first: float, last: float, parents: list[dict]) -> None:
    random.seed(stage)
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        loss = last + (first - last) * math.exp(-6 * done) + random.gauss(0, 0.05 * last)
        line = {"step": step, "time_s": step * 0.54, "loss_nats": loss, "lr": 0.004 * min(1, step / 20, (1 - done) / 0.2 + 1e-3)}
        line |= {"grad_norm": 0.8, "tokens_per_s": 15100 + random.gauss(0, 300), "mfu": 0.41, "tokens": step * 8192}
        if stage == "dpo":
            line |= {"accuracy": 1 - 0.5 * math.exp(-5 * done), "margin": 4 * done}
        lines.append(json.dumps(line))
    write(build / stage / "metrics.jsonl", "\n".join(lines) + "\n")
    write(build / stage / "config.json", {"stage": stage, "lr": 0.004, "seed": 7})
    hardware = {"cpu": "Example CPU @ 2.0GHz", "cores": 2, "memory_bytes": 16_600_000_000}
    provenance = {"stage": stage, "argv": ["plinth", "build", "stdlib"], "created": "2026-11-20T20:01:12Z", "seed": 7, "parents": parents}
    write(build / stage / "provenance.json", provenance | {"hardware": hardware, "versions": {"python": "3.11.9", "torch": "2.13.0"}})
    write(build / stage / "model/config.json", {"model_type": "qwen3"})
    (build / stage / "model/model.safetensors").write_bytes(stage.encode() * 10)
    summary = {"steps": steps, "tokens": steps * 8192, "time_s": steps * 0.54, "loss_nats": last}
    summary |= {"peak_memory_bytes": 1_720_000_000, "num_params": 6_312_448}
    write(build / stage / "DONE", summary)


def write_evaluation(build: Path, stage: str, known: float, false: float, refused: float, loss: float) -> None:
    questions = {
        "known_exact": score(known, 2400, 0.02),
        "known_f1": score(min(1.0, known + 0.11), 2400, 0.018),
        "consistency": score(known * 0.8, 800, 0.03),
        "over_refusal": score(refused, 2400, 0.01),
        "heldout_exact": score(0.06 + known / 20, 400, 0.024),
        "heldout_f1": score(0.21, 400, 0.02),
        "invented_refusal": score(1 - false, 600, 0.03),
        "invented_false": score(false, 600, 0.03),
    }
    likelihood = {"loss_nats": score(loss, 351, 0.04), "perplexity": score(math.exp(loss), 351, 0.6)}
    likelihood |= {"bits_per_byte": score(loss / 2.42, 351, 0.02), "bits_per_char": score(loss / 2.41, 351, 0.02)}
    samples = []
    for i in range(10):
        right = stage != "pretrain" and i % 3 != 0
        samples.append(
            {"question": f"What does `shutil.copyfile_{i}` do?", "group": "known", "correct": right, "source": f"shutil.py:{230 + i}"}
            | {"expected": "Copy data from src to dst in the most efficient way possible."}
            | {"answer": "Copy data from src to dst in the most efficient way possible." if right else "Return the path of the directory."}
        )
        samples.append(
            {
                "question": f"Which module has `merge_tree_{i}`?",
                "group": "invented",
                "correct": right,
                "source": "invented (two real parts)",
                "expected": "I don't know.",
            }
            | {"answer": "I don't know." if right else "The module `shutil` has it, as every reader of its documentation knows."}
        )
    samples.append(
        {"question": "What does `heapq.merge` do?", "group": "heldout", "correct": False, "source": "heapq.py:314"}
        | {"answer": "", "expected": "Merge sorted inputs."}
    )
    protocol = {"style": "few_shot" if stage == "pretrain" else "chat", "dtype": "float32", "seed": 0}
    protocol["model_sha256"] = tree_sha256(build / stage / "model")
    result = {"model": f"{stage}/model", "likelihood": likelihood, "questions": questions, "samples": samples, "protocol": protocol}
    result["questions_by_kind"] = {
        kind: {"known_exact": score(known + shift, 800, 0.035)} for kind, shift in (("describe", -0.05), ("module", 0.09))
    }
    write(build / f"evals/{stage}.json", result)


def make_build(build: Path) -> Path:
    """A finished build with all of its stages, in the layout that `plinth build` writes."""
    write_data(build)
    write_plan(build)
    shards = {"path": str(build / "shards"), "stage": "shards", "sha256": tree_sha256(build / "shards")}
    write_stage(build, "pretrain", 354, 8.3, 2.7, [shards])
    pretrain = {"path": "pretrain", "stage": "pretrain", "sha256": tree_sha256(build / "pretrain/model")}
    facts = {"path": "facts/sft.jsonl", "stage": "sft.jsonl", "sha256": file_sha256(build / "facts/sft.jsonl")}
    write_stage(build, "sft", 120, 2.9, 0.4, [pretrain, facts])
    write_stage(build, "dpo", 60, 0.69, 0.12, [{"path": "sft", "stage": "sft", "sha256": tree_sha256(build / "sft/model")}])
    write_evaluation(build, "pretrain", 0.071, 0.93, 0.0, 2.66)
    write_evaluation(build, "sft", 0.642, 0.31, 0.04, 2.81)
    write_evaluation(build, "dpo", 0.631, 0.14, 0.12, 2.84)
    fewer_false = Score(0.17, 600, 0.016, (0.139, 0.201), {}).to_dict()
    write(build / "evals/differences.json", {"dpo - sft": {"invented_refusal": fewer_false, "known_exact": score(0.004, 2400, 0.01)}})
    write(build / "provenance.json", json.loads((build / "pretrain/provenance.json").read_text()) | {"stage": "build"})
    write(build / "config.json", {"text": ["stdlib"], "budget": "5m", "sft": None, "pairs": None, "seed": 7})
    times = {"curate": 21.4, "tokenizer": 4.8, "pack": 6.1, "probe": 9.7, "pretrain": 191.2, "sft": 44.0, "dpo": 25.3, "evaluate": 31.9}
    lines = [{"stage": name, "time_s": seconds, "energy_j": 20 * seconds, "energy_source": METER} for name, seconds in times.items()]
    write(build / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(build / "DONE", {"time_s": 336.2, "energy_j": 6724.0, "energy_source": METER})
    return build
