"""Evaluate a model, or every stage of a build, and write what was found as JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plinth.config import UserError, read_json, save_json
from plinth.evaluation.likelihood import score_corpus
from plinth.evaluation.questions import Style, read_questions, read_shots, score_questions
from plinth.evaluation.statistics import Score, paired_difference
from plinth.inference.engine import Engine
from plinth.inference.text import TextEngine, end_ids
from plinth.models.hub import load_decoder
from plinth.run import MODEL_STAGES, find_model, tree_sha256
from plinth.tokenizer.encode import Tokenizer
from plinth.training.precision import DTYPES

COMPARED = {"known": "exact", "heldout": "exact", "invented": "refusal"}


@dataclass(frozen=True)
class EvaluationConfig:
    """How much is evaluated, and how."""

    max_questions: int | None = 200
    """questions asked of each group (known, heldout, invented); None = all"""
    max_documents: int | None = 256
    """held-out documents scored; None = all"""
    max_tokens: int | None = 40_000
    """tokens scored over all documents; None = all"""
    seq_len: int | None = None
    """tokens of a window; None = the model's max_seq_len"""
    stride: int | None = None
    """tokens by which windows move on; None = half of seq_len"""
    batch_tokens: int = 4096
    """tokens of a forward pass"""
    max_batch: int = 64
    """questions answered at a time"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """number format of the weights"""
    style: Style | None = None
    """chat or few_shot; None = few_shot for a model that was only pretrained, chat for others"""
    seed: int = 0
    """seed of the samples and of the bootstrap"""

    def __post_init__(self) -> None:
        for name in ("max_questions", "max_documents", "max_tokens", "seq_len", "stride", "batch_tokens", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")


def evaluate_model(
    model: Path,
    *,
    shards: Path | None = None,
    facts: Path | None = None,
    config: EvaluationConfig | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate one model: likelihood where `shards` is given, questions where the `facts` folder is; write `out` (JSON) if given.

    `model` is a run, a build or a model folder. Returns {model, likelihood, questions, questions_by_kind, samples, protocol}, where
    scores are dictionaries {value, n, stderr, ci95, protocol}. Raises UserError when there is nothing to evaluate on.
    """
    if shards is None and facts is None:
        raise UserError(
            "there is nothing to evaluate on. Pass --shards (a folder of `plinth data pack`), --facts (a facts folder), or both."
        )
    config = config or EvaluationConfig()
    started = time.perf_counter()
    folder = find_model(model)
    weights, tokenizer = load_decoder(folder, DTYPES[config.dtype]).eval(), Tokenizer.load(folder)
    style = config.style or model_style(folder, tokenizer)
    result: dict[str, Any] = {"model": str(folder), "likelihood": {}, "questions": {}, "questions_by_kind": {}, "samples": []}
    result["protocol"] = {"style": style, "dtype": config.dtype, "seed": config.seed, "model_sha256": tree_sha256(folder)}
    if shards is not None:
        scores = _corpus(weights, tokenizer, Path(shards), config)
        result["likelihood"] = _plain(scores)
    if facts is not None:
        found = _questions(weights, tokenizer, Path(facts), style, config)
        result["questions"] = _plain(found.scores)
        result["questions_by_kind"] = {kind: _plain(scores) for kind, scores in found.by_kind.items()}
        result["samples"] = found.samples
        result["protocol"] |= {"questions": found.protocol, "facts_sha256": _facts_digest(Path(facts))}
    result["protocol"]["time_s"] = round(time.perf_counter() - started, 2)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        save_json(Path(out), result)
    return result


def _corpus(model: Any, tokenizer: Tokenizer, shards: Path, config: EvaluationConfig) -> dict[str, Score]:
    return score_corpus(
        model,
        shards,
        tokenizer=tokenizer,
        seq_len=config.seq_len,
        stride=config.stride,
        max_documents=config.max_documents,
        max_tokens=config.max_tokens,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
    )


def _questions(model: Any, tokenizer: Tokenizer, facts: Path, style: Style, config: EvaluationConfig) -> Any:
    engine = TextEngine(Engine(model, max_batch=config.max_batch, eos_ids=end_ids(tokenizer)), tokenizer)
    return score_questions(
        engine,
        read_questions(facts / "questions.jsonl"),
        style=style,
        shots=read_shots(facts / "sft.jsonl") if style == "few_shot" else (),
        max_questions=config.max_questions,
        seed=config.seed,
    )


def _plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: score.to_dict() for name, score in scores.items()}


def _facts_digest(facts: Path) -> Any:
    manifest = facts / "manifest.json"
    return read_json(manifest).get("sha256", {}).get("questions.jsonl") if manifest.exists() else None


def model_style(folder: Path, tokenizer: Tokenizer) -> Style:
    """Return how a model wants to be asked: in plain text after pretraining alone or without chat tokens and template, else as a chat."""
    provenance = folder.parent / "provenance.json"
    stage = read_json(provenance).get("stage") if folder.name == "model" and provenance.exists() else None
    return "few_shot" if stage == "pretrain" or not tokenizer.can_chat else "chat"


def evaluate_build(build: Path, config: EvaluationConfig | None = None) -> dict[str, Any]:
    """Evaluate every finished stage of a build; writes evals/{stage}.json and evals/differences.json.

    Returns {stages: {stage: result}, differences}. Raises UserError when no stage is finished.
    """
    build = Path(build)
    stages = [stage for stage in reversed(MODEL_STAGES) if (build / stage / "DONE").exists()]
    if not stages:
        raise UserError(f"{build} has no finished stage ({', '.join(reversed(MODEL_STAGES))}). Finish the build with --resume.")
    shards, facts = (build / name if (build / name).is_dir() else None for name in ("shards", "facts"))
    results = {s: evaluate_model(build / s, shards=shards, facts=facts, config=config, out=build / "evals" / f"{s}.json") for s in stages}
    differences = compare_stages(results)
    save_json(build / "evals" / "differences.json", differences)
    return {"stages": results, "differences": differences}


def compare_stages(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the paired differences of each stage from the one before and from the first: {"sft - pretrain": {known_exact: score}}."""
    stages = list(results)
    pairs = dict.fromkeys([*zip(stages[1:], stages), *((stage, stages[0]) for stage in stages[1:])])
    return {f"{a} - {b}": _plain(compare_samples(results[a]["samples"], results[b]["samples"])) for a, b in pairs}


def compare_samples(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Score]:
    """Return the mean difference first - second over the questions that both answered, clustered by fact."""
    others = {sample["id"]: sample for sample in second}
    scores = {}
    for group, field in COMPARED.items():
        shared = [(s, others[s["id"]]) for s in first if s["group"] == group and s["id"] in others]
        if shared:
            values = [[float(sample[field]) for sample in column] for column in zip(*shared)]
            clusters = [sample["fact_id"] for sample, _ in shared]
            protocol = {"questions": len(shared), "interval": "normal, paired, clustered by fact"}
            scores[f"{group}_{field}"] = paired_difference(values[0], values[1], clusters, protocol)
    return scores
