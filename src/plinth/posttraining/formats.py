"""The file formats that people keep training examples in: recognised by their fields, read into one form for each kind.

FORMATS is the table of contents: the first whose fields a row has is the row's format. What cannot be read is rejected with its row
number and the reason, and fields that nothing reads are counted; nothing is dropped or cut in silence.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plinth.config import UserError, nearest, read_bytes
from plinth.posttraining.examples import (
    KINDS,
    Conversation,
    Examples,
    Kind,
    Preference,
    Prompt,
    Ranking,
    Row,
    TextRow,
    Unpaired,
    convert,
    unweighted,
)
from plinth.posttraining.turns import MESSAGE_FIELDS, is_transcript, read_answer, read_prompt, read_turns, split_pair, split_transcript
from plinth.tokenizer.chat import Message
from plinth.tokenizer.tool_format import check_tools

Record = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A form that rows come in."""

    name: str
    """what users are told"""
    kind: Kind | None
    """what its rows are; None for a form that is recognised but not learnt from"""
    matches: Callable[[Record], bool]
    """whether a row has its fields"""
    read: Callable[[Record], Row]
    """the row, normalised; raises UserError"""
    fields: str
    """the fields that `read` looks at"""


def _has(*names: str) -> Callable[[Record], bool]:
    """Return a test for all fields, null ones not counted; of names joined by | one is enough."""
    return lambda record: all(any(record.get(name) is not None for name in group.split("|")) for group in names)


def _asks(*names: str) -> Callable[[Record], bool]:
    """Return a test for a prompt and other fields; a conversation that ends with an answer is no prompt, whatever stands beside it."""
    has = _has("prompt|question|instruction|messages|conversations", *names)
    return lambda record: has(record) and (_has("prompt|question|instruction")(record) or not _is_answered(record))


def _is_answered(record: Record) -> bool:
    turns = _first(record, "messages", "conversations")
    last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
    return last.get("role", last.get("from")) in ("assistant", "gpt")


def _first(record: Record, *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _text(record: Record, *names: str) -> str:
    value = _first(record, *names)
    if not isinstance(value, str):
        raise UserError(f"{names[0]} is of type {type(value).__name__}, not text")
    return value


def _tools(record: Record) -> list[dict[str, Any]] | None:
    tools = record.get("tools")
    if isinstance(tools, str):  # ShareGPT's files hold them as JSON text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError:
            raise UserError("tools is text that is not JSON") from None
    if tools:
        check_tools(tools)
    return tools or None


def _conversation(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Conversation:
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise UserError("no message of the assistant to learn from")
    return Conversation(messages, tools)


def _system(record: Record) -> list[Message]:
    return [{"role": "system", "content": record["system"]}] if isinstance(record.get("system"), str) and record["system"] else []


def _read_messages(record: Record) -> Row:
    name = "messages" if record.get("messages") is not None else "conversations"
    return _conversation(_system(record) + read_turns(record[name], name), _tools(record))


def _read_red_team(record: Record) -> Row:
    return _conversation(split_transcript(_text(record, "transcript")))


def _instruction(record: Record) -> list[Message]:
    """Return the prompt of an Alpaca row: the system's text, the history of pairs, and the instruction with its input below it."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history is not a list of pairs of texts")
    turns = [turn for said, answer in history for turn in (("user", said), ("assistant", answer))]
    parts = [_text(record, "instruction"), _text(record, "input") if record.get("input") else ""]
    return read_turns(
        [
            *_system(record),
            *({"role": role, "content": text} for role, text in turns),
            {"role": "user", "content": "\n\n".join(filter(None, parts))},
        ]
    )


def _prompt(record: Record) -> list[Message]:
    names = ("prompt", "question", "instruction", "messages", "conversations")
    name = next(name for name in names if record.get(name) is not None)
    if name == "instruction":
        return _instruction(record)
    prompt = _system(record) + read_prompt(record[name], name)
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{name} ends with the assistant's message, where a prompt ends before it")
    return prompt


def _read_completion(record: Record) -> Row:
    prompt = _prompt(record)
    answer = read_answer(_first(record, "completion", "response", "output"), prompt, "completion")
    return _conversation([*unweighted(prompt), *answer], _tools(record))


def _number(record: Record, name: str) -> float | None:
    value = record.get(name)
    if value is None or _is_number(value):
        return value
    raise UserError(f"{name}={value!r} is not a finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _probability(record: Record) -> float | None:
    value = _number(record, "probability")
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"probability={value!r} does not lie between 0 and 1")
    return value


def _read_preference(record: Record) -> Row:
    prompt = _prompt(record)
    chosen, rejected = (read_answer(record[name], prompt, name) for name in ("chosen", "rejected"))
    return Preference(prompt, chosen, rejected, _number(record, "margin"), _tools(record), _probability(record))


def _read_implicit(record: Record) -> Row:
    sides = []
    for name in ("chosen", "rejected"):
        value = record[name]
        if isinstance(value, str) and not is_transcript(value):
            raise UserError(f'no prompt, and {name} is neither messages nor a transcript ("\\n\\nHuman: ...\\n\\nAssistant: ...")')
        sides.append(split_transcript(value) if isinstance(value, str) else read_turns(value, name))
    return Preference(*split_pair(*sides), _number(record, "margin"), _tools(record), _probability(record))


def _read_ranking(record: Record) -> Row:
    prompt, answers = _prompt(record), record["completions"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise UserError("completions is not a list of at least two")
    scores = _first(record, "scores", "ranks", "rank")
    if scores is None:
        scores = [_first(answer, "overall_score", "score") if isinstance(answer, dict) else None for answer in answers]
        answers = [_first(answer, "response", "text", "content") if isinstance(answer, dict) else None for answer in answers]
    if not isinstance(scores, list) or len(scores) != len(answers) or not all(map(_is_number, scores)):
        raise UserError(f"{len(answers)} completions have not as many ranks or scores that are finite numbers")
    lower_is_better = record.get("scores") is None and _first(record, "ranks", "rank") is not None
    order = sorted(set(scores), reverse=not lower_is_better)
    ranks = tuple(order.index(score) for score in scores)
    return Ranking(prompt, [read_answer(answer, prompt, f"completions[{i}]") for i, answer in enumerate(answers)], ranks)


def _read_summaries(record: Record) -> Row:
    info, summaries, choice = record["info"], record["summaries"], record["choice"]
    two = isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(summary, dict) for summary in summaries)
    if not isinstance(info, dict) or not two or choice not in (0, 1):
        raise UserError("info is no object, or summaries and choice are not two texts and 0 or 1")
    post = "\n\n".join(text for text in (info.get("title"), info.get("post") or info.get("article")) if isinstance(text, str))
    chosen, rejected = (_text(summaries[i], "text").strip() for i in (choice, 1 - choice))
    prompt = [{"role": "user", "content": f"Summarise this post.\n\n{post}"}]
    return Preference(prompt, read_answer(chosen, prompt, "summary"), read_answer(rejected, prompt, "summary"))


def _read_unpaired(record: Record) -> Row:
    if record["label"] not in (True, False):
        raise UserError(f"label={record['label']!r} is neither true nor false")
    prompt = _prompt(record)
    return Unpaired(prompt, read_answer(_first(record, "completion", "response"), prompt, "completion"), bool(record["label"]))


def _read_verifiable(record: Record) -> Row:
    answer = _first(record, "ground_truth", "answer")
    if answer is None or answer == "":
        raise UserError("the answer to compare with is empty")
    verifier = _first(record, "verifier", "dataset")
    if verifier is not None and not isinstance(verifier, str):
        raise UserError(f"verifier={verifier!r} is not one name")
    return Prompt(_prompt(record), answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False), verifier)


def _refuse(why: str) -> Callable[[Record], Row]:
    def read(record: Record) -> Row:
        raise UserError(why)

    return read


_PROMPT_FIELDS = "prompt question instruction input system history messages conversations"
_PAIR_FIELDS = "chosen rejected margin probability"
_TOKENS = _refuse("holds token ids, whose tokenizer and mask nobody can check. Give the text instead")
_STEPS = _refuse("has a label for each step, which no method here learns from")
FORMATS = (
    Format("pre-tokenized", None, _has("input_ids|prompt_ids"), _TOKENS, ""),
    Format("summarize-from-feedback", "preference", _has("info", "summaries", "choice"), _read_summaries, "info summaries choice"),
    Format("preference", "preference", _asks("chosen", "rejected"), _read_preference, f"{_PROMPT_FIELDS} {_PAIR_FIELDS} tools"),
    Format(
        "hh-rlhf transcripts",
        "preference",
        lambda record: is_transcript(record.get("chosen")) and is_transcript(record.get("rejected")),
        _read_implicit,
        _PAIR_FIELDS,
    ),
    Format("preference, prompt within", "preference", _has("chosen", "rejected"), _read_implicit, f"{_PAIR_FIELDS} tools"),
    Format("stepwise labels", None, _has("completions", "labels"), _STEPS, ""),
    Format("ranking", "ranking", _asks("completions"), _read_ranking, f"{_PROMPT_FIELDS} completions scores ranks rank"),
    Format("unpaired", "unpaired", _asks("completion|response", "label"), _read_unpaired, f"{_PROMPT_FIELDS} completion response label"),
    Format(
        "verifiable",
        "verifiable",
        _asks("ground_truth|answer"),
        _read_verifiable,
        f"{_PROMPT_FIELDS} ground_truth answer verifier dataset",
    ),
    Format("messages", "messages", _has("messages"), _read_messages, "messages tools system"),
    Format("ShareGPT", "messages", _has("conversations"), _read_messages, "conversations tools system"),
    Format("hh-rlhf red team", "messages", _has("transcript"), _read_red_team, "transcript"),
    Format("Alpaca", "messages", _has("instruction", "output"), _read_completion, "instruction input output system history"),
    Format(
        "prompt and completion",
        "messages",
        _has("prompt|question|instruction", "completion|response|output"),
        _read_completion,
        f"{_PROMPT_FIELDS} completion response output tools",
    ),
    Format("text", "text", _has("text"), lambda record: TextRow(_text(record, "text")), "text"),
)
READ_BY = {
    "text": "`plinth data curate`", "messages": "`plinth sft`", "preference": "`plinth prefer`", "ranking": "`plinth prefer`",
    "unpaired": "`plinth prefer --loss kto`", "verifiable": "`plinth grpo`",
}  # fmt: skip
KNOWN = sorted({name for form in FORMATS for name in form.fields.split()})


def detect(record: Record) -> Format:
    """Return the format of a row. Raises UserError, with the nearest known field, when its fields fit none."""
    for form in FORMATS:
        if form.matches(record):
            return form
    fields = ", ".join(f"{name}{' is null' * (record[name] is None)}" for name in list(record)[:6]) or "no field"
    guess = next((hint for name in record if name not in KNOWN and (hint := nearest(str(name), KNOWN))), "")
    raise UserError(f"its fields ({fields}) fit no known format.{guess}")


def read_examples(path: Path | str, kind: Kind | None = None) -> Examples:
    """Read training examples from JSON Lines (or .gz), a JSON array, or Parquet; the format of each row is recognised by its fields.

    Without `kind` the kind that most rows have is taken. Rows of another kind are converted where that has one meaning (see
    examples.convert), else rejected. Raises UserError when the file is absent, no row is left, or `kind` is unknown.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"kind={kind!r} is not one of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    rejected: list[tuple[int, str]] = []
    read: list[tuple[int, Format, Record]] = []
    for number, record in read_records(Path(path)):
        try:
            read.append((number, detect(_object(record)), record))
        except UserError as error:
            rejected.append((number, str(error).rstrip(".")))
    kinds = Counter(form.kind for _, form, _ in read if form.kind is not None)
    wanted = kind or (kinds.most_common(1)[0][0] if kinds else "messages")
    rows, numbers, detected, unread = [], [], Counter(), Counter()
    for number, form, record in read:
        try:
            found = _read(form, record, wanted)
        except UserError as error:
            rejected.append((number, str(error).rstrip(".")))
            continue
        rows += found
        numbers += [number] * len(found)
        detected[form.name] += 1
        unread.update(unread_fields(form, record))
    if not rows:
        why = "row {}: {}".format(*min(rejected)) if rejected else "it is empty"
        name = f"{wanted} " if kind is not None or kinds else ""
        others = [READ_BY[found] for found in kinds if found != wanted]
        raise UserError(f"{path} holds no {name}row that can be read: {why}.{f' {others[0]} reads such rows.' if others else ''}")
    return Examples(wanted, rows, numbers, dict(detected), sorted(rejected), dict(unread))


def _object(record: Any) -> Record:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError(f"is of type {type(record).__name__}, not an object with named fields")
    return record


def _read(form: Format, record: Record, wanted: Kind) -> list[Row]:
    row = form.read(record)
    if form.kind == wanted:
        return [row]
    found = convert(row, wanted)
    if not found:
        raise UserError(f"is {form.name}, which gives no {wanted} row")
    return found


def unread_fields(form: Format, record: Record) -> set[str]:
    """Return the fields of a row, and of its messages, that nothing reads."""
    known = form.fields.split()
    unread = {name for name, value in record.items() if name not in known and value is not None}
    for name in ("messages", "conversations", "prompt", "chosen", "rejected"):
        value = record.get(name) if name in known else None
        for message in [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []:
            unread |= {f"{name}[].{key}" for key, item in message.items() if key not in MESSAGE_FIELDS and item is not None}
    return unread


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, value) of a file; the value is a UserError for a line that is not UTF-8 or not JSON. Blank lines count."""
    if path.suffix == ".parquet":
        yield from enumerate(_read_parquet(path), start=1)
        return
    if path.name.removesuffix(".gz").endswith((".csv", ".tsv")):
        raise UserError(f"{path} is a table of text. Write its rows as JSON Lines, an object of named fields each, or as Parquet.")
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        array = _parse(data)
        if isinstance(array, UserError):
            raise UserError(f"{path} begins as a JSON array but is {array}.")
        yield from enumerate(array, start=1)
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield number, _parse(line)


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow.parquet  # heavy, and only these files need it

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid:
        raise UserError(f"{path} is no Parquet file, or a damaged one.") from None


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UserError(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return UserError(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return UserError("not JSON that can be read: it is nested too deeply")
