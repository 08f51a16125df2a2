"""The whole life of a model in straight calls: text and a budget go in; a served, aligned, evaluated model comes out.

Every stage writes one directory, published by a rename, so that a build that was stopped goes on where it was.
`plinth build` runs this file; each call below is also a verb of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet

from plinth.config import UserError, from_dict, to_dict
from plinth.data.curate import CurateConfig, curate
from plinth.data.shards import pack_corpus
from plinth.data.sources import read_documents
from plinth.evaluation.report import report_data, write_report
from plinth.evaluation.run import EvaluationConfig, evaluate_build
from plinth.posttraining.preference import train_dpo
from plinth.posttraining.sft import train_sft
from plinth.recipes.stages import dpo_config, facts_config, pretrain_config, sft_config
from plinth.run import Run, publish_dir
from plinth.scaling.budget import parse_budget
from plinth.scaling.corpus import describe_corpus
from plinth.scaling.energy import EnergyMeter
from plinth.scaling.plan import make_plan
from plinth.scaling.plan_config import PlanConfig
from plinth.scaling.plan_record import Plan, load_plan, save_plan
from plinth.scaling.probe import probe_machine
from plinth.tasks.facts import build_facts
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.recipes.pretraining import pretrain
from plinth.training.throughput import measure_tokens_per_s

STDLIB = "stdlib"


@dataclass(frozen=True)
class BuildConfig:
    """What to build and from what."""

    text: tuple[str, ...] = (STDLIB,)
    """files and folders of text; `stdlib` is the standard library of this Python"""
    budget: str = "4m"
    """training time (10m, 90s, 1h30m), FLOPs (3e14flops) or pretraining tokens (5e6tokens)"""
    sft: Path | None = None
    """conversations to finetune on, JSON Lines; `stdlib` brings its own"""
    pairs: Path | None = None
    """preference pairs for DPO, JSON Lines; `stdlib` brings its own"""
    curate: CurateConfig = field(default_factory=CurateConfig)
    """what is dropped and what is held out"""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """choices that the plan keeps to"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """how much is evaluated"""
    seed: int = 0
    """seed of every choice"""


def build(
    out: Path,
    config: BuildConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    say: Callable[[str], None] = print,
    show_plan: Callable[[Plan], None] = lambda plan: None,
    plan_only: bool = False,
) -> dict:
    """Build a model in the directory `out` and return the data of its report."""
    parse_budget(config.budget)
    for path in (config.sft, config.pairs):
        if path is not None and not path.exists():
            raise UserError(f"{path} does not exist.")
    own = STDLIB in config.text and config.sft is None  # the standard library brings its own questions
    if resume:
        run = Run.open(out)
        config = from_dict(BuildConfig, run.config, f"{out}/config.json: ")
    else:
        run = Run.create(out, "build", to_dict(config), argv=argv, seed=config.seed)
    stage = Stages(run, say)
    corpus, tokenizer, shards, facts = (out / name for name in ("corpus", "tokenizer", "shards", "facts"))

    if not corpus.exists():
        with stage("curate"):
            curate(read_documents(list(config.text)), corpus, config.curate)
    texts = pyarrow.parquet.read_table(corpus / "train.parquet", columns=["text"])["text"].to_pylist()

    if not (out / "plan.json").exists():
        with stage("plan"):
            stats = describe_corpus(texts, has_instructions=own or config.sft is not None)
            probe = probe_machine(measure_tokens_per_s, seed=config.seed)
            save_plan(make_plan(config.budget, stats, probe, config.plan), out / "plan.json")
    plan = load_plan(out / "plan.json")
    show_plan(plan)
    if plan_only:
        return to_dict(plan)

    if not tokenizer.exists():
        with stage("tokenizer"), publish_dir(tokenizer) as folder:
            train_tokenizer(texts, plan.vocab_size).save(folder)
    if not shards.exists():
        with stage("shards"):
            pack_corpus(corpus, Tokenizer.load(tokenizer), shards)
    if own and not facts.exists():
        with stage("facts"):
            build_facts(facts, facts_config(plan, config.seed))
    sft = facts / "sft.jsonl" if own else config.sft
    pairs = facts / "pairs.jsonl" if own and config.pairs is None else config.pairs

    with stage("pretrain"):
        base = pretrain(out / "pretrain", shards, tokenizer, pretrain_config(plan, config.seed), **stage.options("pretrain"))
    speed = min(1.0, plan.predicted.time_s / base.summary["time_s"])
    if sft is None:
        say("no instruction data (--sft): the build stops after pretraining.")
    else:
        with stage("sft"):
            train_sft(out / "sft", out / "pretrain", sft, sft_config(plan, config.seed, speed), **stage.options("sft"))
    if sft is not None and pairs is not None:
        with stage("dpo"):
            train_dpo(out / "dpo", out / "sft", pairs, dpo_config(plan, config.seed, speed), **stage.options("dpo"))

    with stage("evaluate"):
        evaluate_build(out, config.evaluation)
    run.finish(stage.totals())
    data = report_data(out)
    write_report(out, data=data)
    return data


class Stages:
    """Times the stages of a build and counts their energy; each goes into the build's metrics.jsonl."""

    def __init__(self, run: Run, say: Callable[[str], None]):
        self.run, self.say = run, say

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.say(f"{name} ...")
        meter, started = EnergyMeter(self.run.provenance["hardware"]["cores"]).start(), time.perf_counter()
        yield
        energy, seconds = meter.read(), time.perf_counter() - started
        self.run.log(stage=name, time_s=seconds, energy_j=energy.joules, energy_source=energy.source)
        self.say(f"{name} done in {seconds:.1f} s")

    def options(self, name: str) -> dict:
        """Return how a training stage goes on: resumed when it was begun before."""
        begun = (self.run.path / name / "config.json").exists()
        return {"resume": begun, "argv": self.run.provenance["argv"], "warn": self.say}

    def totals(self) -> dict:
        """Return seconds and joules of the whole build, over all its stages."""
        records = self.run.metrics()
        source = records[-1]["energy_source"]
        return {
            "time_s": sum(r["time_s"] for r in records), "energy_j": sum(r["energy_j"] for r in records), "energy_source": source
        }  # fmt: skip
