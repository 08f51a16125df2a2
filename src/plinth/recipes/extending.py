"""Extending a pretraining: the stable phase goes on from a kept checkpoint, with a longer or shorter horizon."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from plinth.config import UserError, to_dict
from plinth.recipes.pretraining import PretrainConfig, pretrain, read_config
from plinth.run import Run, is_checkpoint, publish_dir
from plinth.training.checkpoint import check_sealed
from plinth.training.parallel import ParallelConfig
from plinth.training.saving import DATA_FILE


def extend(
    out: Path,
    source: Path,
    steps: int,
    *,
    decay_fraction: float | None = None,
    shards: Sequence[Path] = (),
    tokenizer_dir: Path | None = None,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Run:
    """Train the run `source` as if it had been begun with `steps` updates, from its last checkpoint before either decay.

    Everything but the horizon is as in `source`, so the result equals, bit for bit, a run of `steps` updates from the beginning.
    `decay_fraction`, shards and tokenizer are those of `source` unless given; other shards are refused, a moved folder is not.
    Returns the finished run at `out`; if it is stopped, `plinth pretrain --resume --out OUT` goes on with it.
    Raises UserError when `source` is no pretraining or keeps no checkpoint to begin from.
    """
    old = Run.open(source)
    if (stage := old.provenance["stage"]) != "pretrain":
        raise UserError(f"{source} is a run of the stage {stage}; only pretraining can be extended.")
    before = replace(read_config(source), parallel=ParallelConfig())  # this command runs on one process
    if len(before.schedule_stages()) > 1:
        raise UserError(f"{source} was trained in stages, whose bounds move with the number of steps, so it cannot be extended.")
    fraction = before.train.decay_fraction if decay_fraction is None else decay_fraction
    config = replace(before, train=replace(before.train, steps=steps, decay_fraction=fraction))
    checkpoint = choose_checkpoint(old, before, config, warn)
    *old_shards, old_tokenizer = [Path(p["path"]) for p in old.provenance["parents"] if not is_checkpoint(Path(p["path"]))]
    folders = list(shards) or [_there(path, old, "--shards") for path in old_shards]
    tokenizer_dir = tokenizer_dir or _there(old_tokenizer, old, "--tokenizer")
    Run(out).check_free()
    with publish_dir(out) as folder:
        new = Run.create(folder, "pretrain", to_dict(config), [*folders, tokenizer_dir, checkpoint], argv, config.train.seed)
        shutil.copytree(checkpoint, new.checkpoints_dir / checkpoint.name)
        shutil.copy(old.checkpoints_dir / DATA_FILE, new.checkpoints_dir)
        shutil.copy(old.path / "metrics.jsonl", new.path)
    return pretrain(out, folders, tokenizer_dir, config, resume=True, argv=argv, warn=warn)


def choose_checkpoint(run: Run, before: PretrainConfig, after: PretrainConfig, warn: Callable[[str], None]) -> Path:
    """Return the newest sound checkpoint of `run` at which both schedules are the same so far.

    Raises UserError that lists what there is when none will do.
    """
    limit = min(before.train.decay_start, after.train.decay_start)
    found = run.checkpoints()
    for step, path in reversed(found):
        if step <= limit:
            try:
                check_sealed(path)
            except UserError as error:
                warn(str(error))
                continue
            return path
    steps = ", ".join(str(step) for step, _ in found) or "none"
    raise UserError(
        f"{run.path} keeps no sound checkpoint at or before step {limit}, up to which both schedules are the same "
        f"(its own decay begins after step {before.train.decay_start}, with steps={after.train.steps} after {after.train.decay_start}; "
        f"checkpoints: {steps}). Ask for more steps, or train anew with keep_pre_decay or keep_every_steps."
    )


def _there(path: Path, run: Run, option: str) -> Path:
    if not path.exists():
        raise UserError(f"{path}, from which {run.path} was made, is not there from here. Name it with {option}.")
    return path
