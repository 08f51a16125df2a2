"""The help of the verbs: one default told of each option; of post-training also there before PyTorch is, and from tables that are those of
what computes."""

import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from plinth.cli.main import VERBS, main
from plinth.cli.options import read_options
from plinth.cli.pretrain import FAMILIES
from plinth.models.text_classifier_config import POOLINGS
from plinth.ops.pooling import POOLS
from plinth.posttraining.distill_config import DIVERGENCE_NAMES
from plinth.posttraining.distill_losses import DIVERGENCES
from plinth.training.config import DTYPE_NAMES
from plinth.training.precision import DTYPES

POST_TRAINING = (
    "inspect", "sft", "merge", "prefer", "feedback", "revise", "best-of", "distill", "distill score", "known", "reward", "reward score",
    "ppo", "grpo", "transfer finetune-lm", "transfer classify", "report",
)  # fmt: skip
HEAVY = ("torch", "pyarrow", "transformers")
CODE = """
import contextlib, io, sys
from plinth.cli.main import main
heavy, verbs = sys.argv[1].split(), sys.argv[2:]
for verb in verbs:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*verb.split(), "--help"])
    found = [module for module in heavy if module in sys.modules]
    if found or "usage: plinth " + verb not in text.getvalue():
        print(verb, found, text.getvalue()[:80])
        break
"""


def test_every_verb_of_post_training_shows_its_help_before_pytorch_is_imported():
    assert set(POST_TRAINING) <= set(VERBS)
    done = subprocess.run([sys.executable, "-c", CODE, " ".join(HEAVY), *POST_TRAINING], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr[-500:]


HELPS = [
    *(verb.split() for verb in VERBS),
    *(["pretrain", "--family", family] for family in FAMILIES),
    ["plan", "--gpus", "8"],
]


def told_options(text: str) -> list[str]:
    """Return what a help of one column of boxes says of each option and positional argument, each in one line."""
    found: list[str] = []
    for line in text.splitlines():
        within_box = line[:2] in ("│ ", "  ")  # boxes are drawn where the encoding has them
        if within_box and line[2:3].strip():
            found.append("")
        if within_box and found:
            found[-1] += line.strip("│ ") + " "
    return [option for option in found if "(default:" in option or "(required)" in option or re.match("--[a-z]", option)]


def help_of(words: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", "129")
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_help_tells_one_default_of_each_option(monkeypatch, capsys):
    for words in HELPS:
        options = told_options(help_of(words, monkeypatch, capsys))
        assert len(options) > 1, words
        for option in options:
            assert option.count("(default:") + option.count("(required)") == 1, f"plinth {' '.join(words)}: {option}"


@dataclass(frozen=True)
class Inner:
    steps: int | None = None
    """updates (default: as many as (all) epochs give), at most"""
    names: tuple[str, ...] = ()
    """names to leave out"""


@dataclass(frozen=True)
class Outer:
    as_declared: Inner = field(default_factory=Inner)
    set_by_the_verb: Inner = field(default_factory=lambda: Inner(7, ("a", "b")))
    cut: bool = False
    """cut what is longer (default: it is an error)"""


def test_words_stand_for_the_declared_default_and_give_way_to_another(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "129")
    with pytest.raises(SystemExit):
        read_options(Outer, prog="verb", args=["--help"])
    told = {option.split()[0].rstrip(","): option for option in told_options(capsys.readouterr().out)}
    assert "updates (default: as many as (all) epochs give), at most " in told["--as-declared.steps"]
    assert "(default: none)" in told["--as-declared.names"]
    assert "updates, at most (default: 7)" in told["--set-by-the-verb.steps"]
    assert "(default: a b)" in told["--set-by-the-verb.names"]
    assert "cut what is longer (default: it is an error) " in told["--cut"]
    chosen = ["--cut", "--as-declared.steps", "3", "--set-by-the-verb.names", "c"]
    assert read_options(Outer, prog="verb", args=chosen) == Outer(Inner(3), Inner(7, ("c",)), cut=True)


def test_the_names_that_help_offers_are_those_that_compute():
    assert (DIVERGENCE_NAMES, DTYPE_NAMES) == (tuple(DIVERGENCES), tuple(DTYPES)) and set(POOLINGS) == set(POOLS)
