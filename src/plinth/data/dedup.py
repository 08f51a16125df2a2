"""Duplicates: exact ones by a hash of the normalised text, near ones by MinHash, verified by their true Jaccard similarity.

Near duplicates go through four steps that meet in ids and hashes only, never in text, so that each can run on many machines:
signatures (120 minima a document) -> candidate pairs (equal in one of 20 bands of 6) -> verified pairs -> connected components.
Of each component one document is kept, and which one does not depend on the order of the documents.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SHINGLE_WORDS = 5
NUM_BANDS = 20
BAND_ROWS = 6
NUM_HASHES = NUM_BANDS * BAND_ROWS
MINHASH_SEED = 1
SIGNATURE_CHUNK_BYTES = 32 << 20
MAX_BUCKET_PAIRS = 16  # in a bucket, a document is compared with that many next ones

_NOT_WORD = re.compile(r"[\W_]+")
# Scripts written without spaces: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Chinese characters. Each character counts as a word.
_UNSPACED = re.compile(r"([\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")


def exact_key(text: str) -> bytes:
    """Return a 16-byte hash of a text with its white space evened out."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16).digest()


def near_form(text: str) -> str:
    """Return what near duplicates are compared by: lower-case words separated by single spaces."""
    words = _NOT_WORD.sub(" ", text.lower())
    if not words.isascii():
        words = " ".join(_UNSPACED.sub(r" \1 ", words).split())
    return words.strip() or " ".join(text.split())  # a text of symbols only is compared by them


def shingles(form: str) -> set[tuple[str, ...]]:
    """Return the set of runs of five words; a shorter text is one run."""
    words = form.split(" ")
    if len(words) <= SHINGLE_WORDS:
        return {tuple(words)}
    return set(zip(*(words[offset:] for offset in range(SHINGLE_WORDS))))


def jaccard(a: set, b: set) -> float:
    """Return the share of the union of two sets that lies in both."""
    both = len(a & b)
    return both / max(1, len(a) + len(b) - both)


def exact_duplicates(texts: Iterable[str], preferences: Sequence) -> np.ndarray:
    """Return for each document the index of its kept exact duplicate, itself when it is kept; int64, shape (documents,).

    Of equal documents the one with the smallest preference is kept.
    """
    keys = [exact_key(text) for text in texts]
    best: dict[bytes, int] = {}
    for index, key in enumerate(keys):
        if key not in best or preferences[index] < preferences[best[key]]:
            best[key] = index
    return np.array([best[key] for key in keys], dtype=np.int64)


def signatures(forms: Sequence[str]) -> np.ndarray:
    """Return the MinHash signatures of texts in their near form: uint32, shape (documents, NUM_HASHES).

    The minima over 5-word shingles are computed by the built-in function of the data engine (daft), chunk by chunk.
    Source: Broder 1997, "On the resemblance and containment of documents".
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")  # the engine reports its use otherwise
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    import daft  # here, because it takes a third of a second and starts threads

    result = np.empty((len(forms), NUM_HASHES), dtype=np.uint32)
    for start, stop in _chunks(forms):
        column = daft.col("form").minhash(num_hashes=NUM_HASHES, ngram_size=SHINGLE_WORDS, seed=MINHASH_SEED, hash_function="xxhash3_64")
        table = daft.from_pydict({"form": list(forms[start:stop])}).select(column).to_arrow()
        values = table.column(0).combine_chunks().flatten().to_numpy()
        result[start:stop] = values.reshape(stop - start, NUM_HASHES)
    return result


def _chunks(forms: Sequence[str]) -> Iterable[tuple[int, int]]:
    start, size = 0, 0
    for index, form in enumerate(forms):
        size += len(form)
        if size >= SIGNATURE_CHUNK_BYTES:
            yield start, index + 1
            start, size = index + 1, 0
    if start < len(forms):
        yield start, len(forms)


def candidate_pairs(signatures_NH: np.ndarray) -> np.ndarray:
    """Return the distinct pairs of documents that agree in a whole band: int64, shape (pairs, 2), smaller index first.

    In a bucket of many documents each is paired with the next MAX_BUCKET_PAIRS only, so the work stays linear.
    Of pairs with Jaccard similarity 0.8 a share of 1 - (1 - 0.8**6)**20 = 0.998 is found.
    """
    found = []
    for band in range(NUM_BANDS):
        rows = np.ascontiguousarray(signatures_NH[:, band * BAND_ROWS : (band + 1) * BAND_ROWS])
        _, bucket = np.unique(rows.view([("", rows.dtype)] * BAND_ROWS).ravel(), return_inverse=True)
        order = np.argsort(bucket.ravel(), kind="stable")
        ordered = bucket.ravel()[order]
        for distance in range(1, MAX_BUCKET_PAIRS + 1):
            same = np.flatnonzero(ordered[distance:] == ordered[: len(ordered) - distance])
            if len(same) == 0:
                break
            found.append(np.stack([order[same], order[same + distance]], axis=1))
    if not found:
        return np.empty((0, 2), dtype=np.int64)
    return np.unique(np.concatenate(found).astype(np.int64), axis=0)


def verified_pairs(pairs: np.ndarray, forms: Sequence[str], threshold: float) -> np.ndarray:
    """Return those pairs whose true Jaccard similarity over shingles is at least `threshold`; shape (pairs, 2).

    The pairs must be sorted by their first member, whose shingles are then made once; those of 64 others are remembered.
    """
    keep = np.zeros(len(pairs), dtype=bool)
    last, last_shingles = -1, set()
    cache: dict[int, set] = {}
    for row, (a, b) in enumerate(pairs.tolist()):
        if a != last:
            last, last_shingles = a, cache.pop(a, None) or shingles(forms[a])
        if b not in cache:
            if len(cache) >= 64:
                cache.clear()
            cache[b] = shingles(forms[b])
        keep[row] = jaccard(last_shingles, cache[b]) >= threshold
    return pairs[keep]


def near_duplicates(texts: Sequence[str], preferences: Sequence, threshold: float) -> np.ndarray:
    """Return for each document the index of its kept near duplicate, itself when it is kept; int64, shape (documents,).

    Documents connected by pairs of similarity >= `threshold` form a component; its smallest preference is kept. As all work is
    done in the order of the preferences, the result does not depend on the order of the documents.
    """
    num_documents = len(texts)
    if num_documents == 0:
        return np.empty(0, dtype=np.int64)
    order = sorted(range(num_documents), key=preferences.__getitem__)
    forms = [near_form(texts[index]) for index in order]
    pairs = verified_pairs(candidate_pairs(signatures(forms)), forms, threshold)
    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(num_documents, num_documents))
    _, component = connected_components(graph, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    kept = np.empty(num_documents, dtype=np.int64)
    kept[order] = np.asarray(order)[first[inverse.ravel()]]
    return kept
