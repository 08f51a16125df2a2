"""A small corpus packed into shards: real text with structure to learn."""

import pytest

from plinth.data.curate import CurateConfig, curate
from plinth.data.shards import pack_corpus
from plinth.data.sources import read_documents
from plinth.tokenizer.train import train_tokenizer

COLOURS, ANIMALS, PLACES = ("red", "blue", "green", "grey"), ("cat", "fox", "hen", "owl"), ("barn", "wood", "town", "lake")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Shards of 60 short stories with a vocabulary of 300; the tokenizer lies beside them."""
    folder = tmp_path_factory.mktemp("stories")
    (folder / "texts").mkdir()
    for i in range(60):
        a, b, c = COLOURS[i % 4], ANIMALS[i // 4 % 4], PLACES[(i * 7 + i // 16) % 4]
        lines = [
            f"On day {i + n} the {a} {b} walked from the {c} to the {PLACES[(i + n) % 4]} and met {n + i * 3} friends." for n in range(20)
        ]
        (folder / "texts" / f"story{i}.txt").write_text("\n".join(lines) + "\n")
    documents = read_documents([folder / "texts"])
    curate(documents, folder / "corpus", CurateConfig(near_duplicate_threshold=None, heldout_fraction=0.1, skip_rules=("repeated_ngrams",)))
    tokenizer = train_tokenizer(documents.table["text"].to_pylist(), 300)
    tokenizer.save(folder / "tokenizer")
    pack_corpus(folder / "corpus", tokenizer, folder / "shards")
    return folder / "shards"
