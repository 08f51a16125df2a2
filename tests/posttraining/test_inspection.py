"""What is learnt: masks by weight and by answer, findings with their rows, and the same shown in the terminal, as JSON and as a page."""

import json

import pytest
import torch

from plinth.cli.inspect_data import main
from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.posttraining.checks import check_rows
from plinth.posttraining.examples import Conversation, Preference, Prompt, Ranking, TextRow, Unpaired
from plinth.posttraining.formats import read_examples
from plinth.posttraining.inspection import inspect_data, pieces_of
from plinth.posttraining.masks import render_row, render_weighted
from plinth.posttraining.reward_sources import check_prompts
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from tokenizer.published_folders import byte_level
from tokenizer.published_folders import write as write_folder


def user(text):
    return {"role": "user", "content": text}


def reply(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat. " * 20], vocab_size=280)


def learnt(tokenizer, rendered):
    """Return what is learnt, as text, one text a stretch."""
    texts, before = [], False
    for piece in pieces_of(tokenizer, rendered):
        if piece.learnt:
            texts = [*texts[:-1], texts[-1] + piece.text] if before else [*texts, piece.text]
        before = piece.learnt
    return texts


def write(path, records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records), encoding="utf-8")
    return path


def test_messages_of_weight_0_are_not_learnt(tokenizer):
    messages = [user("a"), reply("one", weight=0), user("b"), reply("two", weight=1), reply("three", weight=0), user("c"), reply("four")]
    rendered = render_weighted(tokenizer, messages)
    assert learnt(tokenizer, rendered) == ["two<|end|>", "four<|end|>"]
    assert rendered.tokens == render(tokenizer, messages).tokens
    assert render_weighted(tokenizer, [user("a"), reply("b")]) == render(tokenizer, [user("a"), reply("b")])
    assert not any(render_weighted(tokenizer, [user("a"), reply("b", weight=0)]).loss_mask)


def test_tools_are_in_the_prompt_and_calls_are_learnt(tokenizer):
    tool = {"type": "function", "function": {"name": "add"}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [user("a"), reply("", tool_calls=[call]), {"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}, reply("done")]
    texts = learnt(tokenizer, render_row(tokenizer, Conversation(messages, [tool]))[0].rendered)
    assert len(texts) == 2 and '"arguments"' in texts[0] and texts[1] == "done<|end|>"
    later = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages[:-1]] + messages[-1:]
    assert learnt(tokenizer, render_weighted(tokenizer, later, [tool])) == ["done<|end|>"]


def test_reasoning_in_a_field_of_its_own_is_learnt_before_the_answer(tokenizer, tmp_path):
    thought = {"role": "assistant", "content": "b", "reasoning_content": "a mat"}
    file = write(tmp_path / "data.jsonl", [{"messages": [user("a"), thought]}, {"messages": [user("a"), thought | {"thinking": ["x"]}]}])
    seen = inspect_data(file, tokenizer, rows=[1])
    assert ["".join(piece.text for piece in shown.pieces if piece.learnt) for shown in seen.shown] == [
        "<think>\na mat\n</think>\n\nb<|end|>"
    ]
    assert not seen.examples.unread
    broken = write(
        tmp_path / "broken.jsonl", [{"messages": [user("a"), reply("b", thinking={"x": 1})]}] + [{"messages": [user("a"), reply("b")]}]
    )
    assert "reasoning that is not text" in inspect_data(broken, tokenizer).examples.rejected[0][1]


def test_of_answers_to_a_prompt_the_answer_alone_is_learnt(tokenizer):
    prompt = [user("a"), reply("old"), user("b")]
    rows = {
        Preference: Preference(prompt, [reply("yes")], [reply("no")]),
        Ranking: Ranking(prompt, [[reply("yes")], [reply("no")]], (0, 1)),
        Unpaired: Unpaired(prompt, [reply("yes")], True),
        Prompt: Prompt(prompt, "4"),
        TextRow: TextRow("the cat"),
    }
    found = {kind: [learnt(tokenizer, part.rendered) for part in render_row(tokenizer, row)] for kind, row in rows.items()}
    both = [["yes<|end|>"], ["no<|end|>"]]
    assert found[Preference] == found[Ranking] == both and found[Unpaired] == both[:1] and found[Prompt] == [[]]
    assert found[TextRow][0][0].endswith("<|endoftext|>")


def test_answers_that_a_published_template_rewrites_are_learnt_one_by_one(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '' }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer.load(write_folder(byte_level(["<|im_end|>"]), tmp_path / "t", chat_template=template, eos_token="<|im_end|>"))
    talk = [user("a"), reply("one"), user("b"), reply("two")]
    with pytest.raises(UserError, match="in another way"):
        render_weighted(tokenizer, talk)
    assert learnt(tokenizer, render_weighted(tokenizer, [talk[0], reply("one", weight=0), *talk[2:]])) == ["<assistant>two<|im_end|>"]
    seen = inspect_data(write(tmp_path / "data.jsonl", [{"messages": talk}, {"messages": talk[:2]}]), tokenizer)
    assert [("answers_apart", [1])] == [(finding.name, finding.rows) for finding in seen.findings if finding.name != "near_duplicate"]
    stretches = [[piece.text for piece in shown.pieces if piece.learnt] for shown in seen.shown]
    assert ["".join(texts) for texts in stretches] == ["<assistant>one<|im_end|>", "<assistant>two<|im_end|>", "<assistant>one<|im_end|>"]


def test_an_answer_whose_end_is_not_learnt_is_found(tmp_path):
    """The class of complaint of trl#1623 and unsloth#416: a model that was never taught its end token does not stop."""
    answer = "{% generation %}{{ m.content }}{% endgeneration %}"
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    tokenizer = Tokenizer.load(write_folder(byte_level(["<|im_end|>"]), tmp_path / "t", chat_template=template, eos_token="<|im_end|>"))
    file = write(tmp_path / "data.jsonl", [{"messages": [user("what does it say"), reply("b")]}])
    assert [finding.name for finding in inspect_data(file, tokenizer).findings] == ["end_not_learnt"]


def test_nothing_learnt_is_found_and_so_is_padding_with_the_end(tmp_path, tokenizer):
    """The classes of complaint of trl#3781 (masks that are all zero in silence) and trl#2059 (the padding token is the end token)."""
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% generation %}{% endgeneration %}{% endfor %}"
    folder = write_folder(
        byte_level(["<|im_end|>"]), tmp_path / "t", chat_template=template, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    file = write(tmp_path / "data.jsonl", [{"messages": [user("a"), reply("b")]}])
    found = inspect_data(file, Tokenizer.load(folder), max_seq_len=2)
    assert [finding.name for finding in found.findings] == ["nothing_learnt", "too_long", "pad_is_end"]
    assert not inspect_data(file, tokenizer, max_seq_len=64).findings


def test_odd_rows_are_found_with_their_numbers(tmp_path):
    def names(records, held_out=None):
        examples = read_examples(write(tmp_path / "data.jsonl", records))
        other = read_examples(write(tmp_path / "other.jsonl", held_out)) if held_out else None
        return {finding.name: finding.rows for finding in check_rows(examples, other)}

    talk = {"messages": [user("a"), reply("b")]}
    assert names([talk, {"messages": [user("A"), reply(" b\n")]}, talk]) == {"duplicate": [3], "near_duplicate": [2]}
    odd = {"messages": [user("a"), user("b"), reply(" "), user("c")]}
    assert names([talk, odd]) == {"roles_do_not_alternate": [2], "last_is_not_assistant": [2], "empty_reply": [2]}
    assert names([odd | {"messages": [user("x"), reply("y")]}, talk], [talk]) == {"overlap": [2]}
    pairs = [{"prompt": str(i), "chosen": "longer", "rejected": "x"} for i in range(20)] + [{"prompt": "z", "chosen": "a", "rejected": "a"}]
    assert names(pairs) == {"identical_pair": [21], "length_decides": []} and names(pairs[-3:]) == {"identical_pair": [3]}
    several = {"prompt": "p", "chosen": [reply("a"), user("b"), reply("c")], "rejected": "dddd"}
    assert names([several]) == {"several_turns": [1]}
    assert names([{"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}]) == {"tied_ranks": [1]}
    labels = [{"prompt": str(i), "completion": "c", "label": True} for i in range(20)]
    assert names(labels) == {"label_imbalance": []}
    assert names([{"text": "a"}, {"text": " "}]) == {"empty_text": [2]}
    two = {"messages": [{"role": "system", "content": "s"}, user(" "), {"role": "system", "content": "t"}, reply("a")]}
    assert names([two]) == {"late_system": [1], "empty_question": [1]}


def test_answers_that_their_verifier_cannot_read_are_found_before_they_train(tmp_path):
    answers = [("exact", "y"), ("regex", "("), ("numeric", "two"), ("numeric", {"value": 2, "tolerance": "x"}), ("exat", "y"),
               ("json", {"type": "objct"}), ("code", "assert ("), ("code", {"tests": "assert f(1)", "time_s": 1}),
               ("sql", {"database": str(tmp_path / "none.db"), "query": "select 1"})]  # fmt: skip
    rows = [{"prompt": str(i), "answer": answer, "verifier": name} for i, (name, answer) in enumerate(answers)]
    found = check_rows(read_examples(write(tmp_path / "data.jsonl", rows)))
    assert {finding.name: finding.rows for finding in found} == {"answer_unreadable": [2, 3, 4, 5, 6, 7, 9]}
    with pytest.raises(UserError, match="no JSON Schema: 'objct' is not"):  # and before a run or a best of n draws its first answer
        check_prompts("verifier", [Prompt([user("a")], '{"type": "objct"}', "json")])


def test_pieces_are_the_tokens_and_spell_the_text(tokenizer):
    rendered = render(tokenizer, [user("é🐈"), reply("ü the cat 🐈")])
    pieces = pieces_of(tokenizer, rendered)
    assert [token for piece in pieces for token in piece.ids] == rendered.tokens
    assert "".join(piece.text for piece in pieces) == "<|user|>é🐈<|end|><|assistant|>ü the cat 🐈<|end|>"
    assert sum(len(piece.ids) for piece in pieces if piece.learnt) == sum(rendered.loss_mask)


def test_the_command_shows_the_same_in_the_terminal_as_json_and_as_a_page(tmp_path, tokenizer, capsys):
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
        intermediate_size=64, max_seq_len=32,
    )  # fmt: skip
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer, tmp_path / "run" / "model")
    records = [{"messages": [user("<b>é[x]"), reply("the cat")]}, "{broken", {"messages": [user("a " * 90), reply("")]}]
    file, page = str(write(tmp_path / "data.jsonl", records)), tmp_path / "page.html"
    arguments = [file, "--run", str(tmp_path / "run")]
    assert main([*arguments, "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "read as messages: messages (2 rows); 2 rows used; 1 rejected (row 2: not JSON" in text
    assert "<|user|><b>é[x]<|end|><|assistant|>[[the cat<|end|>]]" in text
    assert "! 1 row: an answer that is learnt is empty or blank (row 3)" in text and "! 1 row: more tokens than the model's context" in text
    html = page.read_text(encoding="utf-8")
    assert "&lt;" in html and "<b>" not in html and 'class="p l"' in html and "row 2 is left out: not JSON" in html
    assert main([*arguments, "--json", "--strict", "--rows", "1"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (
        [each["row"] for each in answer["shown"]] == [1]
        and answer["rejected"][0][0] == 2
        and answer["rejected_rows"] == 1
        and answer["max_seq_len"] == 32
    )
    assert "".join(piece[1] for piece in answer["shown"][0]["pieces"] if piece[2]) == "the cat<|end|>"
    assert {finding["name"] for finding in answer["findings"]} == {"empty_reply", "hardly_learnt", "too_long"}
    with pytest.raises(UserError, match="row 2 .* cannot be shown: not JSON"):
        main([*arguments, "--rows", "2"])
    main([str(write(tmp_path / "odd.jsonl", [{"prompt": "a\x1b[31m", "completion": "b\u202ec"}])), "--run", str(tmp_path / "run")])
    assert "<|user|>a\\x1b[31m<|end|><|assistant|>[[b\\u202ec<|end|>]]" in capsys.readouterr().out
    assert main([str(write(tmp_path / "good.jsonl", records[:1])), "--run", str(tmp_path / "run"), "--strict"]) == 0
