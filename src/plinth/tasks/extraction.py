"""Facts of one documented object: what it does, which module has it, its signature, what it returns."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from plinth.tasks.python_objects import Library, PythonObject
from plinth.tasks.verify import is_refusal, normalize

MIN_DESCRIPTION_CHARS = 15
_SENTENCE = re.compile(r"(.+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<! vs)(?<! cf)[.!?])(?=\s+[A-Z\"'`(*]|$)")
_UNFIT = re.compile(
    r"->|>>>|--|:\w+:`|[^ -~]|\b(?:deprecated|obsolete|todo|xxx|see rfc|not implemented|override|internal|undocumented|private)\b|:$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Fact:
    """One question's ground truth and where it was read."""

    fact_id: str
    """subject and kind, such as shutil.copyfile#describe"""
    kind: str
    """describe, module, signature or returns"""
    subject: str
    """the object's full name"""
    asked_name: str
    """the name that questions use: the full name, or the bare one where the module is asked for"""
    answer: str
    """the answer that training shows"""
    answers: tuple[str, ...]
    """all answers that count as right"""
    evidence: str
    """what the answer was read from: docstring, definition or annotation"""
    source: str
    """file relative to the library's folder"""
    line: int
    """line of the definition in that file"""

    @property
    def location(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Subject:
    """A documented object that has one clear description, with all its facts."""

    item: PythonObject
    facts: tuple[Fact, ...]

    def fact(self, kind: str) -> Fact | None:
        return next((fact for fact in self.facts if fact.kind == kind), None)


def first_sentence(doc: str) -> str:
    """Return the first sentence of a docstring's first paragraph on one line, its period kept."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    return match.group(1) if match else paragraph


def describe(item: PythonObject, max_chars: int) -> str | None:
    """Return the description of an object, or None where its docstring does not begin with a usable sentence."""
    text = first_sentence(item.doc)
    usable = MIN_DESCRIPTION_CHARS <= len(text) <= max_chars and len(text.split()) >= 3 and text[0].isupper()
    if not usable or _UNFIT.search(text) or text.startswith(item.last_name + "(") or is_refusal(text):
        return None
    return text


def returned_value(item: PythonObject, description: str, max_chars: int) -> tuple[str, str] | None:
    """Return what an object returns and the evidence for it, or None where neither docstring nor annotation says."""
    match = re.match(r"Returns? (?!from |to )([A-Za-z]+\b.+|\S{3}.+)", description)
    if match and item.type in ("function", "method"):
        return match.group(1)[0].upper() + match.group(1)[1:], "docstring"
    if item.returns and item.returns not in ("None", "Any", "'Any'") and len(item.returns) <= max_chars:
        return item.returns.strip("'\""), "annotation"
    return None


def signature(item: PythonObject, max_chars: int) -> str | None:
    """Return name and parameters, or None where there are none to ask for or they only pass everything on."""
    if not item.parameters or item.parameters == "*args, **kwargs":
        return None
    text = f"{item.last_name}({item.parameters})"
    return text if len(text) <= max_chars and text.isascii() else None


def module_answers(item: PythonObject, library: Library) -> tuple[str, ...]:
    """Return the modules that have a top-level object, or nothing where other modules define one of the same name."""
    defining = item.source.rpartition(":")[0].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if item.type not in ("function", "class") or library.defined_in.get(item.name) != {defining}:
        return ()
    private = any(part.startswith("_") for part in defining.split("."))
    return (item.module,) if private or defining == item.module else (item.module, defining)


def object_facts(item: PythonObject, library: Library, max_chars: int) -> Subject | None:
    """Return an object with its facts, or None where it has no usable description."""
    description = describe(item, max_chars)
    if description is None:
        return None
    found: list[tuple[str, str, tuple[str, ...], str]] = [("describe", item.subject, (description,), "docstring")]
    if modules := module_answers(item, library):
        found.append(("module", item.name, modules, "definition"))
    if text := signature(item, max_chars):
        found.append(("signature", item.subject, (text,), "definition"))
    if value := returned_value(item, description, max_chars):
        found.append(("returns", item.subject, (value[0],), value[1]))
    file, _, line = item.source.rpartition(":")
    facts = (
        Fact(f"{item.subject}#{kind}", kind, item.subject, name, answers[0], answers, evidence, file, int(line))
        for kind, name, answers, evidence in found
    )
    return Subject(item, tuple(facts))


def candidate_subjects(library: Library, *, max_chars: int, max_name_chars: int) -> list[Subject]:
    """Return every object that can be asked about, each with one right answer to a question.

    Left out are objects that several definitions describe differently, and descriptions that several objects share.
    """
    versions: dict[str, list[PythonObject]] = defaultdict(list)
    for item in library.objects:
        versions[item.subject].append(item)
    single = [
        items[0]
        for subject, items in versions.items()
        if len(subject) <= max_name_chars and len({(item.doc, item.parameters) for item in items}) == 1
    ]
    subjects = [subject for item in single if (subject := object_facts(item, library, max_chars)) is not None]
    shared = Counter(normalize(subject.facts[0].answer) for subject in subjects)
    return [subject for subject in subjects if shared[normalize(subject.facts[0].answer)] == 1]
