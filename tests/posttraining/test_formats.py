"""Formats of training data: every one recognised and read into one form, nothing swallowed, dropped or guessed in silence."""

import gzip
import json
import math

import pytest

from plinth.config import UserError
from plinth.posttraining.examples import Conversation, Preference, Prompt, Ranking, TextRow, Unpaired
from plinth.posttraining.formats import read_examples
from plinth.posttraining.turns import split_transcript

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
OLD_REPLY = {"role": "assistant", "content": "Hello", "weight": 0}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def write(path, records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records), encoding="utf-8")
    return path


def read_one(tmp_path, record, kind=None):
    examples = read_examples(write(tmp_path / "data.jsonl", [record]), kind)
    assert not examples.rejected
    return next(iter(examples.detected)), examples.rows[0]


FORMATS = [
    ({"text": "abc"}, "text", TextRow("abc")),
    ({"messages": [USER, REPLY]}, "messages", Conversation([USER, REPLY])),
    ({"messages": [USER, REPLY], "tools": [TOOL]}, "messages", Conversation([USER, REPLY], [TOOL])),
    (
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
                REPLY,
            ]
        },
        "messages",
        Conversation([{"role": "system", "content": "Be kind."}, USER, REPLY]),
    ),
    ({"prompt": "2+2?", "completion": "4"}, "prompt and completion", Conversation([USER, REPLY])),
    ({"prompt": [USER], "completion": [REPLY]}, "prompt and completion", Conversation([USER, REPLY])),
    ({"instruction": "2+2?", "input": "", "output": "4"}, "Alpaca", Conversation([USER, REPLY])),
    (
        {"instruction": "Add", "input": "2+2?", "output": "4", "system": "S", "history": [["Hi", "Hello"]]},
        "Alpaca",
        Conversation(
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "Hi"},
                OLD_REPLY,
                {"role": "user", "content": "Add\n\n2+2?"},
                REPLY,
            ]
        ),
    ),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, "ShareGPT", Conversation([USER, REPLY])),
    (
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ],
            "system": "S",
            "tools": json.dumps([TOOL]),
        },
        "ShareGPT",
        Conversation(
            [
                {"role": "system", "content": "S"},
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "4"},
                REPLY,
            ],
            [TOOL],
        ),
    ),
    ({"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 2}, "preference", Preference([USER], [REPLY], [WRONG], 2)),
    ({"prompt": "2+2?", "chosen": [USER, REPLY], "rejected": [USER, WRONG]}, "preference", Preference([USER], [REPLY], [WRONG])),
    (
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        "preference",
        Preference([USER], [REPLY], [WRONG]),
    ),
    ({"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": "4", "rejected": "5"}, "preference", Preference([USER], [REPLY], [WRONG])),
    ({"chosen": [USER, REPLY], "rejected": [USER, WRONG]}, "preference, prompt within", Preference([USER], [REPLY], [WRONG])),
    (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        "hh-rlhf transcripts",
        Preference([USER], [REPLY], [WRONG]),
    ),
    (
        {"transcript": "\n\nHuman: 2+2?\n\nAssistant: 4"},
        "hh-rlhf red team",
        Conversation([USER, REPLY]),
    ),
    (
        {"info": {"post": "Long.", "title": "T"}, "summaries": [{"text": " 5"}, {"text": " 4"}], "choice": 1},
        "summarize-from-feedback",
        Preference([{"role": "user", "content": "Summarise this post.\n\nT\n\nLong."}], [REPLY], [WRONG]),
    ),
    ({"prompt": "2+2?", "completions": ["5", "4"], "rank": [2, 1]}, "ranking", Ranking([USER], [[WRONG], [REPLY]], (1, 0))),
    ({"prompt": "2+2?", "completions": ["5", "4"], "scores": [0.5, 0.5]}, "ranking", Ranking([USER], [[WRONG], [REPLY]], (0, 0))),
    (
        {"instruction": "2+2?", "completions": [{"response": "5", "overall_score": 1}, {"response": "4", "overall_score": 9}]},
        "ranking",
        Ranking([USER], [[WRONG], [REPLY]], (1, 0)),
    ),
    ({"prompt": "2+2?", "completion": "5", "label": False}, "unpaired", Unpaired([USER], [WRONG], False)),
    ({"messages": [USER], "ground_truth": "4", "dataset": "sums"}, "verifiable", Prompt([USER], "4", "sums")),
    ({"messages": [USER, REPLY], "answer": "4", "label": 1, "response": "4"}, "messages", Conversation([USER, REPLY])),
    (
        {"prompt": "2+2?", "completion": "4", "label": None, "chosen": None, "rejected": None},
        "prompt and completion",
        Conversation([USER, REPLY]),
    ),
    ({"question": "2+2?", "answer": 4}, "verifiable", Prompt([USER], "4")),
]


@pytest.mark.parametrize("record, name, row", FORMATS, ids=lambda value: value if isinstance(value, str) else None)
def test_formats_are_recognised_and_read(tmp_path, record, name, row):
    assert read_one(tmp_path, record) == (name, row)


def test_files_of_other_kinds_read_alike(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in [{"prompt": "2+2?", "completion": "4"}, {"messages": [USER, REPLY]}])
    plain = read_examples(write(tmp_path / "a.jsonl", [lines]))
    assert plain.rows == [Conversation([USER, REPLY])] * 2 and plain.detected == {"prompt and completion": 1, "messages": 1}
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps([{"prompt": "2+2?", "completion": "4"}, {"messages": [USER, REPLY]}]))
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n").encode())
    for name in ("b.jsonl.gz", "c.json", "d.jsonl"):
        assert read_examples(tmp_path / name).rows == plain.rows
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "2+2?", "completion": "4"}]), tmp_path / "e.parquet")
    assert read_examples(tmp_path / "e.parquet").rows == plain.rows[:1]


def test_what_is_left_out_has_its_row_number_and_reason(tmp_path):
    """The class of complaint of trl#2541 and open-r1#454: a row that does not fit is named, with the way out."""
    file = tmp_path / "data.jsonl"
    good = json.dumps({"messages": [USER, REPLY], "id": 7})
    bad = [
        "{broken", '"text"', json.dumps({"promt": "x"}), json.dumps({"messages": [USER]}),
        json.dumps({"messages": [{"role": "usr", "content": "x"}, REPLY]}), json.dumps({"prompt": "x", "chosen": "y", "rejected": 3}),
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]}), json.dumps({"input_ids": [1]}),
        json.dumps({"messages": [USER, {**REPLY, "weight": 2}]}), json.dumps({"text": "x"}),
    ]  # fmt: skip
    file.write_bytes("\n".join([good, good, good, "", *bad]).encode() + b'\n{"text": "\xff"}')
    examples = read_examples(file)
    assert examples.kind == "messages" and examples.numbers == [1, 2, 3] and examples.unread == {"id": 3}
    expected = ["not JSON", "type str", "Did you mean prompt", "no message of the assistant", "Did you mean user", "nor a list of messages",
                "type image_url", "token ids", "weight=2", "gives no messages row", "not UTF-8"]  # fmt: skip
    assert [number for number, _ in examples.rejected] == list(range(5, 16))
    for (_, reason), words in zip(examples.rejected, expected):
        assert words in reason
    assert "11 rejected (row 5: not JSON" in examples.describe() and "not read: id (3 rows)" in examples.describe()
    with pytest.raises(UserError, match="holds no ranking row that can be read"):
        read_examples(file, "ranking")
    with pytest.raises(UserError, match="kind='rankings' is not one of .* Did you mean ranking"):
        read_examples(file, "rankings")
    with pytest.raises(UserError, match="does not exist"):
        read_examples(tmp_path / "absent.jsonl")


def test_transcripts_are_split_by_role_and_no_character_is_swallowed(tmp_path):
    """Cutting at the longest common text takes "I c" of both answers for the prompt; cutting at whole turns takes nothing."""
    begin = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Say:\n\n  Human beings\n\nAssistant: "
    record = {"chosen": begin + "I can.\n\nReally. ", "rejected": begin + "I can't."}
    row = read_one(tmp_path, record)[1]
    assert row.chosen == [{"role": "assistant", "content": "I can.\n\nReally. "}]
    assert [message["role"] for message in row.prompt] == ["user", "assistant", "user"]
    for side in ("chosen", "rejected"):
        names = {"user": "Human", "assistant": "Assistant"}
        turns = [f"\n\n{names[message['role']]}: {message['content']}" for message in row.prompt + getattr(row, side)]
        assert "".join(turns) == record[side]
    assert split_transcript("\n\nHuman: a\n\nAssistant:")[1] == {"role": "assistant", "content": ""}
    with pytest.raises(UserError, match="before the first speaker"):
        split_transcript("Hi\n\nHuman: a")


def test_pairs_with_different_prompts_are_rejected_and_equal_ones_kept(tmp_path):
    lines = [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d\n\nAssistant: e"},
        {"prompt": "a", "chosen": [{"role": "user", "content": "z"}, REPLY], "rejected": "x"},
        {"chosen": "plain", "rejected": "texts"},
    ]
    examples = read_examples(write(tmp_path / "pairs.jsonl", lines))
    assert examples.numbers == [2, 3] and examples.rows[0].chosen == examples.rows[0].rejected
    assert len(examples.rows[1].rejected) == 3
    reasons = dict(examples.rejected)
    assert "different prompts" in reasons[1] and "does not continue the prompt" in reasons[4] and "neither messages nor" in reasons[5]


def test_kinds_that_have_one_meaning_are_converted(tmp_path):
    pair = write(tmp_path / "pair.jsonl", [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}])
    assert read_examples(pair, "messages").rows == [Conversation([USER, REPLY])]
    assert read_examples(pair, "unpaired").rows == [Unpaired([USER], [REPLY], True), Unpaired([USER], [WRONG], False)]
    ranking = write(tmp_path / "ranking.jsonl", [{"prompt": "2+2?", "completions": ["5", "4", "5"], "rank": [2, 1, 2]}])
    assert read_examples(ranking, "preference").rows == [Preference([USER], [REPLY], [WRONG])] * 2
    problem = write(tmp_path / "problem.jsonl", [{"question": "2+2?", "answer": "4"}])
    assert read_examples(problem, "messages").rows == [Conversation([USER, REPLY])]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"instruction": "a", "input": ["b"], "output": "c"}, "input is of type list"),
        ({"instruction": "a", "output": "c", "history": [["b"]]}, "history is not a list of pairs"),
        ({"info": {"post": 3}, "summaries": ["a", "b"], "choice": 0}, "not two texts"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1]}, "not as many ranks"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "neither true nor false"),
        ({"prompt": [{"role": "user", "content": "a"}, REPLY], "answer": "b"}, "ends with the assistant's message"),
        ({"question": "a", "answer": ""}, "answer to compare with is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "not a finite number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.nan}, "margin=nan is not a finite number"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [math.nan, 1]}, "not as many ranks or scores that are finite"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [True, False]}, "not as many ranks or scores that are finite"),
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"prompt": "a", "completion": 5}, "completion is neither text nor a list of messages"),
        ({"messages": [USER, REPLY], "tools": "{"}, "tools is text that is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "not JSON"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "a label for each step"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_malformed_fields_are_named(tmp_path, record, reason):
    with pytest.raises(UserError, match=reason):
        read_examples(write(tmp_path / "data.jsonl", [record]))


def test_files_that_are_not_what_their_names_say_are_refused_in_a_sentence(tmp_path):
    for name, data, words in (
        ("a.parquet", b"{}", "is no Parquet file, or a damaged one"),
        ("a.csv", b"prompt,completion\n", "Write its rows as JSON Lines"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        ("a.gz", gzip.compress(b"{}" * 1000)[:20] + b"x" * 20, "is a damaged gzip file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words):
            read_examples(tmp_path / name)


def test_a_file_of_another_kind_is_sent_to_the_verb_that_reads_it(tmp_path):
    labels = write(tmp_path / "labels.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(UserError, match="holds no messages row .* `plinth prefer --loss kto` reads such rows"):
        read_examples(labels, "messages")
    with pytest.raises(UserError, match="holds no row that can be read"):
        read_examples(write(tmp_path / "steps.jsonl", [{"prompt": "a", "completions": ["b"], "labels": [True]}]))
