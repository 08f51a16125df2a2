"""The marks of encoders: added to a decoder's tokenizer without changing a text's ids, placed as other programs place them."""

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from plinth.config import UserError
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.encoder_tokens import encode_with_masks, encoder_tokens, with_encoder_tokens
from plinth.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer(["the cat sat on the mat, the dog on the log. " * 20], 290)


def word_piece() -> Tokenizer:
    """Return a tokenizer as BERT has it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "play", "##ing"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(words[:5])
    return Tokenizer(backend, {"mask_token": {"content": "[MASK]"}, "pad_token": "[PAD]"})


def test_a_text_keeps_its_ids_and_the_new_ones_come_behind(plain):
    marked = with_encoder_tokens(plain)
    text = "the dog sat on [MASK] the cat"
    assert marked.encode(text) == plain.encode(text)
    tokens = encoder_tokens(marked)
    assert sorted((tokens.cls, tokens.sep, tokens.mask)) == list(range(plain.vocab_size, plain.vocab_size + 3))
    assert tokens.pad == plain.pad_id and marked.vocab_size == plain.vocab_size + 3
    again = with_encoder_tokens(marked)
    assert again.sha256 == marked.sha256


def test_a_tokenizer_of_a_decoder_is_refused_and_berts_is_taken_as_it_is(plain):
    with pytest.raises(UserError, match=r"lacks \[CLS\], \[SEP\]"):
        encoder_tokens(plain)
    bert = word_piece()
    tokens = encoder_tokens(bert)
    assert (tokens.cls, tokens.sep, tokens.mask, tokens.pad) == (2, 3, 4, 0)
    assert with_encoder_tokens(bert).vocab_size == bert.vocab_size


def test_pairs_have_segments():
    row, segments = encoder_tokens(word_piece()).pair([5, 6], [7])
    assert row == [2, 5, 6, 3, 7, 3] and segments == [0, 0, 0, 0, 1, 1]


def test_a_mask_takes_the_place_of_a_word_with_its_space(plain):
    marked = with_encoder_tokens(plain)
    mask = encoder_tokens(marked).mask
    whole = plain.encode("the cat sat")
    cat = plain.encode(" cat")
    assert encode_with_masks(marked, "the [MASK] sat") == [*whole[: -len(cat) - len(plain.encode(" sat"))], mask, *plain.encode(" sat")]
    assert encode_with_masks(marked, "[MASK] sat[MASK]") == [mask, *plain.encode(" sat"), mask]
    assert encode_with_masks(word_piece(), "the [MASK] plays") == [5, 4, 9, 8]


def test_offsets_are_places_in_the_text(plain):
    text = "the cat — é sat"
    ids, offsets = plain.encode_with_offsets(text)
    assert ids == plain.encode(text)
    assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
    ids, offsets = word_piece().encode_with_offsets("The playing cats")
    assert [text[a:b] for text, (a, b) in zip(["The playing cats"] * 5, offsets)] == ["The", "play", "ing", "cat", "s"]


@pytest.mark.oracle
def test_transformers_marks_texts_as_we_do(plain, tmp_path):
    transformers = pytest.importorskip("transformers")
    marked = with_encoder_tokens(plain)
    marked.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens = encoder_tokens(marked)
    assert theirs("the cat")["input_ids"] == tokens.single(marked.encode("the cat"))
    both = theirs("the cat", "sat on")
    assert (both["input_ids"], both["token_type_ids"]) == tokens.pair(marked.encode("the cat"), marked.encode("sat on"))
    for text in ("the [MASK] sat", "[MASK] the dog [MASK]"):
        assert theirs(text)["input_ids"] == tokens.single(encode_with_masks(marked, text))
    assert (theirs.mask_token_id, theirs.pad_token_id) == (tokens.mask, tokens.pad)
