"""Checkpoints: the whole state of training, written aside, flushed, renamed, and checked on the way back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from plinth.config import UserError, read_json, save_json
from plinth.models.tensor_file import save_tensors
from plinth.run import Run, file_sha256, publish_dir
from plinth.training.optim import Optimizer
from plinth.training.precision import MasterWeights

STATE_FILE = "state.safetensors"


def save_checkpoint(run: Run, step: int, masters: MasterWeights, optimizer: Optimizer, *, keep: int = 2) -> Path:
    """Write checkpoints/step_N with weights, optimizer state and their hash; keep the newest `keep`.

    The batches are a function of the step and the seed, so the step number is the loader's whole state.
    """
    path = run.checkpoints_dir / f"step_{step:06d}"
    tensors = {f"weight/{name}": tensor for name, tensor in masters.tensors.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.state.items()}
    with publish_dir(path) as folder:
        save_tensors(tensors, folder / STATE_FILE)
        digest = file_sha256(folder / STATE_FILE)
        save_json(folder / "state.json", {"step": step, "num_updates": optimizer.num_updates, "sha256": digest})
    for old in list_checkpoints(run)[:-keep]:
        for file in sorted(old.rglob("*"), reverse=True):
            file.unlink()
        old.rmdir()
    return path


def list_checkpoints(run: Run) -> list[Path]:
    """Return the published checkpoints, oldest first; unfinished ones carry another name."""
    return sorted(p for p in run.checkpoints_dir.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name))


def load_checkpoint(run: Run, masters: MasterWeights, optimizer: Optimizer) -> tuple[int, list[str]]:
    """Load the newest sound checkpoint; return its step (0 when there is none) and warnings about unsound ones.

    Raises UserError when checkpoints exist and none of them is sound.
    """
    warnings = []
    for path in reversed(list_checkpoints(run)):
        try:
            state, tensors = read_checkpoint(path)
        except UserError as error:
            warnings.append(str(error))
            continue
        masters.load({k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")})
        moments = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
        optimizer.load(moments, state["num_updates"])
        return state["step"], warnings
    if warnings:
        raise UserError("no sound checkpoint is left. " + " ".join(warnings) + " Start anew with another --out.")
    return 0, warnings


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read one checkpoint and compare its hash. Raises UserError when a byte differs or a file is cut off."""
    state = read_json(path / "state.json")
    file = path / STATE_FILE
    if not file.exists() or file_sha256(file) != state.get("sha256"):
        raise UserError(f"{file} is damaged: its SHA-256 differs from the one written beside it.")
    try:
        return state, load_file(file)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
