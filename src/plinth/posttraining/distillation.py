"""Distillation: a student learns the distributions of a teacher's next tokens, on given answers or on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from plinth.config import UserError
from plinth.data.buckets import LengthBuckets
from plinth.data.rejects import row_counts
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.ops.loss import token_log_probs
from plinth.ops.moe import Routing
from plinth.posttraining.adapter_files import frozen_identity, publish_model, with_adapters
from plinth.posttraining.adapter_training import adapted_job
from plinth.posttraining.batches import describe_examples, pad_rows
from plinth.posttraining.distill_config import DistillConfig
from plinth.posttraining.distill_losses import Head, TopTokens, chunked_distillation_loss, later_returns
from plinth.posttraining.examples import Conversation, Examples
from plinth.posttraining.learnt_texts import check_same_tokenizer, read_texts, render_texts
from plinth.posttraining.masks import plain_messages
from plinth.posttraining.rollouts import SampleConfig, Sampler
from plinth.posttraining.teacher_file import TeacherFile
from plinth.posttraining.teacher_parts import is_teacher_file
from plinth.run import Run, file_sha256, find_model, tree_sha256, usable_cores
from plinth.tokenizer.chat import Rendered, render
from plinth.tokenizer.encode import Tokenizer
from plinth.training.device import choose_device
from plinth.training.job import Job, run_job
from plinth.training.objectives_moe import add_router_losses
from plinth.training.precision import DTYPES
from plinth.training.step import Sum


def distill(
    out: Path,
    student_run: Path,
    teacher_run: Path,
    data: Path,
    config: DistillConfig,
    *,
    resume: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Teach a run's model another's distributions over the learnt tokens of `data` and publish it as out/model.

    `data` is anything that is read as messages or text; the tokens that `plinth inspect` shows as learnt count.
    The teacher is a run, or what `teacher_file.write_teacher_file` wrote of one for the same data.
    With adapters these are published as out/adapter, in PEFT's format, and out/model has them merged.
    Raises UserError when the two tokenizers differ, or the file is of other data.
    """
    stored = is_teacher_file(teacher_run)
    sources = find_model(student_run), teacher_run if stored else find_model(teacher_run)
    tokenizer = Tokenizer.load(sources[0])
    if not stored:
        check_same_tokenizer(tokenizer, Tokenizer.load(sources[1]), sources)
    found = read_texts(data, tokenizer)
    if found.rejected:
        warn(f"{data}: {found.describe()}")

    def prepare(config: DistillConfig) -> Job:
        student, teacher = load_decoder(sources[0]), None if stored else load_decoder(sources[1])
        student = with_adapters(student, config.adapter, config.train.seed)
        limit = config.max_seq_len or min(each.config.max_seq_len for each in (student, teacher) if each is not None)
        examples = render_texts(tokenizer, found, limit)
        check_teacher(config, stored)
        said = TeacherFile.open(sources[1], data, tokenizer, examples) if stored else None
        if said is not None:
            said.check_temperature(config.temperature)
            said.check_vocabulary(len(student.output_weight))
        own = OwnAnswers(student, tokenizer, found, config, limit) if config.on_policy_share else None
        buckets = LengthBuckets(
            [len(example.tokens) for example in examples], config.examples_per_step, config.micro_batch_size, config.train.seed
        )

        def begin(run: Run, config: DistillConfig) -> None:
            if teacher is not None:
                teacher.to(choose_device(config.train.device), DTYPES[config.train.dtype or "float32"]).eval().requires_grad_(False)

        def batches_at(step: int):
            parts = [part.tolist() for part in buckets.indices(step)]
            written = {} if own is None else own.write([i for part in parts for i in part], step)
            batches = []
            for part in parts:
                rows = [written.get(i, examples[i]) for i in part]
                batch = pad_rows([row.tokens for row in rows], [row.loss_mask for row in rows], tokenizer.pad_id or 0)
                more = () if said is None else said.columns(part, batch[1])
                batches.append((*batch, *more, *([torch.tensor([i in written for i in part])] if config.long_term else [])))
            return batches

        def publish(folder: Path) -> None:
            if own is not None:
                own.close()
            publish_model(student, tokenizer, folder, str(sources[0]))

        job = Job(
            student,
            lambda model, batch: distill_loss(model, said or teacher, batch, config),
            batches_at,
            steps=buckets.steps_for(config.epochs, config.tokens),
            tokenizer=tokenizer,
            publish=publish,
            description="distilling",
            data={
                "data_sha256": file_sha256(data),
                "teacher_sha256": tree_sha256(sources[1]),
                "tokenizer_sha256": tokenizer.sha256,
                "seed": config.train.seed,
                **frozen_identity(config.adapter, sources[0]),
            },
            begin=begin,
            step_metrics=(lambda steps: {}) if own is None else (lambda steps: own.metrics),
            describe_batch=lambda step, rows: describe_examples(
                "example", np.concatenate(buckets.indices(step)).tolist(), rows, lambda i: tokenizer.decode(examples[i].tokens[:40])
            ),
            summarise=lambda summary: (
                summary
                | {"examples": len(examples), "epochs": summary["steps"] / buckets.steps_per_epoch}
                | row_counts(len(found.rejected))
            ),
        )
        return adapted_job(job, config.adapter, config.train)

    return run_job(
        out, "distill", config, prepare, parents=[student_run, teacher_run, data], resume=resume, argv=argv, warn=warn
    )  # fmt: skip


class OwnAnswers:
    """Answers that the student writes in place of the data's, from its weights as they are.

    Every update's are its own, so nothing of them is kept between updates and a resumed run writes the same.
    Source: Agarwal et al. 2023 (GKD), arXiv:2306.13649, algorithm 1.  Differs: a share of each update's examples, where theirs draws for
    each update whether all of it or nothing is written by the student.
    """

    def __init__(self, student: Transformer, tokenizer: Tokenizer, found: Examples, config: DistillConfig, max_seq_len: int):
        if found.kind != "messages":
            raise UserError(f"on_policy_share={config.on_policy_share} needs prompts to answer, and the data are plain texts. Use 0.")
        self.prompts = [prompt_tokens(tokenizer, row) for row in found.rows]
        room = max_seq_len - config.max_tokens
        for number, prompt in zip(found.numbers, self.prompts):
            if len(prompt) > room:
                raise UserError(
                    f"the prompt of row {number} has {len(prompt)} tokens; beside max_tokens={config.max_tokens} the context of both "
                    f"models has room for {room}. Shorten it, or lower max_tokens."
                )
        self.share, self.seed = config.on_policy_share, config.train.seed
        self.metrics: dict[str, float] = {}
        sampling = SampleConfig(group_size=1, max_tokens=config.max_tokens, temperature=config.sampling_temperature)
        threads = config.train.num_threads or usable_cores()
        self._sampler = Sampler(student, tokenizer.end_ids, sampling, threads, room, rescores=False)

    def close(self) -> None:
        """End the sampler's threads."""
        self._sampler.close()

    def write(self, indices: Sequence[int], step: int) -> dict[int, Rendered]:
        """Return new answers to a share of the examples, drawn by the step, each with its prompt; the answer is learnt."""
        rng = np.random.Generator(np.random.PCG64([self.seed, step]))
        chosen = sorted(int(i) for i in rng.permutation(indices)[: round(self.share * len(indices))])
        if not chosen:
            return {}
        rollouts = self._sampler.sample([self.prompts[i] for i in chosen], [self.seed, step])
        lengths = [len(completion) for completion in rollouts.completions]
        self.metrics = {"own_answers": len(chosen) / len(indices), "completion_tokens": float(np.mean(lengths)),
                        "finished": float(np.mean(rollouts.finished))}  # fmt: skip
        return {
            i: Rendered(prompt + completion, [False] * len(prompt) + [True] * len(completion))
            for i, prompt, completion in zip(chosen, rollouts.prompts, rollouts.completions)
        }


def prompt_tokens(tokenizer: Tokenizer, row: Conversation) -> list[int]:
    """Return the tokens before a conversation's last answer, with the assistant's header."""
    last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    return render(tokenizer, plain_messages(tokenizer, row.messages[:last]), add_generation_prompt=True, tools=row.tools).tokens


def distill_loss(
    student: Transformer, teacher: Transformer | TeacherFile, batch: tuple[torch.Tensor, ...], config: DistillConfig
) -> tuple[torch.Tensor, Sum, dict[str, Sum]]:
    """Return (loss sum, counted tokens, metric sums) of (inputs (B, T), targets (B, T)), targets below 0 uncounted.

    With a teacher's file its columns follow (`TeacherFile.columns`); with config.long_term which rows are the student's own, (B,).
    """
    inputs_BT, targets_BT, *more = batch
    routings: list[Routing] = []
    targets_N, student_head = targets_BT.flatten(), head_of(student, inputs_BT, routings)
    options = config.loss_options
    teacher_head: Head | TopTokens
    if isinstance(teacher, TeacherFile):
        ids_NK, log_probs_NK, rest_N, target_log_probs_N = (each.flatten(0, 1) for each in more[:4])
        teacher_head = TopTokens(ids_NK, log_probs_NK, rest_N, target_log_probs_N, teacher.vocab_size)
        options["tail"] = config.tail or "bucket"
    else:
        with torch.no_grad():
            teacher_head = head_of(teacher, inputs_BT)
        if config.long_term:
            options["returns_N"] = own_returns(student_head, teacher_head, targets_BT, more[0], config.length_normalised)
    loss, count, measures = chunked_distillation_loss(student_head, teacher_head, targets_N, **options)
    if not routings:
        return loss, count, {**measures}
    loss, _, balance = add_router_losses(loss, count, routings, targets_N >= 0, student.config)
    return loss, count, {**measures, **balance}


@torch.no_grad()
def own_returns(student: Head, teacher: Head, targets_BT: torch.Tensor, own_B: torch.Tensor, normalised: bool) -> torch.Tensor:
    """Return `later_returns` of the rows that the student wrote, flattened, 0 in the others."""
    counted_BT = (targets_BT >= 0) & own_B[:, None]
    places = counted_BT.flatten().nonzero()[:, 0]
    size = min(student.vocab_size, teacher.vocab_size)
    found = []
    for head in (student, teacher):
        chosen, values_N = head.rows(places), torch.zeros(targets_BT.numel(), device=targets_BT.device)
        values_N[places] = token_log_probs(chosen.hidden_ND, chosen.weight_VD[:size], targets_BT.flatten()[places], chosen.cap)
        found.append(values_N.view(targets_BT.shape))
    return later_returns(*found, counted_BT, normalised=normalised).flatten()


def check_teacher(config: DistillConfig, stored: bool) -> None:
    """Raise UserError for what a teacher's file cannot do, or for what only one does."""
    if stored and config.on_policy_share:
        raise UserError(
            f"on_policy_share={config.on_policy_share} asks the teacher about new answers, and its file holds the data's alone. "
            "Name the teacher's run, or leave it out."
        )
    if not stored and config.tail is not None:
        raise UserError(f"tail={config.tail} is for a teacher's file, and this teacher is a model. Leave it out.")


def head_of(model: Transformer, inputs_BT: torch.Tensor, routings: list[Routing] | None = None) -> Head:
    """Return a model's hidden states, flattened, with its output matrix; what routers decide is appended to `routings`."""
    more = {"routings": routings} if model.config.num_experts and routings is not None else {}
    return Head(model(inputs_BT, **more).flatten(0, 1), model.output_weight, model.config.logit_softcap)
