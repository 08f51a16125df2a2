"""The labelled tasks of benchmarks/ulmfit.py: passages of translations of one text, labelled with their language, and passages of the
Python standard library, labelled with their package.

The passages come in three parts that share no passage: those to learn from (the labelled ones are drawn from these, and the target
language model reads their text without the labels), a tuning set on which every setting is chosen, and a test set that is only reported.
"""

from __future__ import annotations

import json
import math
import random
import re
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from plinth.data.documents import Document, TableBuilder
from plinth.data.shards import pack_corpus
from plinth.data.stdlib import stdlib_documents
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer

VOCABULARY = 2048
WORD = re.compile(r"[^\W\d_]+|\d+|[^\s\w]|_")
Example = dict[str, str]
# twenty Bantu languages, as the declarations' files are named; some are neighbours (kin and run; xho, zul and ssw; sot, tsn and nso)
LANGUAGES = (
    "bem", "kin", "lin", "loz", "lua", "lug", "ndo", "nso", "nya_chechewa", "run",
    "sna", "sot", "ssw", "swh", "toi", "tsn", "tso_MZ", "ven", "xho", "zul",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Labelled passages, and text to pretrain on."""

    passage: int
    """characters of a passage, at least"""
    tuned: int
    """passages of each class to choose settings on"""
    tested: int
    """passages of each class that are only reported"""
    unit: str
    """what a passage is called"""


TASKS = {"languages": Task(80, 15, 30, "line"), "packages": Task(480, 50, 100, "passage")}


def passages_of(pieces: Iterable[str], size: int, between: str) -> Iterator[str]:
    """Put consecutive pieces of a text together to passages of at least `size` characters."""
    chosen: list[str] = []
    for piece in pieces:
        chosen.append(piece)
        if sum(map(len, chosen)) + len(between) * (len(chosen) - 1) >= size:
            yield between.join(chosen)
            chosen = []


def packages(sources: list[str], sizes: list[int]) -> list[str]:
    """Return the eight packages with the most text, tables of characters left out."""
    total: Counter[str] = Counter()
    for source, size in zip(sources, sizes):
        parts = source.removeprefix("stdlib:Lib/").split("/")
        if len(parts) > 1 and parts[0] not in ("encodings", "distutils", "ensurepip"):
            total[parts[0]] += size
    return sorted(name for name, _ in total.most_common(8))


def package_text(size: int) -> tuple[dict[str, list[str]], list[str]]:
    """Return passages by package, and the rest of the standard library. Lines in which one of the packages is named are left out."""
    table = stdlib_documents()
    table = table.filter(pa.array([kind == "code" for kind in table["kind"].to_pylist()]))
    texts, sources = table["text"].to_pylist(), table["source"].to_pylist()
    names = packages(sources, [len(text) for text in texts])
    named = re.compile(r"\b(" + "|".join(names) + r")", re.IGNORECASE)
    found, general = defaultdict(list), []
    for text, source in zip(texts, sources):
        package = source.removeprefix("stdlib:Lib/").split("/")[0]
        if package in names:
            lines = (line for line in text.splitlines() if line.strip() and not named.search(line))
            found[package] += [passage for passage in passages_of(lines, size, "\n") if len(passage) < 2 * size]
        elif package != "encodings":
            general.append(text)
    return found, general


def language_text(declarations: Path, size: int) -> tuple[dict[str, list[str]], list[str]]:
    """Return passages by language of twenty translations of one text, and passages of its translations into other languages.

    `declarations` is NLTK's archive of the Universal Declaration of Human Rights (udhr2.zip). Of the other languages those in Latin
    letters; other translations into one of the twenty are left out.
    """
    found, general = {}, []
    with zipfile.ZipFile(declarations) as archive:
        for file in sorted(name for name in archive.namelist() if name.endswith(".txt")):
            text, name = archive.read(file).decode(), Path(file).stem
            letters = [sign for sign in text if sign.isalpha()]
            if name in LANGUAGES:
                found[name] = list(passages_of(text.split(), size, " "))
            elif sum("LATIN" in unicodedata.name(sign, "") for sign in letters) > 0.97 * len(letters) and len(text) > 8000:
                if name.split("_")[0] not in {known.split("_")[0] for known in LANGUAGES}:
                    general += passages_of(text.split(), size, " ")
    return found, general


def prepare(folder: Path, task: str, declarations: Path | None = None) -> None:
    """Write the passages to learn, to tune and to test, the tokenizer, and the shards of other text and of the passages to learn."""
    shape = TASKS[task]
    if task == "packages":
        found, general = package_text(shape.passage)
    elif declarations is None:
        raise SystemExit("--declarations must name NLTK's udhr2.zip.")
    else:
        found, general = language_text(declarations, shape.passage)
    rng = random.Random(0)
    parts = split(found, shape, rng)
    train_tokenizer(general, VOCABULARY).save(folder / "tokenizer")
    rest = [example["text"] for example in parts.pop("rest")]
    for name, documents in (("general", general), ("target", rest)):
        rng.shuffle(documents)
        pack(folder, name, documents)
    for name, examples in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(examples))


def split(found: dict[str, list[str]], task: Task, rng: random.Random) -> dict[str, list[Example]]:
    """Return the parts: tuning, test, pool (to label, the classes in turn) and rest (all that is to learn from); no passage is in two."""
    seen = Counter(passage for each in found.values() for passage in set(each))
    parts: dict[str, list[Example]] = {"tuning": [], "test": []}
    learn = []
    for name in sorted(found):
        each = [{"text": passage, "label": name} for passage in sorted(set(found[name])) if seen[passage] == 1]
        rng.shuffle(each)
        parts["tuning"] += each[: task.tuned]
        parts["test"] += each[task.tuned : task.tuned + task.tested]
        learn.append(each[task.tuned + task.tested :])
    parts["pool"] = [example for group in zip(*learn) for example in group]
    return parts | {"rest": [example for each in learn for example in each]}


def pack(folder: Path, name: str, documents: list[str]) -> None:
    """Write shards, one document of twenty held out."""
    corpus = folder / f"{name}-corpus"
    corpus.mkdir()
    for part, chosen in (("heldout", documents[::20]), ("train", [text for i, text in enumerate(documents) if i % 20])):
        builder = TableBuilder()
        for i, text in enumerate(chosen):
            builder.add(Document(text, f"{name}:{part}:{i}", "text", None, None, None))
        pyarrow.parquet.write_table(builder.finish(), corpus / f"{part}.parquet")
    pack_corpus(corpus, Tokenizer.load(folder / "tokenizer"), folder / name)


def draw(folder: Path, labels: int, seed: int) -> list[Example]:
    """Return labelled passages, each class equally often (but for what does not divide)."""
    pool = json.loads((folder / "pool.json").read_text())
    classes = len({example["label"] for example in pool})
    groups = [pool[i : i + classes] for i in range(0, len(pool), classes)]
    return [example for group in random.Random(seed).sample(groups, -(-labels // classes)) for example in group][:labels]


def naive_bayes(train: Sequence[Example], texts: Sequence[str], smoothing: float) -> list[str]:
    """Return the label of each text by which words, numbers and signs are in it: multinomial naive Bayes over their presence.

    Source: McCallum and Nigam 1998, A comparison of event models for naive Bayes text classification.
    """
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        words[example["label"]].update(set(WORD.findall(example["text"])))
    known = set().union(*words.values())
    share = Counter(example["label"] for example in train)
    totals = {label: sum(counts.values()) + smoothing * len(known) for label, counts in words.items()}

    def score(label: str, found: set[str]) -> float:
        return math.log(share[label]) + sum(math.log((words[label][word] + smoothing) / totals[label]) for word in found)

    return [max(sorted(words), key=lambda label: score(label, found)) for found in (set(WORD.findall(text)) & known for text in texts)]


def told_right(told: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
    """Return the share told right, and for each example whether it is, as bits of a hexadecimal number, the first one the highest."""
    right = [int(label == example["label"]) for label, example in zip(told, examples)]
    return {"accuracy": sum(right) / len(right), "right": f"{int(''.join(map(str, right)), 2):x}"}
