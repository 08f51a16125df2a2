"""`plinth pretrain`: a model of any family; here the decoder, from token shards, and the choice of the others by `--family`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import say, show_run
from plinth.config import UserError, nearest
from plinth.models.config import DecoderConfig
from plinth.recipes.pretraining import PretrainConfig, pretrain, read_config, show_batch
from plinth.recipes.ray_launch import run_on_ray
from plinth.recipes.stages import pretrain_config
from plinth.run import Run
from plinth.scaling.plan_record import load_plan
from plinth.tokenizer.encode import Tokenizer
from plinth.training.parallel import is_leader

FAMILIES: dict[str, tuple[str, str]] = {  # family → module whose main takes the other arguments, and a gloss
    "bert": ("plinth.cli.pretrain_bert", "an encoder, hidden tokens"),
    "electra": ("plinth.cli.pretrain_electra", "an encoder, replaced tokens"),
    "transformer": ("plinth.cli.pretrain_transformer", "the encoder-decoder of 2017, parallel text"),
    "t5": ("plinth.cli.pretrain_t5", "T5, parallel text"),
    "gru": ("plinth.cli.pretrain_gru", "recurrent sequence to sequence, parallel text"),
    "lstm": ("plinth.cli.pretrain_lstm", "the same with LSTM cells"),
    "awd-lstm": ("plinth.cli.pretrain_awd_lstm", "next token by a recurrent model, from shards"),
    "clip": ("plinth.cli.pretrain_clip", "a text and a vision tower, from images with captions"),
    "llava": ("plinth.cli.pretrain_llava", "a decoder that sees, from questions on images"),
}


@dataclass(frozen=True)
class Options:
    """Pretrain a decoder on shards that `plinth data pack` wrote; --family, as the first option, names another kind of model."""

    shards: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """shards folders, one or more, packed with the same tokenizer"""
    tokenizer: Path
    """tokenizer folder that packed the shards"""
    out: Path
    """run directory to write"""
    plan: Path | None = None
    """plan.json of `plinth plan --out`: takes shape, batch, schedule and learning rates from it"""
    config: Annotated[PretrainConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = field(default_factory=PretrainConfig)
    """model, batches and schedule"""
    show_batch: int | None = None
    """only print the documents and text of this update (from 1, as in metrics.jsonl), as the run in --out has them if there is one"""
    device: str | None = None
    """cpu, cuda or cuda:N; takes the place of train.device, with --resume too"""
    resume: bool = False
    """continue the run from its newest sound checkpoint"""
    ray_workers: int | None = None
    """train on so many workers of a Ray cluster, through Ray Train (extra `cluster`); see docs/distributed.md"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb for the family that the arguments name."""
    family, rest = split_family(argv)
    return main_decoder(rest) if family == "decoder" else importlib.import_module(FAMILIES[family][0]).main(rest)


def split_family(argv: list[str]) -> tuple[str, list[str]]:
    """Take `--family NAME`, or `--family=NAME`, out of the arguments. Raises UserError for a family that there is not."""
    rest = list(argv)
    place = next((i for i, word in enumerate(rest) if word.split("=")[0] == "--family"), None)
    if place is None:
        return "decoder", rest
    word = rest.pop(place)
    name = word.partition("=")[2] if "=" in word else rest.pop(place) if place < len(rest) else ""
    if name != "decoder" and name not in FAMILIES:
        glosses = "; ".join(f"{each}: {gloss}" for each, (_, gloss) in {"decoder": ("", "next token"), **FAMILIES}.items())
        raise UserError(f"--family {name or '(nothing)'} is unknown.{nearest(name, FAMILIES)} Families: {glosses}.")
    return name, rest


def main_decoder(argv: list[str]) -> int:
    options = read_options(Options, prog="plinth pretrain", args=argv)
    config = options.config
    if options.plan is not None and config.parametrization != "standard":
        raise UserError(
            f"--plan has rates for its own shape, and --parametrization {config.parametrization} takes rates tuned at a base shape. "
            "Leave one of them out."
        )
    plan = None if options.plan is None else load_plan(options.plan)
    if plan is not None:
        data = {name: getattr(config, name) for name in ("shard_weights", "kind_weights", "packing", "mask_documents")}
        planned = pretrain_config(plan, config.train.seed, config.train.telemetry)
        config = replace(planned, train=replace(planned.train, spikes=config.train.spikes), **data)
    elif config.model.vocab_size == DecoderConfig.vocab_size:
        vocab_size = Tokenizer.load(options.tokenizer).vocab_size
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    if options.show_batch is not None:
        if (options.out / "config.json").exists():
            config = read_config(options.out)
        print(show_batch(options.shards, options.tokenizer, config, options.show_batch))
        return 0
    call: dict[str, Any] = {
        "out": options.out, "shards": options.shards, "tokenizer_dir": options.tokenizer, "config": config,
        "resume": options.resume, "device": options.device, "argv": argv, "plan": plan,
    }  # fmt: skip
    if options.ray_workers is None:
        run = pretrain(**call, warn=say)
    else:
        run_on_ray(pretrain_on_worker, absolute_paths(call), options.ray_workers, config.parallel.timeout_s)
        run = Run.open(options.out)
    if is_leader():
        show_run(run, options.json)
    return 0


def pretrain_on_worker(call: dict[str, Any]) -> None:
    """Be one of Ray's workers."""
    pretrain(**call, warn=say)


def absolute_paths(call: dict[str, Any]) -> dict[str, Any]:
    """Return the call with paths that mean the same in a worker's own directory."""
    folders = tuple(path.absolute() for path in call["shards"])
    return call | {"out": call["out"].absolute(), "shards": folders, "tokenizer_dir": call["tokenizer_dir"].absolute()}
