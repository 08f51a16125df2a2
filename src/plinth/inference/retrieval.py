"""Search of a run's own corpus: BM25 over passages of its documents, each found with its source and licence.

Source: Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond"; the scores are computed by bm25s
(Lù 2024, arXiv:2407.03618) as Lucene has them.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from plinth.config import UserError, read_json, save_json
from plinth.data.documents import document_id
from plinth.run import file_sha256, publish_dir

PASSAGE_CHARACTERS = 1000
EXCERPT_CHARACTERS = 240
INDEX_VERSION = 1  # rises when passages or words are cut in another way
EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each sign is a word
WORD = re.compile(rf"[^\W_{EAST_ASIAN}]+|[{EAST_ASIAN}]")
BREAKS = ("\n\n", "\n", " ")


@dataclass(frozen=True)
class Found:
    """One document that a query found, by its best passage."""

    id: str
    """the document's id: the beginning of its text's SHA-256"""
    source: str
    """where it was read"""
    kind: str
    """code, docs, reference, text, or the user's own word"""
    licence: str | None
    """its licence, where the corpus knows it"""
    url: str | None
    """its address, where the corpus knows it"""
    score: float
    """BM25 of the passage; it ranks the answers of one query and means nothing between queries"""
    start: int
    """character of the document at which the passage begins"""
    text: str
    """the passage"""
    excerpt: str
    """the part of the passage that holds most words of the query, on one line"""


def words(text: str) -> list[str]:
    """Return the words by which a text is found: folded to one case, names cut at underscores and dots."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def passages(text: str, limit: int = PASSAGE_CHARACTERS) -> list[tuple[int, int]]:
    """Return (start, end) of passages of at most `limit` characters that together are the text.

    They end behind a blank line where one lies in the second half of what may be taken, else behind a line, else behind a word.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    while len(text) - start > limit:
        half, most = start + limit // 2, start + limit
        ends = (text.rfind(mark, half, most) + len(mark) for mark in BREAKS if text.rfind(mark, half, most) >= 0)
        end = next(ends, most)
        spans.append((start, end))
        start = end
    return [*spans, (start, len(text))] if start < len(text) else spans


def excerpt(text: str, query: str, length: int = EXCERPT_CHARACTERS) -> str:
    """Return about `length` characters of a text, on one line, where most different words of the query stand."""
    wanted = set(words(query))
    places = [(match.start(), found[0]) for match in re.finditer(r"\w+", text) if (found := [w for w in words(match[0]) if w in wanted])]
    best, start = 0, 0
    for i, (at, _) in enumerate(places):
        inside = {word for place, word in places[i:] if place < at + length - 20}
        if len(inside) > best:
            best, start = len(inside), at
    line_start = text.rfind("\n", 0, start) + 1
    if start - line_start < length // 4:  # near enough to begin with the whole line
        start = line_start
    line = " ".join(text[start : start + length].split())
    return f"{'… ' if start else ''}{line}{' …' if start + length < len(text) else ''}"


def find_corpus(path: Path) -> Path:
    """Return the corpus folder that a build, one of its stages, a stage's model, or a corpus itself stands for.

    Raises UserError when there is none.
    """
    path = Path(path).absolute()
    builds = [path]
    if (path / "config.json").exists():  # a stage or its model: the corpus lies beside the stage
        builds += path.parents[:2] if path.name == "model" else path.parents[:1]
    for folder in (path, *(build / "corpus" for build in builds)):
        if (folder / "train.parquet").exists():
            return folder
    if not path.exists():
        raise UserError(f"{path} does not exist. Name a build or the folder of a corpus.")
    raise UserError(f"{path} has no corpus to search (no corpus/train.parquet). Name a build, or a folder that `plinth data curate` wrote.")


class SearchIndex:
    """An index of one corpus's passages; texts are read from the corpus when they are found."""

    def __init__(self, corpus: Path, scorer: Any, spans: np.ndarray):
        self.corpus = corpus
        self.num_passages = len(spans)
        self._scorer = scorer
        self._spans = spans  # int64 (passages, 3): document, start, end

    @classmethod
    def open(cls, path: Path | str) -> SearchIndex:
        """Open the index of what `path` stands for (see find_corpus); the first time, and when the corpus has changed, make it.

        It is kept beside the corpus, as NAME_index. Raises UserError without bm25s, without a corpus, or where nothing is in it.
        """
        library = _bm25s()
        corpus = find_corpus(Path(path))
        folder = corpus.with_name(f"{corpus.name}_index")
        stamp = {"version": INDEX_VERSION, "bm25s": library.__version__, "corpus_sha256": file_sha256(corpus / "train.parquet")}
        manifest = folder / "manifest.json"
        if not (manifest.exists() and read_json(manifest) == stamp):
            _make(library, corpus, folder, stamp)
        try:
            return cls(corpus, library.BM25.load(folder, show_progress=False), np.load(folder / "passages.npy"))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is damaged ({error}). Delete it; it is made anew.") from None

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.corpus / "train.parquet")

    def search(self, query: str, top: int = 5) -> list[Found]:
        """Return the `top` documents that fit a query best, best first; fewer where fewer hold one of its words.

        Equal scores stand in the corpus's order. Raises UserError when the query has no word.
        """
        if top < 1:
            raise UserError(f"top={top} must be at least 1.")
        if not words(query):
            raise UserError(f"query={query!r} has no word to search for.")
        known = [word for word in words(query) if word in self._scorer.vocab_dict]
        if not known:
            return []
        scores = self._scorer.get_scores(known)[: self.num_passages]
        seen: dict[int, Found] = {}
        for place in np.argsort(-scores, kind="stable"):
            document, start, end = map(int, self._spans[place])
            if scores[place] <= 0 or len(seen) == top:
                break
            if document not in seen:
                seen[document] = self._found(document, start, end, float(scores[place]), query)
        return list(seen.values())

    def _found(self, document: int, start: int, end: int, score: float, query: str) -> Found:
        row = self._row(document)
        text, known = row["text"], {name: row[name] for name in ("source", "kind", "licence", "url")}
        passage = text[start:end]
        return Found(id=document_id(text), **known, score=score, start=start, text=passage, excerpt=excerpt(passage, query))

    def _row(self, document: int) -> dict[str, Any]:
        """Return one row, reading no more of the corpus than the group of rows that holds it."""
        for group in range(self._file.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if document < rows:
                return self._file.read_row_group(group).slice(document, 1).to_pylist()[0]
            document -= rows
        raise AssertionError(f"the index names a document behind the corpus's last by {document + 1}")


def _bm25s():
    try:
        import bm25s
    except ImportError as error:
        raise UserError(f"searching a corpus needs the package bm25s ({error}). Install it: pip install 'plinth-fm[retrieval]'.") from None
    return bm25s


def _make(library: Any, corpus: Path, folder: Path, stamp: dict[str, Any]) -> None:
    vocabulary: dict[str, int] = {}
    tokens: list[list[int]] = []
    spans: list[tuple[int, int, int]] = []
    texts = (text.as_py() for batch in pq.ParquetFile(corpus / "train.parquet").iter_batches(columns=["text"]) for text in batch.column(0))
    for document, text in enumerate(texts):
        for start, end in passages(text):
            found = words(text[start:end])
            if found:
                tokens.append([vocabulary.setdefault(word, len(vocabulary)) for word in found])
                spans.append((document, start, end))
    if not spans:
        raise UserError(f"{corpus}/train.parquet holds no word to search for.")
    scorer = library.BM25()
    scorer.index(library.tokenization.Tokenized(ids=tokens, vocab=vocabulary), show_progress=False)
    with publish_dir(folder) as temporary:
        scorer.save(temporary, show_progress=False)
        np.save(temporary / "passages.npy", np.array(spans, np.int64))
        save_json(temporary / "manifest.json", stamp)
