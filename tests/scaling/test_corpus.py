import random

import pytest

from plinth.config import UserError
from plinth.scaling.corpus import CorpusStats, VocabularyPoint, describe_corpus


def texts(documents=40, seed=0):
    words = ["function", "returns", "value", "module", "list", "path", "name", "string", "error", "number", "open", "file", "é", "日本"]
    generator = random.Random(seed)
    return [" ".join(generator.choice(words) + str(generator.randrange(50)) for _ in range(120)) for _ in range(documents)]


def test_counts_bytes_and_larger_vocabularies_hold_more():
    documents = texts()
    stats = describe_corpus(documents, has_instructions=True, vocabularies=(300, 512))
    assert stats.text_bytes == sum(len(text.encode()) for text in documents)
    assert stats.documents == 40 and stats.has_instructions
    sizes = [point.vocab_size for point in stats.vocabularies]
    assert sizes == sorted(sizes) and len(sizes) == 2
    assert 1.0 <= stats.vocabularies[0].bytes_per_token < stats.vocabularies[1].bytes_per_token
    assert stats == describe_corpus(documents, has_instructions=True, vocabularies=(300, 512))


def test_interpolates_in_the_logarithm():
    stats = CorpusStats(10**6, 10, (VocabularyPoint(1024, 2.0), VocabularyPoint(4096, 3.0)))
    assert stats.bytes_per_token(2048) == pytest.approx(2.5)
    assert stats.bytes_per_token(1024) == 2.0 and stats.bytes_per_token(8192) == pytest.approx(3.5)


def test_a_small_text_has_a_small_vocabulary():
    stats = describe_corpus(texts(documents=14))
    assert stats.vocabularies[-1].vocab_size <= 512


def test_too_short_a_text_says_so():
    with pytest.raises(UserError, match="the text holds 5 bytes in 1 documents; a model needs at least"):
        describe_corpus(["short"])
