"""The facts folder of the running interpreter's library: truth, the split by fact, invented names, determinism."""

import ast
import json
import re
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from plinth.config import UserError
from plinth.tasks.extraction import candidate_subjects, describe, first_sentence
from plinth.tasks.facts import FactsConfig, build_facts
from plinth.tasks.invented import split_name
from plinth.tasks.phrasing import EVALUATION, KINDS, TRAIN
from plinth.tasks.python_objects import PythonObject, read_library
from plinth.tasks.verify import REFUSAL, exact_match, is_refusal

CONFIG = FactsConfig(
    num_known=150, num_heldout=30, num_invented_train=120, num_invented_pairs=60, num_invented_eval=40,
    num_counterfactual_pairs=80, num_over_refusal_pairs=50, seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return read_library()


@pytest.fixture(scope="module")
def folder(library, tmp_path_factory):
    out = tmp_path_factory.mktemp("facts") / "facts"
    build_facts(out, CONFIG, library=library)
    return out


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Copy a file. Then more.", "Copy a file."),
        ("Copy a\n   file\n\nMore.", "Copy a file"),
        ("Parse e.g. a date. More.", "Parse e.g. a date."),
        ("Read version 3.11 files. Yes.", "Read version 3.11 files."),
        ("Is it so? Yes.", "Is it so?"),
    ],
)
def test_first_sentence(doc, sentence):
    assert first_sentence(doc) == sentence


@pytest.mark.parametrize(
    "doc", ["copy(x) -> y, a copy", "short.", "Deprecated alias of another.", "A :class:`Foo` with a role.", "Naïve text is not asked."]
)
def test_unusable_descriptions(doc):
    assert describe(PythonObject("m", "f", "function", doc, "", None, "m.py:1"), 80) is None


@pytest.mark.parametrize(
    ("name", "words", "joiner"),
    [("get_size", ["get", "size"], "_"), ("getSize", ["get", "Size"], ""), ("getsize", ["get", "size"], ""),
     ("HTTPServer", ["HTTP", "Server"], ""), ("walk", ["walk"], "")],
)  # fmt: skip
def test_split_name(name, words, joiner):
    assert split_name(name, {"get", "size"}) == (words, joiner)
    assert joiner.join(words) == name


def test_phrasings_of_training_and_evaluation_are_disjoint():
    for kind in KINDS:
        assert len(set(TRAIN[kind])) == len(TRAIN[kind]) >= 6 and len(set(EVALUATION[kind])) >= 3
    trained = {re.sub("[`.?]", "", text).lower() for kind in KINDS for text in TRAIN[kind]}
    assert not trained & {re.sub("[`.?]", "", text).lower() for kind in KINDS for text in EVALUATION[kind]}


def test_answers_stand_where_their_source_says(folder):
    """Each answer is found again by reading the file and line that the fact names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = {}
    for file in {fact["source"] for fact in lines(folder, "facts")}:
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        nodes |= {(file, node.lineno): node for node in ast.walk(tree) if isinstance(node, definitions)}
    for fact in lines(folder, "facts"):
        node = nodes[fact["source"], fact["line"]]
        assert node.name == fact["subject"].rpartition(".")[2]
        doc = " ".join((ast.get_docstring(node) or "").split())
        if fact["kind"] == "describe":
            assert doc.startswith(fact["answer"])
        elif fact["kind"] == "returns" and fact["evidence"] == "docstring":
            assert fact["answer"][1:] in doc and doc.startswith("Return")
        elif fact["kind"] == "signature":
            written = parameter_names(ast.parse(f"def {fact['answer']}: pass").body[0])
            assert written in (parameter_names(node), parameter_names(node)[1:])  # a method's first one is left out
        elif fact["kind"] == "module":
            assert f"{fact['answer']}.{fact['asked_name']}" == fact["subject"]


def parameter_names(node: ast.AST) -> list[str]:
    arguments = node.args
    return [a.arg for a in [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg] if a]


def test_every_question_has_one_right_answer(library):
    subjects = candidate_subjects(library, max_chars=80, max_name_chars=48)
    assert len(subjects) >= 1100, "the default config needs 1,000 known and 100 held-out functions"
    asked = Counter((fact.kind, fact.asked_name) for subject in subjects for fact in subject.facts)
    assert max(asked.values()) == 1
    assert not any(is_refusal(fact.answer) for subject in subjects for fact in subject.facts)


def test_heldout_functions_appear_in_no_training_line(folder):
    facts = lines(folder, "facts")
    heldout = {f["subject"] for f in facts if f["split"] == "heldout"}
    assert len(heldout) == CONFIG.num_heldout and len({f["subject"] for f in facts} - heldout) == CONFIG.num_known
    modules = {f["subject"]: f["answer"] for f in facts if f["kind"] == "module"}
    names = heldout | {subject.removeprefix(modules[subject] + ".") for subject in heldout if subject in modules}
    words = set(re.findall(r"[A-Za-z_][\w.]*\w", (folder / "sft.jsonl").read_text() + (folder / "pairs.jsonl").read_text()))
    assert not words & names


def test_questions_use_phrasings_that_training_does_not(folder):
    trained = {line["messages"][0]["content"] for line in lines(folder, "sft")} | {
        p["prompt"][0]["content"] for p in lines(folder, "pairs")
    }
    assert not trained & {q["question"] for q in lines(folder, "questions")}


def test_each_fact_is_asked_in_every_phrasing(folder):
    phrasings = defaultdict(set)
    for question in lines(folder, "questions"):
        phrasings[question["fact_id"]].add(question["phrasing"])
    assert all(numbers == {0, 1, 2} for numbers in phrasings.values())
    assert len({q["id"] for q in lines(folder, "questions")}) == len(lines(folder, "questions"))
    facts = {f["fact_id"] for f in lines(folder, "facts")}
    assert facts == {q["fact_id"] for q in lines(folder, "questions") if q["group"] != "invented"}


def test_invented_names_do_not_exist_and_their_uses_are_disjoint(folder, library):
    uses = {
        "train": {line["fact_id"] for line in lines(folder, "sft") if line["kind"] == "refusal"},
        "pairs": {line["fact_id"] for line in lines(folder, "pairs") if line["kind"] == "invented"},
        "eval": {line["fact_id"] for line in lines(folder, "questions") if line["group"] == "invented"},
    }
    subjects = {use: {fact_id.removeprefix("invented:").partition("#")[0] for fact_id in ids} for use, ids in uses.items()}
    sizes = {"train": CONFIG.num_invented_train, "pairs": CONFIG.num_invented_pairs, "eval": CONFIG.num_invented_eval}
    assert {use: len(names) for use, names in subjects.items()} == sizes
    bare = [name.rpartition(".")[2] for names in subjects.values() for name in names]
    assert len(set(bare)) >= 0.95 * len(bare) and len(set().union(*subjects.values())) == sum(sizes.values())
    modules = sorted(library.module_identifiers, key=len, reverse=True)
    for subject in set().union(*subjects.values()):
        module = next(m for m in modules if subject.startswith(m + "."))
        assert subject.rpartition(".")[2] not in library.module_identifiers[module]
    shapes = json.loads((folder / "manifest.json").read_text())["invented"]
    assert all(shape.get("misplaced", 0) > 0 for shape in shapes.values())


def test_refusals_are_the_answer_for_invented_names_only(folder):
    for line in lines(folder, "sft"):
        assert (line["messages"][1]["content"] == REFUSAL) == (line["kind"] == "refusal")


def test_pairs_prefer_what_is_right(folder):
    pairs = lines(folder, "pairs")
    facts = {f["fact_id"]: f for f in lines(folder, "facts")}
    for pair in pairs:
        assert not exact_match(pair["rejected"], [pair["chosen"]])
        if pair["kind"] == "invented":
            assert pair["chosen"] == REFUSAL and not is_refusal(pair["rejected"])
        else:
            assert pair["chosen"] == facts[pair["fact_id"]]["answer"]
            assert (pair["rejected"] == REFUSAL) == (pair["kind"] == "over_refusal")
    counts = Counter(pair["kind"] for pair in pairs)
    assert counts["over_refusal"] == 50 and counts["counterfactual"] == 80 and counts["invented"] >= 60


def test_the_same_seed_gives_the_same_bytes(folder, library, tmp_path):
    build_facts(tmp_path / "again", CONFIG, library=library)
    build_facts(tmp_path / "other", CONFIG, seed=4, library=library)
    for name in ("facts", "sft", "pairs", "questions"):
        ours = (folder / f"{name}.jsonl").read_bytes()
        assert ours == (tmp_path / "again" / f"{name}.jsonl").read_bytes() != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_asking_for_too_much_says_what_there_is(library, tmp_path):
    with pytest.raises(UserError, match=r"num_known=100000 .* need 100100 functions; this Python has \d+"):
        build_facts(tmp_path / "facts", FactsConfig(num_known=100_000), library=library)
    assert not (tmp_path / "facts").exists()
    with pytest.raises(UserError, match="invented names can be made from 3 known functions"):
        build_facts(tmp_path / "facts", FactsConfig(num_known=3, num_heldout=0, num_invented_train=10**5), library=library)
    with pytest.raises(UserError, match="kinds=describe,price"):
        FactsConfig(kinds=("describe", "price"))
