"""A token a residue: the alphabets, what is left out, and the folder."""

import pytest

from plinth.cli.main import main
from plinth.config import UserError, read_json
from plinth.tokenizer.encode import SPECIAL_TOKENS, Tokenizer
from plinth.tokenizer.encoder_tokens import encoder_tokens, with_encoder_tokens
from plinth.tokenizer.residues import ALPHABETS, UNKNOWN, num_unknown, residue_tokenizer


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_a_letter_is_a_token_and_comes_back(alphabet, tmp_path):
    residue_tokenizer(alphabet).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode(ALPHABETS[alphabet])
    first = len(SPECIAL_TOKENS) + 1
    assert ids == list(range(first, first + len(ALPHABETS[alphabet])))
    assert tokenizer.vocab_size == first + len(ALPHABETS[alphabet])
    assert tokenizer.decode(ids) == ALPHABETS[alphabet]
    assert [tokenizer.token_bytes(i).decode() for i in ids] == list(ALPHABETS[alphabet])


def test_case_and_white_space_do_not_matter_and_strange_letters_are_unknown():
    tokenizer = residue_tokenizer("nucleotide")
    assert tokenizer.encode("ac g\n\tt") == tokenizer.encode("ACGT")
    unknown = tokenizer.special_id(UNKNOWN)
    assert tokenizer.encode("A1E") == [tokenizer.encode("A")[0], unknown, unknown]
    assert num_unknown(tokenizer, ["ACGT", "MKT-"]) == 1
    assert tokenizer.special_id("<|pad|>") not in tokenizer.encode("<|pad|>")


def test_an_encoder_gets_its_marks_behind_the_alphabet():
    plain = residue_tokenizer("protein")
    tokenizer = with_encoder_tokens(plain)
    tokens = encoder_tokens(tokenizer)
    assert {tokens.cls, tokens.sep, tokens.mask} == {plain.vocab_size + i for i in range(3)} and tokens.pad == plain.pad_id
    assert tokenizer.encode("MKT") == plain.encode("MKT")


def test_the_command_needs_no_text(tmp_path, capsys):
    assert main(["tokenizer", "train", "--residues", "protein", "--out", str(tmp_path / "plain")]) == 0
    (tmp_path / "a.faa").write_text(">x\nMKTAYIAKQRX\n")
    assert main(["tokenizer", "train", str(tmp_path / "a.faa"), "--residues", "nucleotide", "--out", str(tmp_path / "wrong")]) == 0
    record = read_json(tmp_path / "wrong" / "manifest.json")
    assert (record["residues"], record["unknown"], record["bytes_per_token"]) == ("nucleotide", 3, 1.0)
    assert "3 characters of it are no nucleotide codes" in capsys.readouterr().out


def test_another_alphabet_is_refused():
    with pytest.raises(UserError, match="residues='glycan' is unknown. Use protein or nucleotide"):
        residue_tokenizer("glycan")
