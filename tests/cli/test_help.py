"""The help of the verbs of post-training: there before PyTorch is, and from tables that are those of what computes."""

import subprocess
import sys

from plinth.cli.main import VERBS
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


def test_the_names_that_help_offers_are_those_that_compute():
    assert (DIVERGENCE_NAMES, DTYPE_NAMES) == (tuple(DIVERGENCES), tuple(DTYPES)) and set(POOLINGS) == set(POOLS)
