"""The command `plinth`: one verb a stage; a verb's module is imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import sys

from plinth import __version__
from plinth.cli.interrupts import INTERRUPTED, INTERRUPTED_LINE, Interrupts
from plinth.config import UserError, nearest

VERBS = {
    "build": ("plinth.cli.build", "from text and a budget to a served, aligned, evaluated model"),
    "plan": ("plinth.cli.plan", "the compute-optimal model for a budget on this machine, before anything is trained"),
    "data curate": ("plinth.cli.data_curate", "text files to a deduplicated, filtered corpus with a manifest"),
    "data pack": ("plinth.cli.data_pack", "a corpus to token shards"),
    "tokenizer train": ("plinth.cli.tokenizer_train", "a byte-level BPE tokenizer from a corpus"),
    "transfer coord-check": (
        "plinth.cli.transfer_coord_check",
        "do activations move alike at every width or depth? a picture and a verdict",
    ),
    "transfer lr-overlay": ("plinth.cli.transfer_lr_overlay", "loss against learning rate for several widths or depths, overlaid"),
    "transfer finetune-lm": ("plinth.cli.transfer_finetune_lm", "a language model to the text of a task, before it learns labels (ULMFiT)"),
    "transfer classify": (
        "plinth.cli.transfer_classify",
        "labels of texts, on a language model: pooled states, gradual unfreezing (ULMFiT)",
    ),
    "pretrain": ("plinth.cli.pretrain", "a model from scratch: a decoder from token shards, or another family with --family"),
    "extend": ("plinth.cli.extend", "a pretraining with more steps, from the checkpoint before its learning rate fell"),
    "inspect": ("plinth.cli.inspect_data", "training examples before they train: what is odd, and exactly which tokens are learnt"),
    "sft": ("plinth.cli.sft", "supervised finetuning on messages"),
    "merge": ("plinth.cli.merge", "an adapter (LoRA, rsLoRA, DoRA; PEFT's format) added to the weights of its model"),
    "prefer": ("plinth.cli.prefer", "preference tuning on pairs: DPO and its kin"),
    "feedback": ("plinth.cli.feedback", "preference pairs from a judge, asked in both orders: soft labels and how far to trust it"),
    "revise": ("plinth.cli.revise", "answers that a model criticises and rewrites by a constitution, as data to learn from"),
    "best-of": (
        "plinth.cli.best_of",
        "the best of several answers to each prompt, by a reward, a verifier or a judge, as data to learn from",
    ),
    "distill": ("plinth.cli.distill", "a student that learns a teacher's distributions of the next token"),
    "distill score": ("plinth.cli.distill_score", "a teacher's most probable tokens in a file, to distil from without the teacher"),
    "known": ("plinth.cli.known", "what a model knows of its training questions, and data that teach it to decline the rest"),
    "reward": ("plinth.cli.reward", "a reward model from pairs or rankings, beside the length and the words alone"),
    "reward score": ("plinth.cli.reward_score", "the answers of a file scored by a reward model"),
    "ppo": ("plinth.cli.ppo", "a model towards a reward of its own completions, learnt or known, with a critic"),
    "grpo": ("plinth.cli.grpo", "reinforcement learning with verifiable rewards: GRPO and its kin"),
    "finetune": ("plinth.cli.finetune", "an encoder on labelled texts, words or questions"),
    "predict": ("plinth.cli.predict", "labels, named entities or answers from a finetuned encoder or classifier, and their scores"),
    "fill": ("plinth.cli.fill", "words for the masks in a text, from an encoder"),
    "embed": ("plinth.cli.embed", "a vector for each text"),
    "evaluate": ("plinth.cli.evaluate", "held-out likelihood and questions, with intervals"),
    "samples": ("plinth.cli.samples", "right answers against the number of answers drawn, and what they cost"),
    "watch": ("plinth.cli.watch", "a run or a build as it goes, in the terminal or in the browser"),
    "report": ("plinth.cli.report", "report.html of a build, or of one run of any stage"),
    "attend": ("plinth.cli.attend", "what a model looks at in a text, by layer and head, as one page"),
    "params": ("plinth.cli.params", "parameters, operations, cache and memory of a model, from its config.json"),
    "import": ("plinth.cli.import_model", "a published model, from a folder or the hub, checked and compared with transformers"),
    "export": ("plinth.cli.export", "a folder that vLLM, transformers or llama.cpp serve, compared with them"),
    "generate": ("plinth.cli.generate", "text from a model"),
    "translate": ("plinth.cli.translate", "text from one language to another, or a test set scored by BLEU and chrF"),
    "chat": ("plinth.cli.chat", "talk to a model in the terminal"),
    "search": ("plinth.cli.search", "the documents of a run that hold given words, with source and licence"),
    "agent": ("plinth.cli.agent", "a question answered with a calculator and a search of the run's documents"),
    "image classify": ("plinth.cli.image_classify", "images sorted into classes that are only named"),
    "image retrieve": ("plinth.cli.image_retrieve", "the images nearest to a text, or how well captions find theirs"),
    "image ask": ("plinth.cli.image_ask", "a question on an image, answered by a decoder that sees"),
    "image shapes": ("plinth.cli.image_shapes", "drawn images with captions and questions to try these on"),
    "serve": ("plinth.cli.serve", "an OpenAI-compatible server and a chat page"),
}
SPREAD_VERBS = ("pretrain",)  # those that several processes, launched together, work on as one


def main(argv: list[str]) -> int:
    """Run one verb and return its exit code.

    0 only on success, 1 on a user's mistake, 2 on wrong usage, 75 when stopped and saved, 130 when interrupted by Ctrl-C.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"plinth {__version__}")
        return 0
    for length in (2, 1):
        verb = " ".join(argv[:length])
        if verb in VERBS:
            if refused := refuse_processes(verb):
                return refused
            return run_verb(VERBS[verb][0], argv[length:])
    if group := [verb for verb in VERBS if verb.startswith(argv[0] + " ")]:
        if len(argv) == 1 or argv[1] in ("-h", "--help", "help"):
            print(verb_lines(group))
            return 0 if len(argv) > 1 else 2
    name = " ".join(word for word in argv[:2] if not word.startswith("-"))
    guess = nearest(name, VERBS) or nearest(argv[0], VERBS)
    print(f"plinth: {argv[0]} is not a verb.{guess} `plinth --help` lists them.", file=sys.stderr)
    return 2


def refuse_processes(verb: str) -> int:
    """Return 1, after the first process has said why, when several processes were launched for a verb that is made for one."""
    count = os.environ.get("WORLD_SIZE", "1")
    if verb in SPREAD_VERBS or count == "1":
        return 0
    if os.environ.get("RANK", "0") == "0":
        print(f"plinth: `plinth {verb}` runs on one process, but WORLD_SIZE={count}. Call it without torchrun.", file=sys.stderr)
    return 1


def run_verb(module: str, argv: list[str]) -> int:
    """Call a verb's main; turn a user's mistake, a full disk or Ctrl-C into one clear line."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # fp32 products add in one order, wherever their operands lie in memory
    if os.environ.get("PLINTH_DEBUG"):
        return importlib.import_module(module).main(argv)
    try:
        return importlib.import_module(module).main(argv)
    except UserError as error:
        message, code = f"{error}", error.exit_code
    except OSError as error:
        message, code = describe_os_error(error), 1
    except KeyboardInterrupt:
        message, code = INTERRUPTED_LINE, INTERRUPTED
    if message:  # one of several processes stays silent when another has said it
        print(f"plinth: {message}", file=sys.stderr)
    return code


def describe_os_error(error: OSError) -> str:
    """Return one line for a failed file operation: which file, why, and what to do about a full disk."""
    place = f"{error.filename}: " if error.filename else ""
    advice = (
        " Free some space and pass --resume; nothing already published was touched."
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        else ""
    )
    return f"{place}{error.strerror or error}.{advice}"


def overview() -> str:
    """Return the text of `plinth --help`."""
    return "\n".join(
        [
            "usage: plinth VERB [OPTIONS]",
            "",
            "Make a foundation model that you control from the first byte to the last token.",
            "",
            verb_lines(list(VERBS)),
            "",
            "`plinth VERB --help` shows its options with units and defaults; --json answers for machines.",
        ]
    )


def verb_lines(verbs: list[str]) -> str:
    """Return a line a verb: its name and what it is for."""
    width = max(map(len, verbs))
    return "\n".join(f"  {verb:<{width}}  {VERBS[verb][1]}" for verb in verbs)


def entry() -> None:
    """Be the console script."""
    interrupts = Interrupts()
    interrupts.install()
    try:
        interrupts.code = main(sys.argv[1:])
    except SystemExit as end:  # help and wrong usage
        interrupts.code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # outside run_verb's block, or while it tells of another
        if os.environ.get("PLINTH_DEBUG"):
            raise
        interrupts.code = INTERRUPTED
    # Where the exception has passed through the exec of a text, as dataclasses and named tuples do, CPython remembers it as one that
    # nobody caught, and ends `python -m plinth` by the signal; the next exec forgets it (run_eval_code_obj in Python/pythonrun.c).
    exec("")
    sys.exit(interrupts.code)
