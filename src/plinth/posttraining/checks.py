"""What people want to know of training examples before they train: each finding with its count and its row numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

from plinth.config import UserError
from plinth.inference.verifiers import check_answer
from plinth.posttraining.examples import Conversation, Examples, Preference, Prompt, Ranking, Row, TextRow, Unpaired, rows_text
from plinth.posttraining.masks import Part
from plinth.tokenizer.chat import Message
from plinth.tokenizer.encode import Tokenizer

MEANINGS = {
    "roles_do_not_alternate": "the same speaker twice in a row, or the assistant first",
    "late_system": "a message of the system behind the first message",
    "empty_question": "a message of the user is empty or blank",
    "last_is_not_assistant": "messages behind the last answer, which nobody learns",
    "empty_reply": "an answer that is learnt is empty or blank",
    "empty_text": "the text is empty or blank",
    "several_turns": "an answer to a prompt goes on over several messages",
    "identical_pair": "chosen and rejected are the same",
    "answer_unreadable": "its verifier does not exist, or cannot read the answer to compare with",
    "tied_ranks": "answers of equal rank, which say nothing of each other",
    "duplicate": "the same as an earlier row",
    "near_duplicate": "an earlier row but for letters' case and blanks",
    "overlap": "also in the held-out file, but for letters' case and blanks",
    "length_decides": "60 % or more of the pairs are told apart by length alone",
    "label_imbalance": "80 % or more of the labels are the same",
    "nothing_learnt": "no token of a sequence is learnt",
    "hardly_learnt": "less than 1 % of a sequence's tokens are learnt",
    "all_learnt": "every token of a conversation is learnt, the user's too",
    "end_not_learnt": "an answer that is learnt stops before a token that ends it, so the model would not learn to stop",
    "answers_apart": "learnt answer by answer, as the chat template writes earlier answers in another way once more turns follow",
    "bos_doubled": "a sequence begins with its first token twice",
    "too_long": "more tokens than the model's context",
    "pad_is_end": "the tokenizer pads with the token that ends a text; masks here go by position, so that token stays learnt",
}
REMARKS = ("answers_apart", "pad_is_end")  # what the tokenizer brings along, and is taken care of
LENGTH_SHARE, LABEL_SHARE, HARDLY = 0.6, 0.8, 0.01
FEWEST = 20  # pairs or labels below which a share says nothing


@dataclass(frozen=True)
class Finding:
    """One thing that is odd."""

    name: str
    """a key of MEANINGS"""
    rows: list[int] = field(default_factory=list)
    """numbers of the rows, each once; empty for a finding on the whole file"""
    value: float | None = None
    """the share, for a finding on the whole file"""

    def describe(self) -> str:
        """Return one line: how many rows, what it means, and the first of their numbers."""
        if not self.rows:
            return f"{MEANINGS[self.name]}{'' if self.value is None else f' ({self.value:.1%})'}"
        shown = ", ".join(map(str, self.rows[:5])) + (", ..." if len(self.rows) > 5 else "")
        return f"{rows_text(len(self.rows))}: {MEANINGS[self.name]} (row {shown})"


def check_rows(examples: Examples, held_out: Examples | None = None) -> list[Finding]:
    """Return what is odd about the rows themselves, no tokenizer needed; `held_out` is a file that must share no row with them."""
    found: dict[str, list[int]] = {}
    exact: set[str] = set()
    near: set[str] = set()
    kept = {_folded(_key(row)) for row in held_out.rows} if held_out else set()
    for number, row in zip(examples.numbers, examples.rows):
        names = set(_issues(row))
        key = _key(row)
        folded = _folded(key)
        if folded in near:
            names.add("duplicate" if key in exact else "near_duplicate")
        if folded in kept:
            names.add("overlap")
        exact.add(key)
        near.add(folded)
        for name in names:
            found.setdefault(name, []).append(number)
    return _in_order(found) + _on_the_whole(examples.rows)


def check_tokens(parts: Sequence[tuple[int, Part]], tokenizer: Tokenizer, max_seq_len: int | None) -> list[Finding]:
    """Return what is odd about rendered rows, given as (row number, part): masks, ends and lengths.

    A sequence is too long when it has more than max_seq_len + 1 tokens, as the last is predicted but not read.
    """
    numbers = [number for number, part in parts if part.name == "conversation"]
    found = {"answers_apart": [a for a, b in pairwise(numbers) if a == b]}
    for number, part in parts:
        for name in _token_issues(part, tokenizer, max_seq_len):
            if not found.setdefault(name, []) or found[name][-1] != number:
                found[name].append(number)
    whole = [Finding("pad_is_end")] if tokenizer.pad_id is not None and tokenizer.pad_id in tokenizer.end_ids else []
    return _in_order(found) + whole


def _in_order(found: dict[str, list[int]]) -> list[Finding]:
    return [Finding(name, list(dict.fromkeys(found[name]))) for name in MEANINGS if found.get(name)]


def _issues(row: Row) -> Iterator[str]:
    match row:
        case TextRow():
            if not row.text.strip():
                yield "empty_text"
        case Conversation():
            yield from _turn_issues(row.messages)
            if row.messages[-1]["role"] != "assistant":
                yield "last_is_not_assistant"
        case Preference():
            yield from _answer_issues(row.prompt, row.chosen, row.rejected)
            if row.chosen == row.rejected:
                yield "identical_pair"
        case Ranking():
            yield from _answer_issues(row.prompt, *row.completions)
            if len(set(row.ranks)) < len(row.ranks):
                yield "tied_ranks"
        case Unpaired():
            yield from _answer_issues(row.prompt, row.completion)
        case Prompt():
            yield from _turn_issues(row.messages)
            try:
                check_answer(row.verifier or "exact", row.answer or "")
            except UserError:
                yield "answer_unreadable"


def _answer_issues(prompt: list[Message], *answers: list[Message]) -> Iterator[str]:
    for answer in answers:
        yield from _turn_issues([*prompt, *answer], learnt_from=len(prompt))
        if len(answer) > 1:
            yield "several_turns"


def _turn_issues(messages: list[Message], learnt_from: int = 0) -> Iterator[str]:
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[:1] == ["assistant"] or any(a == b and a != "tool" for a, b in pairwise(roles)):
        yield "roles_do_not_alternate"
    if any(message["role"] == "system" for message in messages[1:]):
        yield "late_system"
    if any(message["role"] == "user" and not (message.get("content") or "").strip() for message in messages):
        yield "empty_question"
    for message in messages[learnt_from:]:
        said = (message.get("content") or "").strip() or message.get("tool_calls")
        if message["role"] == "assistant" and message.get("weight", 1) and not said:
            yield "empty_reply"


def _token_issues(part: Part, tokenizer: Tokenizer, max_seq_len: int | None) -> Iterator[str]:
    tokens, mask = part.rendered.tokens, part.rendered.loss_mask
    learnt = sum(mask)
    if part.name != "prompt" and learnt == 0:
        yield "nothing_learnt"
    elif 0 < learnt < HARDLY * len(mask):
        yield "hardly_learnt"
    if part.name not in ("text", "prompt") and len(mask) > 1 and all(mask[1:]):
        yield "all_learnt"
    last = [i for i, flag in enumerate(mask) if flag and not (i + 1 < len(mask) and mask[i + 1])]
    if any(tokens[i] not in tokenizer.end_ids for i in last):
        yield "end_not_learnt"
    if len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.start_id:
        yield "bos_doubled"
    if max_seq_len is not None and len(tokens) > max_seq_len + 1:
        yield "too_long"


def _on_the_whole(rows: Sequence[Row]) -> list[Finding]:
    findings = []
    lengths = [(_characters(row.chosen), _characters(row.rejected)) for row in rows if isinstance(row, Preference)]
    told_apart = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    labels = [row.label for row in rows if isinstance(row, Unpaired)]
    for name, flags, limit in (("length_decides", told_apart, LENGTH_SHARE), ("label_imbalance", labels, LABEL_SHARE)):
        share = max(sum(flags), len(flags) - sum(flags)) / len(flags) if flags else 0.0
        if share >= limit and len(flags) >= FEWEST:
            findings.append(Finding(name, value=share))
    return findings


def _characters(messages: list[Message]) -> int:
    return sum(len(message.get("content") or "") for message in messages)


def _key(row: Row) -> str:
    return json.dumps(asdict(row), sort_keys=True, ensure_ascii=False, default=str)


def _folded(key: str) -> str:
    r"""Return a key without differences of case and blanks; line breaks and tabs are spelled \n and \t within JSON."""
    return " ".join(key.casefold().replace("\\n", " ").replace("\\t", " ").replace('"', ' " ').split())
