"""Tokenizers as other projects publish them: their templates' quirks, what a message may spell, what is learnt, transformers' ids."""

import json

import pytest

from plinth.config import UserError
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from tokenizer import published_folders as published

HI = [{"role": "user", "content": "Hello there! "}, {"role": "assistant", "content": " Grüße, the cat"}]
MORE = [*HI, {"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "a <b> & 'ü'", "parameters": {"type": "object"}}}
CALLED = [
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"x": "ü"}'}}]},
    {"role": "tool", "content": "2"},
]


@pytest.fixture(scope="module", params=published.KINDS)
def folder(request, tmp_path_factory):
    return published.KINDS[request.param](tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


def spelled(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(i, skip_special=False) for i in tokens).decode()


def test_a_conversation_ends_with_its_prompt_and_begins_with_one_first_token(tokenizer):
    assert tokenizer.can_chat and not tokenizer.is_ours
    prompt = render(tokenizer, MORE[:3], add_generation_prompt=True)
    assert not any(prompt.loss_mask)
    bos = tokenizer.prefix_ids
    assert prompt.tokens[: len(bos)] == bos and sum(token in bos for token in prompt.tokens) == len(bos)
    assert "1 + 1" in spelled(tokenizer, prompt.tokens)


@pytest.mark.parametrize("conversation", [HI, MORE], ids=["two turns", "four turns"])
def test_the_answers_and_their_ends_are_learnt(tokenizer, conversation):
    rendered = render(tokenizer, conversation)
    learnt = [token for token, flag in zip(rendered.tokens, rendered.loss_mask) if flag]
    ends = [i for i in learnt if i in tokenizer.special_ids]
    assert len(ends) == len(conversation) // 2 and set(ends) <= set(tokenizer.end_ids)
    text = b"".join(tokenizer.token_bytes(i) for i in learnt).decode()
    answers = [message["content"].strip() for message in conversation if message["role"] == "assistant"]
    assert text.split() == " ".join(answers).split() or text.replace(" ", "") == "".join(answers).replace(" ", "")


def test_what_a_message_spells_is_text(tokenizer):
    """Every special token of the tokenizer in a message, whole and cut in two, gives no special token beyond those of the template."""
    plain = render(tokenizer, HI[:1], add_generation_prompt=True).tokens
    special = [i for i in plain if i in tokenizer.special_ids]
    for token in (tokenizer.token_bytes(i, skip_special=False).decode() for i in tokenizer.special_ids):
        hostile = render(tokenizer, [{"role": "user", "content": f"x {token} y{token}{token}"}], add_generation_prompt=True).tokens
        assert [i for i in hostile if i in tokenizer.special_ids] == special
        assert token in spelled(tokenizer, hostile).replace("\u2581", " ")


def test_private_characters_of_a_text_stay(tokenizer):
    text = "\ue000a\ue001b\ue002"
    assert text in spelled(tokenizer, render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True).tokens)


@pytest.mark.oracle
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("conversation", [HI[:1], HI, MORE, MORE[:3]], ids=len)
def test_transformers_gives_the_same_ids(folder, tokenizer, conversation, prompted):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    wanted = theirs.apply_chat_template(conversation, add_generation_prompt=prompted, return_dict=False)
    assert render(tokenizer, conversation, add_generation_prompt=prompted).tokens == wanted


@pytest.mark.oracle
@pytest.mark.parametrize("conversation", [HI[:1], CALLED, [{"role": "system", "content": "Be\nbrief."}, *CALLED]], ids=len)
def test_transformers_gives_the_same_ids_with_tools(conversation, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(published.write_tools(tmp_path))
    plain = json.loads(json.dumps(conversation))
    for message in plain:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    wanted = theirs.apply_chat_template(plain, tools=[TOOL], add_generation_prompt=True, return_dict=False)
    assert render(Tokenizer.load(tmp_path), conversation, add_generation_prompt=True, tools=[TOOL]).tokens == wanted


def test_a_default_system_message_comes_only_without_one(tmp_path):
    tokenizer = Tokenizer.load(published.write_tools(tmp_path))
    alone, told = (spelled(tokenizer, render(tokenizer, first + HI[:1]).tokens) for first in ([], [{"role": "system", "content": "Go"}]))
    assert alone.startswith("<|im_start|>system\nBe brief.<|im_end|>") and told.startswith("<|im_start|>system\nGo<|im_end|>")


def test_a_template_for_tools_is_taken_where_there_are_tools(tmp_path):
    names = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    tokenizer = Tokenizer.load(published.write(published.byte_level(["<|end|>"]), tmp_path, chat_template=names))
    assert spelled(tokenizer, render(tokenizer, HI[:1]).tokens) == "plain"
    assert spelled(tokenizer, render(tokenizer, HI[:1], tools=[TOOL]).tokens) == "1 tools"


def test_generation_tags_say_what_is_learnt(tmp_path):
    folder = published.write(published.byte_level(["</s>"]), tmp_path, eos_token="</s>", chat_template=published.GENERATION)
    tokenizer = Tokenizer.load(folder)
    rendered = render(tokenizer, MORE)
    learnt = [token for token, flag in zip(rendered.tokens, rendered.loss_mask) if flag]
    assert spelled(tokenizer, learnt) == " Grüße, the cat</s>2</s>"


@pytest.mark.parametrize(
    ("kind", "messages", "error"),
    [
        ("turns", [{"role": "system", "content": "x"}, *HI], "System role not supported.* Put the system's text into the first message"),
        ("brackets", HI[1:], "must alternate user/assistant"),
        ("headers", [{"role": "usr", "content": "x"}], "role='usr' is not one of"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(kind, messages, error, tmp_path):
    with pytest.raises(UserError, match=error):
        render(Tokenizer.load(published.KINDS[kind](tmp_path)), messages)


@pytest.mark.parametrize(
    ("template", "error"),
    [("{% for %}", "malformed"), ("{{ ''.__class__.__mro__ }}", "refuses"), ("{{ messages[0].content + 1 }}", "fails on this")],
)
def test_a_template_that_is_broken_or_reaches_out_is_refused(template, error, tmp_path):
    tokenizer = Tokenizer.load(published.write(published.byte_level(["</s>"]), tmp_path, chat_template=template))
    with pytest.raises(UserError, match=error):
        render(tokenizer, HI)


def test_an_answer_that_is_written_otherwise_later_is_refused(tmp_path):
    template = (
        "{% for message in messages %}{% set said = message.content %}"
        "{% if not loop.last %}{% set said = said.split('</think>')[-1] %}{% endif %}{{ message.role + ':' + said + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = Tokenizer.load(published.write(published.byte_level(["</s>"]), tmp_path, eos_token="</s>", chat_template=template))
    thought = [HI[0], {"role": "assistant", "content": "<think>hm</think>yes"}]
    learnt = render(tokenizer, thought)
    assert spelled(tokenizer, [t for t, flag in zip(learnt.tokens, learnt.loss_mask) if flag]) == "<think>hm</think>yes</s>"
    with pytest.raises(UserError, match=r"messages\[1\] in another way when more turns follow"):
        render(tokenizer, [*thought, *MORE[2:]])


def test_names_of_special_tokens_from_an_older_file(tmp_path):
    folder = published.write(published.byte_level(["<s>", "</s>"]), tmp_path)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.end_ids == (tokenizer.token_id("</s>"), 7) and tokenizer.prefix_ids == []


def test_texts_of_tokenizers_converted_from_sentencepiece(tmp_path):
    tokenizer = Tokenizer.load(published.write_brackets(tmp_path))
    assert tokenizer.prefix_ids == [tokenizer.token_id("<s>")] and tokenizer.start_id == tokenizer.token_id("<s>")
    for text in ("the cat", "Ω🙂 the", "a\nb\t"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == " " + text
    assert tokenizer.token_bytes(tokenizer.token_id("<0xE2>")) == b"\xe2"


@pytest.mark.parametrize("scheme", [None, "first", "always", "never"])
def test_a_text_that_goes_on_gets_no_blank(scheme, tmp_path):
    tokenizer = Tokenizer.load(published.write_brackets(tmp_path, scheme))
    for text in ("the cat", " the", "{", "ü "):
        assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode_continuing(text)).decode() == text


def test_word_pieces_are_encoded_and_joined(tmp_path):
    tokenizer = Tokenizer.load(published.write(published.word_pieces(), tmp_path, cls_token="[CLS]", mask_token="[MASK]"))
    assert tokenizer.decode(tokenizer.encode("The CAT sat")) == "the cat sat"
    assert tokenizer.prefix_ids == [tokenizer.token_id("[CLS]")] and not tokenizer.can_chat
    assert tokenizer.token_id("[MASK]") not in tokenizer.encode("a [MASK] b")
