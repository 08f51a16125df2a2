"""Supervised finetuning: next-token cross-entropy on the assistant's tokens only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from plinth.config import UserError
from plinth.data.buckets import EvenMicroBatches, LengthBuckets, PackedExamples, like_lengths
from plinth.data.rejects import row_counts
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.ops.dropout import step_seeds
from plinth.posttraining.adapter_files import frozen_identity, publish_model, with_adapters
from plinth.posttraining.adapter_training import adapted_job
from plinth.posttraining.batches import describe_examples, pack_rows, pad_rows
from plinth.posttraining.embedding_noise import noise_scales, noisy_lm_loss
from plinth.posttraining.examples import SHOWN, Conversation, rows_text
from plinth.posttraining.formats import read_examples
from plinth.posttraining.held_out import HeldOut, held_out_hooks, last_held_out
from plinth.posttraining.masks import answers_apart, render_weighted
from plinth.posttraining.sft_config import SftConfig
from plinth.run import Run, file_sha256, find_model
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer
from plinth.training.job import Job, run_job
from plinth.training.objectives import causal_lm_loss

JOIN_ROUNDS = 4  # each conversation is joined anew so often before a grouping comes again
ALONE_SHARE = 0.5  # groups of one conversation


def train_sft(
    out: Path,
    model_run: Path,
    messages: Path,
    config: SftConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Finetune a run's model on conversations, in any format of formats.FORMATS, and publish it as out/model.

    With adapters these are published as out/adapter, in PEFT's format, and out/model has them merged.
    Rejected rows are counted in the run's summary and told through `warn`, and so is a format other than messages.
    """
    source = find_model(model_run)
    tokenizer = Tokenizer.load(source)
    if config.join_turns > 1 and not tokenizer.is_ours:
        raise UserError(f"join_turns={config.join_turns} joins conversations in our own form; {source} has a chat template. Use 1.")
    found = read_examples(messages, "messages")
    if found.rejected or set(found.detected) != {"messages"}:
        warn(f"{messages}: {found.describe()}")
    apart = answers_apart(tokenizer, found)
    if divided := sum(count > 1 for count in Counter(apart.numbers).values()):
        warn(
            f"{messages}: {rows_text(divided)} learnt answer by answer, each in a conversation of its own: the model's chat template "
            "writes earlier answers in another way once more turns follow"
        )

    def prepare(config: SftConfig) -> Job:
        model = with_adapters(load_decoder(source), config.adapter, config.train.seed)
        limit = config.max_seq_len or model.config.max_seq_len
        examples, too_long = render_examples(tokenizer, apart.rows, limit, apart.numbers, leave_out=config.too_long == "leave-out")
        if too_long:
            warn(f"{messages}: left out {too_long}")
        rounds = 1 if config.join_turns == 1 else JOIN_ROUNDS
        if rounds > 1:
            examples = join_examples(examples, config.join_turns, rounds, limit, config.train.seed)
        lengths = [len(example.tokens) for example in examples]
        deal = deal_examples(lengths, config, limit)
        pad_id = tokenizer.pad_id or 0

        def batches_at(step: int):
            parts = [[[examples[i] for i in row] for row in part] for part in deal.rows(step)]
            if isinstance(deal, LengthBuckets):
                batches = [pad_rows([row[0].tokens for row in part], [row[0].loss_mask for row in part], pad_id) for part in parts]
            else:
                batches = [pack_rows(part, pad_id) for part in parts]
            if not config.embedding_noise:
                return batches
            scales = [noise_scales(part, config.embedding_noise, model.config.hidden_size) for part in parts]
            seeds = [step_seeds(config.train.seed, step, i, len(part)) for i, part in enumerate(parts)]
            return [(*batch, *noise) for batch, *noise in zip(batches, scales, seeds)]

        def describe_batch(step: int, rows: Sequence[int] | None) -> str:
            packed = [row.tolist() for part in deal.rows(step) for row in part]
            chosen = [i for row in (packed if rows is None else [packed[r] for r in rows]) for i in row]
            return describe_examples("example", chosen, None, lambda i: tokenizer.decode(examples[i].tokens[:40]))

        held_out = None if config.held_out is None else held_out_conversations(tokenizer, model, config, limit, warn)
        job = Job(
            model,
            partial(noisy_lm_loss if config.embedding_noise else causal_lm_loss, dynamic=config.loss == "dft"),
            batches_at,
            steps=deal.steps_for(config.epochs / rounds, config.tokens),
            tokenizer=tokenizer,
            publish=lambda folder: publish_model(model, tokenizer, folder, str(source)),
            description="finetuning",
            data={
                "messages_sha256": file_sha256(messages),
                "tokenizer_sha256": tokenizer.sha256,
                "seed": config.train.seed,
                **frozen_identity(config.adapter, source),
            },
            describe_batch=describe_batch,
            **held_out_hooks(held_out),
            summarise=lambda summary: (
                summary
                | {
                    "conversations": len(found.rows),
                    **row_counts(len(found.rejected), too_long=len(too_long.rows) if too_long else 0),
                    "epochs": rounds * summary["steps"] / deal.steps_per_epoch,
                    "supervised_share": sum(sum(example.loss_mask) for example in examples) / sum(lengths),
                }
                | last_held_out(Run(out).metrics())
            ),
        )
        return adapted_job(job, config.adapter, config.train)

    return run_job(
        out,
        "sft",
        config,
        prepare,
        parents=[model_run, messages, *([config.held_out] if config.held_out else [])],
        resume=resume,
        argv=argv,
        warn=warn,
    )


def held_out_conversations(tokenizer: Tokenizer, model: Transformer, config: SftConfig, limit: int, warn: Callable[[str], None]) -> HeldOut:
    """Return what measures the conversations of config.held_out by their plain cross-entropy; too long ones are left out, and told."""
    assert config.held_out is not None
    found = read_examples(config.held_out, "messages")
    if found.rejected:
        warn(f"{config.held_out}: {found.describe()}")
    apart = answers_apart(tokenizer, found)
    rows, too_long = render_examples(tokenizer, apart.rows, limit, apart.numbers, leave_out=True)
    if too_long:
        warn(f"{config.held_out}: left out {too_long}")
    pad_id = tokenizer.pad_id or 0
    parts = [[rows[i] for i in part] for part in like_lengths([len(row.tokens) for row in rows], config.micro_batch_size)]
    batches = [pad_rows([row.tokens for row in part], [row.loss_mask for row in part], pad_id) for part in parts]
    return HeldOut(model, causal_lm_loss, lambda: batches, config.held_out_every)


@dataclass(frozen=True)
class TooLong:
    """Conversations that are longer than they may be."""

    rows: list[int]
    """their numbers in the file"""
    lengths: list[int]
    """of each its tokens"""
    limit: int
    """tokens that a conversation may have"""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:SHOWN])) + (", ..." if len(self.rows) > SHOWN else "")
        median, ninth = (int(np.quantile(self.lengths, share, method="higher")) for share in (0.5, 0.9))
        return (
            f"{rows_text(len(self.rows))} of more than max_seq_len={self.limit} tokens (row {shown}; "
            f"their lengths: 50% {median}, 90% {ninth}, 100% {max(self.lengths)} tokens)"
        )


def deal_examples(lengths: Sequence[int], config: SftConfig, max_seq_len: int) -> LengthBuckets | PackedExamples | EvenMicroBatches:
    """Return what deals conversations of these lengths, in tokens, into steps; benchmarks/sft_packing.py compares the ways on a CPU."""
    sizes = (config.conversations_per_step, config.micro_batch_size, config.train.seed)
    inputs = [length - 1 for length in lengths]  # a last token is predicted but not read
    if config.packing:
        return PackedExamples(inputs, max_seq_len, *sizes)
    return EvenMicroBatches(inputs, *sizes) if config.unpadded else LengthBuckets(lengths, *sizes)


def render_examples(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    max_seq_len: int,
    numbers: Sequence[int] | None = None,
    *,
    leave_out: bool = False,
) -> tuple[list[Rendered], TooLong | None]:
    """Render conversations to tokens and masks; `numbers` are their rows in the file.

    Those longer than `max_seq_len` tokens are an error, or with `leave_out` come back as the second value. Raises UserError for one that
    has no supervised token, and when none is left.
    """
    numbers = numbers or range(1, len(conversations) + 1)
    rendered = [render_weighted(tokenizer, conversation.messages, conversation.tools) for conversation in conversations]
    long = [(number, len(each.tokens)) for number, each in zip(numbers, rendered) if len(each.tokens) > max_seq_len + 1]
    too_long = TooLong([number for number, _ in long], [length for _, length in long], max_seq_len) if long else None
    if too_long and (not leave_out or len(long) == len(rendered)):
        raise UserError(
            f"{too_long}. Shorten them, take a model with a longer context, or leave them out: --too-long leave-out."
            if len(long) < len(rendered)
            else f"{too_long}: none is left. Shorten them, or take a model with a longer context."
        )
    for number, each in zip(numbers, rendered):
        if not any(each.loss_mask[1:]):
            raise UserError(f"conversation {number} has no supervised token: no text of the assistant.")
    return [each for each in rendered if len(each.tokens) <= max_seq_len + 1], too_long


def join_examples(examples: list[Rendered], turns: int, rounds: int, max_seq_len: int, seed: int) -> list[Rendered]:
    """Join conversations at random: half stay alone, the others come in groups of 2 to `turns`, every answer supervised.

    A conversation is its turns end to end, so joining is concatenation. Each of `rounds` rounds holds every conversation once, in
    groups of its own; a group ends before it exceeds `max_seq_len` tokens.
    """
    rng = np.random.Generator(np.random.PCG64([seed, turns]))
    joined: list[Rendered] = []
    for _ in range(rounds):
        room = 0
        for i in rng.permutation(len(examples)):
            example = examples[i]
            if room > 0 and len(joined[-1].tokens) + len(example.tokens) <= max_seq_len:
                last = joined[-1]
                joined[-1] = Rendered(last.tokens + example.tokens, last.loss_mask + example.loss_mask)
                room -= 1
            else:
                joined.append(example)
                room = 0 if rng.random() < ALONE_SHARE else int(rng.integers(1, turns))
    return joined
