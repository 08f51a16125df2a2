"""What is learnt by the chat templates that TRL keeps copies of: Plinth on the published ones, TRL on its versions for training.

    python benchmarks/chat_templates.py --trl PYTHON

PYTHON is that of an environment with TRL; its templates are read from there, and nothing of them is kept but what they gave. Each gets a
tokenizer of single bytes with the special tokens that it spells. A conversation of two questions and answers is rendered, and of each side
is asked whether the learnt stretches are the answers, each with a token that ends generation, whether nothing is learnt behind that, and
whether the tokens before an answer are those that the published template asks for it with.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from plinth.config import UserError
from plinth.posttraining.examples import Conversation, Examples
from plinth.posttraining.masks import answers_apart, render_row
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from record import write_record

SPECIAL = re.compile(r"<[|｜][^<>'\"{}]*?[|｜]>|</?s>|<(?:start|end)_of_turn>|<sop>|\[gMASK\]|<\|?turn\|?>|<end_of_utterance>")
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "<turn|>", "<end_of_turn>",
        "<|end|>", "<|user|>", "</s>", "<｜end▁of▁sentence｜>", "<|endoftext|>")  # fmt: skip
ANSWERS = ("Grüße, the cat", "2 + 2 = 4")
TALK = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "1 + 1 <b>"},
    {"role": "assistant", "content": ANSWERS[1]},
]
Stretch = tuple[list[int], list[int]]
"""the tokens before a learnt stretch, and its own"""


def write_tokenizer(folder: Path, published: str, template: str) -> Tokenizer:
    """Write a tokenizer of bytes with a template and the special tokens that the published template spells."""
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = sorted(set(SPECIAL.findall(published)))
    named = {
        "bos_token": "<s>",
        "eos_token": next((end for end in ENDS if end in found and end not in ("<|end|>", "<|user|>")), "<|endoftext|>"),
    }
    backend.add_special_tokens([*found, *(token for token in named.values() if token not in found)])
    backend.add_tokens(["<think>", "</think>"])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **named})
    )
    ends = {i for i in map(backend.token_to_id, ENDS) if i is not None}
    if "<|return|>" in found:
        ends.discard(backend.token_to_id("<|end|>"))  # which ends a message, not what is said
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))
    return Tokenizer.load(folder)


def stretches(tokens: list[int], mask: list[bool]) -> list[Stretch]:
    """Return the learnt stretches with what stands before them."""
    starts = [i for i, flag in enumerate(mask) if flag and not (i and mask[i - 1])]
    ends = [next((j for j in range(i, len(mask)) if not mask[j]), len(mask)) for i in starts]
    return [(tokens[:start], tokens[start:end]) for start, end in zip(starts, ends)]


def ours(tokenizer: Tokenizer) -> list[Stretch]:
    rows = answers_apart(tokenizer, Examples("messages", [Conversation(TALK)], [1], {})).rows
    parts = [render_row(tokenizer, row)[0].rendered for row in rows]
    return [stretch for part in parts for stretch in stretches(part.tokens, part.loss_mask)]


def theirs(folder: Path) -> list[Stretch]:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    found = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    return stretches(list(found["input_ids"]), [bool(flag) for flag in found["assistant_masks"]])


def judge(tokenizer: Tokenizer, found: list[Stretch]) -> dict[str, Any]:
    """Return what a side learns, and whether that is each answer, with an end, nothing behind that, and its prompt before it."""
    said = [b"".join(tokenizer.token_bytes(i, skip_special=False) for i in learnt).decode() for _, learnt in found]
    whole = len(said) == len(ANSWERS) and all(answer in text for answer, text in zip(ANSWERS, said))
    whole = whole and not any(message["content"] in text for message in TALK[::2] for text in said)
    prompts = [render(tokenizer, TALK[:count], add_generation_prompt=True).tokens for count in (1, 3)]
    return {
        "learnt": said,
        "answers": whole,
        "ends": whole and all(set(learnt) & set(tokenizer.end_ids) for _, learnt in found),
        "stops": whole and all(learnt[-1] in tokenizer.end_ids for _, learnt in found),
        "prompts": whole and all(before == prompt for (before, _), prompt in zip(found, prompts)),
    }


def measure(file: Path, folder: Path) -> dict[str, Any]:
    """Return the row of one published template."""
    published, training = file.read_text(), file.with_name(f"{file.stem}_training.jinja")
    row: dict[str, Any] = {"template": file.stem, "plinth": None, "trl": None}
    tokenizer = write_tokenizer(folder / "ours", published, published)
    try:
        row["plinth"] = judge(tokenizer, ours(tokenizer))
    except UserError as error:
        row["refused"] = str(error)
    if training.is_file():
        write_tokenizer(folder / "theirs", published, training.read_text())
        row["trl"] = judge(tokenizer, theirs(folder / "theirs")) if "refused" not in row else {"learnt": said_by(tokenizer, folder)}
    return row


def said_by(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Return what TRL's version learns where the published one is refused."""
    try:
        return [b"".join(tokenizer.token_bytes(i, skip_special=False) for i in learnt).decode() for _, learnt in theirs(folder / "theirs")]
    except Exception as error:  # of the template, which reads contents of another kind
        return [f"fails: {error}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl", type=Path, required=True, help="Python of an environment that has TRL")
    python = str(parser.parse_args().trl)
    ask = "import importlib.metadata as m, importlib.util as u; print(m.version('trl'), u.find_spec('trl').submodule_search_locations[0])"
    version, place = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
    files = sorted((Path(place.strip()) / "chat_templates").glob("*.jinja"))
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(file, Path(folder) / file.stem) for file in files if not file.stem.endswith("_training")]
    question = (
        "By published chat templates, is each answer learnt, to a token that ends generation, behind the very prompt it is asked for with?"
    )
    print(write_record("chat_templates", question, rows, versions_of_peers={"trl": version}))


if __name__ == "__main__":
    main()
