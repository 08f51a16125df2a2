"""A pretrained language model learns the text of a task: the second of ULMFiT's three steps, for AWD-LSTMs and decoders.

Source: Howard and Ruder 2018, arXiv:1801.06146, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from plinth.config import UserError
from plinth.data.contiguous import ContiguousText
from plinth.data.loader import TokenLoader
from plinth.data.shards import open_split
from plinth.models.hub import load_model, save_model
from plinth.models.recurrent import AwdLstm
from plinth.models.transformer import Transformer
from plinth.posttraining.depth_rates import Unfreezing, depth_scales
from plinth.posttraining.transfer_config import LmFinetuneConfig
from plinth.posttraining.vocabulary import shared_rows, with_vocabulary
from plinth.recipes.pretraining import check_shards, split_rows
from plinth.recipes.recurrent_pretraining import carried_batches, heldout_loss
from plinth.run import Run, find_model
from plinth.tokenizer.encode import Tokenizer
from plinth.training.carried_state import CarriedState
from plinth.training.checkpoint import Stateful
from plinth.training.job import Job, run_job
from plinth.training.objectives import causal_lm_loss
from plinth.training.objectives_recurrent import awd_lstm_loss
from plinth.training.step import Batch, LossFunction

AWD_LSTM_SEQ_LEN, DECODER_SEQ_LEN = 70, 256  # tokens a row, where the configuration names none; a decoder's context may be shorter


def finetune_language_model(
    out: Path,
    model_run: Path,
    shards: Sequence[Path],
    config: LmFinetuneConfig,
    *,
    tokenizer_dir: Path | None = None,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Finetune a run's language model on shards and publish it as out/model; returns the finished run.

    Raises UserError for a model of another family, and shards that were packed with another tokenizer.
    """
    source = find_model(model_run)
    old = Tokenizer.load(source)
    tokenizer = old if tokenizer_dir is None else Tokenizer.load(tokenizer_dir)
    check_shards(shards, tokenizer, tokenizer_dir or source)

    def prepare(config: LmFinetuneConfig) -> Job:
        model = load_model(source)
        if not isinstance(model, AwdLstm | Transformer):
            raise UserError(f"{model_run} holds neither a decoder nor an AWD-LSTM. Name a run of `plinth pretrain`.")
        known = 1.0
        if tokenizer.sha256 != old.sha256:
            rows = shared_rows(old, tokenizer)
            known = float((rows >= 0).double().mean())
            warn(f"the tokenizers share {known:.0%} of the new one's {len(rows)} entries; the others begin at the mean embedding.")
            model = with_vocabulary(model, old, tokenizer)
        return _job(model, shards, tokenizer, config, known)

    parents = [model_run, *shards, *([] if tokenizer_dir is None else [tokenizer_dir])]
    return run_job(out, "finetune-lm", config, prepare, parents=parents, resume=resume, argv=argv, warn=warn)


class _Text(NamedTuple):
    """Text as one kind of model reads it."""

    batches_at: Callable[[int], Sequence[Batch]]
    loss: LossFunction
    steps_a_pass: float
    epochs: Callable[[int], float]
    fingerprint: dict[str, Any]
    extra_state: dict[str, Stateful] | None = None


def _read_on(model: AwdLstm, shards: Sequence[Path], seq_len: int, config: LmFinetuneConfig) -> _Text:
    """Let each row of an AWD-LSTM go on from step to step."""
    text = ContiguousText(shards, config.sequences_per_step, seq_len, config.train.seed)
    carried = CarriedState(model.zero_state(config.sequences_per_step))
    loss = awd_lstm_loss(carried, config.activation_penalty, config.slowness_penalty)
    batches_at = partial(carried_batches, text, carried, micro_batch_size=config.micro_batch_size)
    return _Text(batches_at, loss, text.steps_a_pass, text.epochs, text.fingerprint(), {"carried": carried})


def _read_rows(shards: Sequence[Path], seq_len: int, config: LmFinetuneConfig) -> _Text:
    """Let a decoder read rows, documents end to end."""
    loader = TokenLoader(shards, seq_len, config.sequences_per_step, config.train.seed)

    def batches_at(step: int) -> Sequence[Batch]:
        return split_rows(loader.batch(step), config.micro_batch_size)

    return _Text(batches_at, causal_lm_loss, 1.0 / loader.epochs(1), loader.epochs, loader.fingerprint())


def _job(model: AwdLstm | Transformer, shards: Sequence[Path], tokenizer: Tokenizer, config: LmFinetuneConfig, known: float) -> Job:
    seq_len, own = config.seq_len or default_seq_len(model), model.config
    before = heldout(model, shards, seq_len, config.heldout_tokens)
    if isinstance(model, AwdLstm):
        model.config = model.config.without_dropout(config.dropout)
        text = _read_on(model, shards, seq_len, config)
    else:
        text = _read_rows(shards, seq_len, config)
    steps = config.train.steps or max(1, round(config.epochs * text.steps_a_pass))
    whole = Unfreezing.plan("all", 1, steps, 1)

    def publish(folder: Path) -> None:
        model.config = own  # with its own rates of dropout
        save_model(model, tokenizer, folder)

    return Job(
        model,
        text.loss,
        text.batches_at,
        steps=steps,
        tokenizer=tokenizer,
        description="finetuning",
        data={**text.fingerprint, "tokenizer_sha256": tokenizer.sha256},
        scales=depth_scales(language_model_groups(model), config.rates.depth_factor),
        lr_scale=(lambda step: whole.slanted_scale(step, config.rates)) if config.rates.slanted else None,
        extra_state=text.extra_state,
        publish=publish,
        summarise=lambda summary: (
            summary
            | {"epochs": text.epochs(summary["steps"]), "known_share": known}
            | {f"{name}_before": value for name, value in before.items() if name == "heldout_loss_nats"}
            | heldout(model, shards, seq_len, config.heldout_tokens)
        ),
    )


def default_seq_len(model: AwdLstm | Transformer) -> int:
    """Return the tokens of a row where the configuration names none."""
    return AWD_LSTM_SEQ_LEN if isinstance(model, AwdLstm) else min(DECODER_SEQ_LEN, model.config.max_seq_len)


def language_model_groups(model: AwdLstm | Transformer) -> list[list[str]]:
    """Return the depth groups; embeddings that are the head as well stand in the last one, where fastai has them."""
    groups = model.depth_groups()
    if not model.config.tie_embeddings:
        return groups
    first, *rest = groups
    return [*rest, first] if isinstance(model, AwdLstm) else [*rest[:-1], rest[-1] + first]


def heldout(model: nn.Module, shards: Sequence[Path], seq_len: int, max_tokens: int) -> dict[str, Any]:
    """Return the mean loss in nats a token of held-out text, and how many tokens it is of; nothing where there is no such text."""
    if isinstance(model, AwdLstm):
        return heldout_loss(model, shards, seq_len, max_tokens)
    held = [folder for folder in shards if open_split(folder, "heldout").num_tokens]
    if not held or not max_tokens:
        return {}
    loader = TokenLoader(held, seq_len, 16, 0, split="heldout")
    total, count = 0.0, 0
    with torch.no_grad():
        for step in range(max(1, min(max_tokens // (16 * seq_len), int(1 / loader.epochs(1))))):
            loss, tokens, _ = causal_lm_loss(model, loader.rows(step * 16, 16))
            total, count = total + float(loss), count + int(tokens)
    return {"heldout_loss_nats": total / count, "heldout_tokens": count}
