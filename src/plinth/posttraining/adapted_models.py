"""Models with an adapter on them, from their two folders: merged in memory, or into a folder of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from plinth.config import UserError
from plinth.models.hub import load_decoder, save_model
from plinth.models.reward import RewardModel
from plinth.models.transformer import Transformer
from plinth.posttraining.adapter_files import count_trained, find_adapter, has_head, load_adapter, trained_on
from plinth.posttraining.lora import merge
from plinth.posttraining.reward import LoadedReward, start_model
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer

Onto = Literal["dequantised", "original"]


def load_adapted(base: Path, adapter: Path) -> tuple[Transformer | RewardModel, Tokenizer]:
    """Return the model of `base` with the adapter of `adapter` merged into it, fp32, and its tokenizer: what was trained.

    Where the adapter was trained on 4 bits, the base is rounded to them and read back. An adapter with the head of a reward model makes
    one of a decoder. Raises UserError when it does not fit.
    """
    source, folder = find_model(base), find_adapter(adapter)
    return merge(_adapted(source, folder, trained_on(folder))), Tokenizer.load(source)


def load_adapted_decoder(base: Path, adapter: Path) -> tuple[Transformer, Tokenizer]:
    """Return what `load_adapted` does. Raises UserError for the adapter of a reward model."""
    model, tokenizer = load_adapted(base, adapter)
    if not isinstance(model, Transformer):
        raise UserError(f"{adapter} makes a reward model of {base}, which writes no text. Score with it: `plinth reward score`.")
    return model, tokenizer


def load_adapted_reward(base: Path, adapter: Path) -> LoadedReward:
    """Return the reward model that an adapter makes of a base, ready to score. Raises UserError for an adapter of another model."""
    model, tokenizer = load_adapted(base, adapter)
    if not isinstance(model, RewardModel):
        raise UserError(f"{adapter} has no head of a reward model. Train one with `plinth reward {base} --data PAIRS --adapter.rank 16`.")
    return LoadedReward(model.eval(), tokenizer)


def _adapted(source: Path, folder: Path, format: Literal["nf4"] | None) -> Transformer | RewardModel:
    if has_head(folder):
        return load_adapter(start_model(source, 0), folder, format)
    return load_adapter(load_decoder(source), folder, format)


def merge_adapter(base: Path, adapter: Path, out: Path, onto: Onto | None = None) -> tuple[Path, int]:
    """Write the model of `base` with the adapter of `adapter` merged, in fp32, to `out`; returns the folder and the adapter's parameters.

    An adapter trained on 4 bits fits those: `onto` says whether it is added to the base rounded and read back (dequantised), which
    computes what was trained, or to the original, which does not.
    Raises UserError when `out` holds anything, the adapter does not fit, or it was trained on 4 bits and `onto` is not given.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is not empty. Name a new folder.")
    source, folder = find_model(base), find_adapter(adapter)
    format = trained_on(folder)
    if format is not None and onto is None:
        raise UserError(
            f"{folder} was trained on a base of 4 bits ({format}), and {base} has whole weights: added to them it would compute "
            "something that nobody trained or measured. Pass --onto dequantised for the model that was trained, in whole weights, "
            "or --onto original if you want the sum all the same."
        )
    if format is None and onto == "dequantised":
        raise UserError(f"{folder} was trained on whole weights: leave out --onto dequantised.")
    model = _adapted(source, folder, format if onto == "dequantised" else None)
    count = count_trained(model)
    save_model(merge(model), Tokenizer.load(source), out)
    return out, count
