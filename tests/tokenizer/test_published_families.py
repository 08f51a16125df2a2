"""What finetuning learns in the chat forms of the widely used model families: each answer with its end, behind its very prompt."""

from dataclasses import replace
from pathlib import Path

import pytest

from plinth.config import UserError
from plinth.posttraining.examples import Conversation, Examples, Preference
from plinth.posttraining.masks import answers_apart, render_row
from plinth.posttraining.turns import read_turns
from plinth.tokenizer.chat import Rendered, is_rewritten, render
from plinth.tokenizer.encode import Tokenizer
from tokenizer.published_families import FAMILIES, Family

DOCS = Path(__file__).parents[2] / "docs/sft.md"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = ["Grüße, the cat", "2 + 2 = 4\n\n* sat"]
MORE = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "1 + 1 <b>"},
    {"role": "assistant", "content": ANSWERS[1]},
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.write(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def conversations(family: Family) -> list[list[dict]]:
    talks = [MORE[:2], MORE]
    return [*talks, *([SYSTEM, *talk] for talk in talks if family.system)]


def spelled(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(i, skip_special=False) for i in tokens).decode()


def learnt(tokenizer: Tokenizer, rendered: Rendered) -> list[str]:
    """Return the stretches that are learnt, as text."""
    found, before = [], False
    for token, flag in zip(rendered.tokens, rendered.loss_mask):
        if flag:
            found = [*found[:-1], [*found[-1], token]] if before else [*found, [token]]
        before = flag
    return [spelled(tokenizer, tokens) for tokens in found]


def apart(tokenizer: Tokenizer, messages: list[dict]) -> list[tuple[list[dict], Rendered]]:
    rows = answers_apart(tokenizer, Examples("messages", [Conversation(messages)], [1], {})).rows
    return [(row.messages, render_row(tokenizer, row)[0].rendered) for row in rows]


def test_the_page_names_the_families():
    assert len(FAMILIES) >= 20
    text = " ".join(DOCS.read_text().split())
    assert f"{len(FAMILIES)} families: {', '.join(FAMILIES)}." in text


def test_each_answer_is_learnt_once_with_its_end_and_nothing_else(family, tokenizer):
    for messages in conversations(family):
        parts = apart(tokenizer, messages)
        wanted = [family.said.format(answer) for answer in (ANSWERS if len(messages) > 3 else ANSWERS[:1])]
        assert [text for _, rendered in parts for text in learnt(tokenizer, rendered)] == wanted
        assert len(parts) == (len(wanted) if family.apart else 1)
        ends = [[t for t, flag in zip(r.tokens, r.loss_mask) if flag][-1] for _, r in parts]
        assert set(ends) <= set(tokenizer.end_ids)


def test_an_answer_follows_the_tokens_of_its_prompt(family, tokenizer):
    for messages in conversations(family):
        for talk, rendered in apart(tokenizer, messages):
            last = len(talk) - 1
            alone = render(tokenizer, [{"role": m["role"], "content": m["content"]} for m in talk], learnt=[last])
            assert alone.tokens == rendered.tokens
            prompt = render(tokenizer, talk[:last], add_generation_prompt=True).tokens
            prompt = prompt[: len(prompt) - len(tokenizer.encode_continuing(family.opens))]
            assert rendered.tokens[: alone.loss_mask.index(True)] == prompt


def test_what_a_message_spells_is_text(family, tokenizer):
    for token in (tokenizer.token_bytes(i, skip_special=False).decode() for i in tokenizer.special_ids):
        plain, hostile = (
            render(tokenizer, [{"role": "user", "content": f"x {text} y"}, {"role": "assistant", "content": f"z {text}."}])
            for text in ("hat", token)
        )
        special = [[i for i in each.tokens if i in tokenizer.special_ids] for each in (plain, hostile)]
        assert special[0] == special[1]
        assert learnt(tokenizer, hostile) == [family.said.format(f"z {token}.")]


@pytest.mark.oracle
def test_transformers_gives_the_same_ids(family, folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for messages in conversations(family):
        for count, prompted in ((len(messages) - 1, True), (len(messages), False)):
            wanted = theirs.apply_chat_template(messages[:count], add_generation_prompt=prompted, return_dict=False)
            assert render(tokenizer, messages[:count], add_generation_prompt=prompted, learnt=[]).tokens == wanted
        tokens = render(tokenizer, messages, learnt=[len(messages) - 1]).tokens
        assert tokens == wanted if not family.adds_end else tokens[:-1] == wanted[: len(tokens) - 1] and tokens[-1] in tokenizer.end_ids


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.thought])
def test_reasoning_is_learnt_where_it_is_said_and_left_out_of_later_prompts(name, tmp_path):
    family = FAMILIES[name]
    tokenizer = Tokenizer.load(family.write(tmp_path))
    thoughts = ["hm, a cat", "2?"]
    said = [f"<think>\n{thought}\n</think>\n\n{answer}" for thought, answer in zip(thoughts, ANSWERS)]
    messages = [MORE[0], {**MORE[1], "content": said[0]}, MORE[2], {**MORE[3], "content": said[1]}]
    assert is_rewritten(tokenizer, messages, learnt=[1, 3]) and not is_rewritten(tokenizer, messages, learnt=[3])
    with pytest.raises(UserError, match=r"writes messages\[1\] in another way when more turns follow"):
        render(tokenizer, messages)
    parts = apart(tokenizer, messages)
    assert [learnt(tokenizer, r) for _, r in parts] == [[family.thought.format(*pair)] for pair in zip(thoughts, ANSWERS)]
    for talk, rendered in parts:
        prompt = render(tokenizer, [{**m} for m in talk[:-1]], add_generation_prompt=True).tokens
        assert rendered.tokens[: rendered.loss_mask.index(True)] == prompt
    later = spelled(tokenizer, parts[1][1].tokens)
    assert ANSWERS[0] in later and thoughts[0] not in later


def test_reasoning_that_a_template_would_begin_twice_is_said_once(tmp_path):
    """A form whose prompt begins reasoning, and whose template reads it in a field alone."""
    form = replace(FAMILIES["Qwen 3.5"], template=FAMILIES["Qwen 3.5"].template.replace("if '</think>' in m.content", "if false"))
    form = replace(form, template=form.template.replace("{% set said = m.content.split('</think>')[-1]", "{% set said = m.content"))
    tokenizer = Tokenizer.load(form.write(tmp_path))
    messages = [MORE[0], {**MORE[1], "content": "<think>\nhm\n</think>\n\nyes"}]
    assert learnt(tokenizer, render(tokenizer, messages)) == ["hm\n</think>\n\nyes<|im_end|>"]


def test_earlier_answers_of_a_pair_are_not_learnt_and_need_not_stay(tmp_path):
    family = FAMILIES["Qwen 3"]
    tokenizer = Tokenizer.load(family.write(tmp_path))
    earlier = {**MORE[1], "content": "<think>\nhm\n</think>\n\nyes"}
    parts = render_row(tokenizer, Preference([MORE[0], earlier, MORE[2]], [MORE[3]], [MORE[1]]))
    assert [learnt(tokenizer, part.rendered) for part in parts] == [[family.said.format(answer)] for answer in ANSWERS[::-1]]
    assert all("hm" not in spelled(tokenizer, part.rendered.tokens) for part in parts)


THOUGHT = {
    "gpt-oss": "<|channel|>analysis<|message|>a hat sat<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "Qwen 3": "<think>\na hat sat\n</think>\n\n{}<|im_end|>",
    "DeepSeek R1": "a hat sat\n</think>\n\n{}<｜end▁of▁sentence｜>",
    "Llama 3": "<think>\na hat sat\n</think>\n\n{}<|eot_id|>",
    "SmolLM 3": "<think>\na hat sat\n</think>\n\n{}<|im_end|>",
}


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("name", THOUGHT)
def test_reasoning_in_a_field_of_its_own_is_learnt(name, field, tmp_path):
    """By the template where it reads the field, under whatever name, else before the answer's text."""
    tokenizer = Tokenizer.load(FAMILIES[name].write(tmp_path))
    messages = read_turns([MORE[0], {**MORE[1], field: "a hat sat"}, *MORE[2:]])
    parts = apart(tokenizer, messages)
    assert [learnt(tokenizer, rendered) for _, rendered in parts] == [
        [THOUGHT[name].format(ANSWERS[0])],
        [FAMILIES[name].said.format(ANSWERS[1])],
    ]
    assert "hat" not in spelled(tokenizer, parts[1][1].tokens)


CALLED = [
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"x": "ü"}'}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]


def test_calls_that_a_template_leaves_out_are_refused(tmp_path):
    tokenizer = Tokenizer.load(FAMILIES["Llama 3"].write(tmp_path))
    with pytest.raises(UserError, match=r"leaves out the calls of messages\[1\] \(add\)"):
        render(tokenizer, CALLED, tools=[TOOL])


def test_a_call_whose_arguments_are_text_ends_with_the_header_of_its_result(tmp_path):
    """A call is ended by the header of what it returns, as in GLM's forms; its arguments are added to a text, as in DeepSeek's."""
    call = "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + ': ' + m.tool_calls[0].function.arguments }}{% endif %}{% endfor %}"
    form = FAMILIES["GLM-4"]
    form = replace(
        form, special=(*form.special, "<|tool|>"), ends=("<|user|>", "<|tool|>"), template=form.template.replace("{% endfor %}", call)
    )
    tokenizer = Tokenizer.load(form.write(tmp_path))
    assert learnt(tokenizer, render(tokenizer, CALLED, tools=[TOOL])) == ['add: {"x": "ü"}<|tool|>', "It is 2.<|user|>"]


def test_a_system_message_that_the_answer_makes_vanish_is_refused(tmp_path):
    tokenizer = Tokenizer.load(FAMILIES["Mistral v3"].write(tmp_path))
    assert "Be brief." in spelled(tokenizer, render(tokenizer, [SYSTEM, MORE[0]], add_generation_prompt=True).tokens)
    with pytest.raises(UserError, match=r"before messages\[2\] in another way .* Put the system's text into the first message of the user"):
        render(tokenizer, [SYSTEM, *MORE[:2]])


def test_tools_that_move_with_the_last_question_set_answers_apart(tmp_path):
    tokenizer = Tokenizer.load(FAMILIES["Mistral v3"].write(tmp_path))
    rows = answers_apart(tokenizer, Examples("messages", [Conversation(MORE, [TOOL])], [4], {}))
    texts = [spelled(tokenizer, render_row(tokenizer, row)[0].rendered.tokens) for row in rows.rows]
    assert rows.numbers == [4, 4] and [text.count("[AVAILABLE_TOOLS]") for text in texts] == [1, 1]
    assert texts[0].startswith("<s>[AVAILABLE_TOOLS]") and texts[1].index("Hello") < texts[1].index("[AVAILABLE_TOOLS]")
