"""FASTA: what files in the wild look like, read to the same sequences; faults counted with their place."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.config import UserError
from plinth.data.curate import CurateConfig, curate, spread_residues
from plinth.data.fasta import looks_like_fasta, residue_kind
from plinth.data.sources import read_documents
from plinth.tokenizer.residues import ALPHABETS

PROTEIN = b""">sp|P1|ONE first protein OS=Some
MKTAYIAKQR
qisfvkshfs
>two
ACDXBZJUO*
>three

mk-ta.yi
AK QR
"""
SEQUENCES = ["MKTAYIAKQRQISFVKSHFS", "ACDXBZJUO", "MKTAYIAKQR"]


def read(tmp_path, data: bytes, name: str = "a.fasta"):
    (tmp_path / name).write_bytes(data)
    return read_documents([tmp_path / name])


def texts(intake) -> list[str]:
    return intake.table["text"].to_pylist()


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_wrapped_and_lower_case_lines_with_any_ending(tmp_path, ending):
    intake = read(tmp_path, PROTEIN.replace(b"\n", ending))
    assert texts(intake) == SEQUENCES
    assert intake.table["kind"].to_pylist() == ["protein"] * 3
    assert [source.split("a.fasta:")[1] for source in intake.table["source"].to_pylist()] == ["sp|P1|ONE", "two", "three"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.fa.gz", gzip.compress(PROTEIN)),
        ("noname", PROTEIN),
        ("a.faa", b"\xef\xbb\xbf" + PROTEIN),
        ("b.fas", b";a comment\n; another\n" + PROTEIN.rstrip(b"\n")),
    ],
)
def test_gzip_names_byte_order_marks_and_comments(tmp_path, name, data):
    assert texts(read(tmp_path, data, name)) == SEQUENCES


def test_nucleotides_are_told_by_their_letters_or_by_the_suffix(tmp_path):
    intake = read(tmp_path, b">c\nacgtnnnACGTRYACGTACGTACGTACGT\n>r\nACGUUGCA\n")
    assert texts(intake) == ["ACGTNNNACGTRYACGTACGTACGTACGT", "ACGUUGCA"]
    assert set(intake.table["kind"].to_pylist()) == {"nucleotide"}
    assert read(tmp_path, b">c\nACGT\n", "p.faa").table["kind"].to_pylist() == ["protein"]
    assert residue_kind(">x\nMKTAYIAKQRACGT") == "protein"


def test_records_that_cannot_be_used_are_counted_with_their_line(tmp_path):
    intake = read(tmp_path, b"MKT\n>empty\n\n>digits\nMK1T\n>good\nMKTAY\n>stops\n**\n", "a.faa")
    assert texts(intake) == ["MKTAY"]
    (bad,) = intake.malformed
    assert bad.count == 4
    assert bad.first == [
        "line 1: a sequence before the first header, which begins with >",
        "empty (line 2): no residues",
        "digits (line 4): '1' at residue 3 is no code of an amino acid",
    ]


def test_a_file_without_any_sequence_is_refused_with_the_first_reason(tmp_path):
    with pytest.raises(UserError, match="no usable sequence; a .line 1.: no residues"):
        read(tmp_path, b">a\n\n")
    with pytest.raises(UserError, match="is no code of a nucleotide"):
        read(tmp_path, b">a\nMKTAYIW\n", "a.fna")


def test_a_quoted_mail_is_no_fasta():
    assert not looks_like_fasta(b"> he said\nthat it is so.\n")
    assert looks_like_fasta(b">x y z\nMKTAY\n")
    assert not looks_like_fasta(b"plain text\n>x\nMKT\n")


sequences = st.lists(st.text(sorted(set(ALPHABETS["protein"]) - {"*"}), min_size=1, max_size=200), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(sequences, st.integers(1, 70), st.booleans(), st.booleans())
def test_wrapping_and_case_do_not_change_what_is_read(tmp_path_factory, found, width, lower, blank):
    lines = []
    for i, sequence in enumerate(found):
        lines.append(f">s{i} of many")
        lines += [sequence[start : start + width] for start in range(0, len(sequence), width)] + [""] * blank
    data = "\n".join(lines)
    tmp_path = tmp_path_factory.mktemp("fasta")
    assert texts(read(tmp_path, (data.lower() if lower else data).encode(), "a.faa")) == found


def test_relatives_of_a_protein_are_near_duplicates_and_others_stay(tmp_path):
    base = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDFSAGEGLYTHMKALRPDEDRLSPLHS"
    close = base[:60] + "W" + base[61:]
    others = [base[::-1], base[50:] + base[:50][::-1], "".join(sorted(base))]
    data = "".join(f">{i}\n{sequence}\n" for i, sequence in enumerate([base, close, *others]))
    manifest = curate(read(tmp_path, data.encode(), "a.faa"), tmp_path / "corpus", CurateConfig(heldout_fraction=0.3))
    dropped = {rule["rule"]: rule["dropped"] for rule in manifest["rules"]}
    assert dropped["near_duplicate"] == 1 and sum(dropped.values()) == 1
    assert spread_residues("MKT", "protein") == "M K T" and spread_residues("ACG", "nucleotide") == "ACG"
