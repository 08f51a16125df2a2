"""Encoding: lossless, deaf to special tokens in text, readable by Hugging Face's tools."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.config import UserError
from plinth.tokenizer.encode import SPECIAL_TOKENS, Tokenizer, byte_alphabet
from plinth.tokenizer.train import MIN_VOCAB_SIZE, TokenizerConfig, train_tokenizer

TEXTS = [
    "def copyfile(src, dst, *, follow_symlinks=True):\n    return 12345 + 0.5\n",
    "Read a file; don't write it. Größe, naïve, 東京, \U0001f600.\r\n\r\n\tEnd of it.  \n",
    "the cat and the hat and the bat, the end\n" * 20,
]
AWKWARD = ["", " ", "\n", "\x00", "\ufeff", "e\u0301", "\u00e9", "\u2028", "a  b", "1234567", "\U0001f468\u200d\U0001f469", "\r\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def test_special_tokens_come_first(tokenizer):
    assert [tokenizer.special_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4, 5]
    ids = [tokenizer.end_of_text_id, tokenizer.pad_id, tokenizer.system_id, tokenizer.user_id, tokenizer.assistant_id, tokenizer.end_id]
    assert ids == [0, 1, 2, 3, 4, 5]
    assert tokenizer.special_id("the") is None


@given(text=st.text() | st.sampled_from(AWKWARD) | st.lists(st.sampled_from([*SPECIAL_TOKENS, " the", "0", "\n"])).map("".join))
@settings(max_examples=200, deadline=None)
def test_round_trip_loses_nothing(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode("utf-8")
    assert not tokenizer.special_ids & set(ids)


def test_batch_equals_singles_across_internal_batches(tokenizer, monkeypatch):
    monkeypatch.setattr("plinth.tokenizer.encode.BATCH_CHARACTERS", 10)
    texts = TEXTS + AWKWARD
    assert tokenizer.encode_batch(iter(texts)) == [tokenizer.encode(text) for text in texts]


def test_special_tokens_in_text_stay_text(tokenizer):
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{name}b")
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.decode(ids) == f"a{name}b"


def test_decode_leaves_special_tokens_out_or_spells_them(tokenizer):
    ids = [tokenizer.user_id, *tokenizer.encode("the cat"), tokenizer.end_id]
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode(ids, skip_special=False) == "<|user|>the cat<|end|>"


def test_decode_replaces_half_a_character_and_ignores_padding_ids(tokenizer):
    ids = tokenizer.encode("東")
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    assert tokenizer.decode([tokenizer.vocab_size + 5, *ids]) == "東"


def test_numbers_fall_into_digits():
    tokenizer = train_tokenizer(["12345678 " * 100], 400)
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("123 45")] == [b"1", b"2", b"3", b" ", b"4", b"5"]


def test_byte_alphabet_is_that_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_training_is_deterministic_and_follows_the_most_frequent_pairs(tokenizer):
    assert train_tokenizer(iter(TEXTS), 400).sha256 == tokenizer.sha256
    words = train_tokenizer(["aaab " * 10], MIN_VOCAB_SIZE + 1)
    assert words.token_bytes(MIN_VOCAB_SIZE) == b"aa"


def test_small_text_gives_a_small_vocabulary():
    assert train_tokenizer(["ab"], 4000).vocab_size == MIN_VOCAB_SIZE + 1


def test_save_and_load_give_the_same_ids_and_hash(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.config == tokenizer.config
    texts = [*TEXTS, "<|end|> the <|user|>"]
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)


def test_errors_name_what_is_wrong(tokenizer, tmp_path):
    with pytest.raises(UserError, match="vocab_size=100 is below 262"):
        TokenizerConfig(100)
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer(iter(["", ""]), 300)
    with pytest.raises(UserError, match=r"U\+DC80 at character 1"):
        tokenizer.encode("a\udc80")
    with pytest.raises(UserError, match="type int, not str"):
        tokenizer.encode_batch(["a", 3])
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_foreign_tokenizer_loads_with_its_own_template(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"\u2581a": 0, "<0x0A>": 1, "b": 2}, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.config["chat_template"] == "{{ messages }}"
    assert [loaded.token_bytes(i) for i in range(3)] == [b" a", b"\n", b"b"]
    assert loaded.end_of_text_id is None and not loaded.special_ids


@pytest.mark.oracle
def test_transformers_reads_the_folder_with_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    for text in [*TEXTS, *AWKWARD]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    typed = "a <|end|> typed by a user"
    assert theirs(typed, split_special_tokens=True)["input_ids"] == tokenizer.encode(typed)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 1)
    assert len(theirs) == tokenizer.vocab_size
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False
