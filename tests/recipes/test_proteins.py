"""Proteins from a FASTA file to vectors, through the commands; and the invented families that try it."""

import json

import numpy as np
import pytest

from plinth.cli.main import main
from plinth.config import read_json
from plinth.tasks.protein_families import RESIDUES, FamilyConfig, exchange_matrix, invent_families, to_fasta

SMALL = FamilyConfig(families=4, members=30, shortest=30, longest=40)
SHAPE = ["--model.hidden-size", "32", "--model.num-layers", "2", "--model.num-heads", "2", "--model.intermediate-size", "64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proteins")
    (folder / "all.fasta").write_text(to_fasta(invent_families(SMALL)))
    names = {name: str(folder / name) for name in ("all.fasta", "corpus", "tokenizer", "shards", "run")}
    for argv in (
        ["data", "curate", names["all.fasta"], "--out", names["corpus"], "--near-duplicate-threshold", "None"],
        ["tokenizer", "train", "--residues", "protein", "--out", names["tokenizer"]],
        ["data", "pack", names["corpus"], "--tokenizer", names["tokenizer"], "--out", names["shards"]],
        ["pretrain", "--family", "bert", names["shards"], "--tokenizer", names["tokenizer"], "--out", names["run"], *SHAPE,
         "--data.rows", "document", "--data.seq-len", "48", "--data.sequences-per-step", "32", "--train.steps", "60",
         "--train.warmup-steps", "10", "--train.dtype", "float32"],
    ):  # fmt: skip
        assert main(argv) == 0
    return folder


def test_a_sequence_is_a_row_and_the_model_learns_more_than_frequencies(run):
    manifest = read_json(run / "shards" / "manifest.json")
    assert manifest["vocab_size"] == 34 and set(manifest["mixture"]["train"]) == {"protein"}
    done = read_json(run / "run" / "DONE")
    summary = done.get("summary", done)
    assert summary["heldout_nats"] < 0.97 * summary["heldout_unigram_nats"]


def test_each_sequence_gets_a_vector_by_its_identifier(run, tmp_path, capsys):
    fasta = tmp_path / "new.fa"
    fasta.write_text(">one some words\nMKTAYIAK\nQRQISF\n>bad\nMK7\n>two\nmktayiakqrqisf\n")
    out = tmp_path / "vectors.jsonl"
    assert main(["embed", str(run / "run"), "--file", str(fasta), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert "1 records not used: bad (line 4): '7' at residue 3" in captured.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["one", "two"] == json.loads(captured.out)["ids"]
    assert np.allclose(rows[0]["embedding"], rows[1]["embedding"], atol=1e-6)  # case and wrapping do not matter
    assert main(["embed", str(run / "run"), "--file", str(fasta), "--text", "MKT"]) == 1


def test_a_hidden_residue_is_filled(run, capsys):
    sequence = invent_families(SMALL)[0].sequence
    assert main(["fill", str(run / "run"), "--text", f"{sequence[:10]}[MASK]{sequence[11:]}", "--json"]) == 0
    assert sequence[:10] in capsys.readouterr().out


def test_families_descend_from_their_ancestors():
    members = invent_families(SMALL)
    assert members == invent_families(SMALL) and len(members) == 120
    assert set("".join(member.sequence for member in members)) <= set(RESIDUES)
    matrix = exchange_matrix()
    assert np.allclose(matrix.sum(1), 1) and not np.diag(matrix).any()

    def likeness(a: str, b: str) -> float:
        return np.mean([x == y for x, y in zip(a, b)])

    same = invent_families(FamilyConfig(families=2, members=8, indel_rate=0.0))
    near = [likeness(same[0].sequence, other.sequence) for other in same[1:8]]
    far = [likeness(same[0].sequence, other.sequence) for other in same[8:]]
    assert min(near) > 0.4 > 0.2 > max(far)
    assert 0.9 < np.mean([member.nats for member in members]) < 1.3
