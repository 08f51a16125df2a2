"""The whole life of a model in straight calls: text and a budget go in; a served, aligned, evaluated model comes out.

Every stage writes one directory, published by a rename, so that a build that was stopped goes on where it was.
`plinth build` runs this file; each call below is also a verb of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet

from plinth.config import to_dict
from plinth.data.curate import curate
from plinth.data.shards import pack_corpus
from plinth.data.sources import read_documents
from plinth.evaluation.report import report_data, write_report
from plinth.evaluation.run import evaluate_build
from plinth.posttraining.preference import train_dpo
from plinth.posttraining.sft import train_sft
from plinth.recipes.build_run import BuildConfig, open_build
from plinth.recipes.pretraining import pretrain
from plinth.recipes.stages import dpo_config, facts_config, pretrain_config, sft_config
from plinth.run import publish_dir
from plinth.scaling.corpus import describe_corpus
from plinth.scaling.plan import make_plan
from plinth.scaling.plan_record import Plan, load_plan, save_plan
from plinth.scaling.probe import probe_machine
from plinth.tasks.facts import build_facts
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from plinth.training.device import choose_device
from plinth.training.throughput import measure_tokens_per_s


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
    config, stage = open_build(out, config, resume, argv, say)
    corpus, tokenizer, shards, facts = (out / name for name in ("corpus", "tokenizer", "shards", "facts"))

    with stage("curate") as needed:
        if needed(corpus):
            curate(read_documents(list(config.text)), corpus, config.curate)
    texts = pyarrow.parquet.read_table(corpus / "train.parquet", columns=["text"])["text"].to_pylist()

    with stage("plan") as needed:
        if needed(out / "plan.json"):
            stats = describe_corpus(texts, has_instructions=config.own_facts or config.sft is not None)
            probe = probe_machine(measure_tokens_per_s, device=choose_device(), seed=config.seed)
            save_plan(make_plan(config.budget, stats, probe, config.plan), out / "plan.json")
    plan = load_plan(out / "plan.json")
    show_plan(plan)
    if plan_only:
        return to_dict(plan)

    with stage("tokenizer") as needed:
        if needed(tokenizer):
            with publish_dir(tokenizer) as folder:
                train_tokenizer(texts, plan.vocab_size).save(folder)

    with stage("shards") as needed:
        if needed(shards):
            pack_corpus(corpus, Tokenizer.load(tokenizer), shards)

    sft, pairs, join_turns = config.sft, config.pairs, 1
    if config.own_facts:
        with stage("facts") as needed:
            if needed(facts):
                build_facts(facts, facts_config(plan, config.seed))
        sft, pairs, join_turns = facts / "sft.jsonl", pairs or facts / "pairs.jsonl", 4  # its questions stand alone

    common = config.seed, config.stage_telemetry
    with stage("pretrain"):
        base = pretrain(out / "pretrain", shards, tokenizer, pretrain_config(plan, *common), **stage.options("pretrain"))
    speed = min(1.0, plan.predicted.time_s / base.duration_s)

    if sft is None:
        say("no instruction data (--sft): the build stops after pretraining.")
    else:
        with stage("sft"):
            train_sft(out / "sft", out / "pretrain", sft, sft_config(plan, *common, speed, join_turns), **stage.options("sft"))
        if pairs is not None:
            with stage("dpo"):
                train_dpo(out / "dpo", out / "sft", pairs, dpo_config(plan, *common, speed), **stage.options("dpo"))

    with stage("evaluate"):
        evaluate_build(out, config.evaluation)
    stage.finish()
    data = report_data(out)
    write_report(out, data=data)
    return data
