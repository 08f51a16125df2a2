"""`plinth merge`: an adapter added to the weights of its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from plinth.cli.options import read_options
from plinth.cli.output import emit


@dataclass(frozen=True)
class Options:
    """Write a model with an adapter (LoRA, rsLoRA or DoRA) merged into its weights, in fp32; it computes what both did together."""

    run: Annotated[Path, tyro.conf.Positional]
    """run, build or model folder that the adapter was trained on"""
    adapter: Annotated[Path, tyro.conf.Positional]
    """run with --adapter.rank N, or a folder that PEFT saved; the adapter of a reward model makes one of a decoder"""
    out: Path
    """model folder to write; must not hold anything yet"""
    onto: Literal["dequantised", "original"] | None = None
    """for an adapter trained on a base of 4 bits: add it to that base, read back into whole weights (dequantised: what was trained), or
    to the base as it was (original: something else)"""
    json: bool = False
    """answer with one JSON object on standard output"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when the folder is taken or the adapter does not fit the model."""
    options = read_options(Options, prog="plinth merge", args=argv)
    from plinth.models.hub import read_config
    from plinth.models.reward import RewardConfig
    from plinth.posttraining.adapted_models import merge_adapter

    folder, count = merge_adapter(options.run, options.adapter, options.out, options.onto)

    def render(console: Console) -> None:
        verb = "reward score" if isinstance(read_config(folder)[1], RewardConfig) else "generate"
        text = f"{folder}: an adapter of {count:,} parameters merged. Next: plinth {verb} {folder}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    emit({"path": str(folder), "adapter_params": count}, options.json, render)
    return 0
