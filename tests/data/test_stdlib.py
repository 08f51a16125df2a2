"""The embedded default text: parsed, never imported, each document traceable to its line."""

import inspect
import shutil
import sys
import sysconfig
from pathlib import Path

import pyarrow.compute as pc
import pytest

from plinth.config import UserError
from plinth.data.documents import SCHEMA
from plinth.data.stdlib import documented_objects, stdlib_documents, topics_of_file

SOURCE = '''"""What the module is for."""
import sys
if sys.platform == "win32":
    def platform_only(a):
        """Only there."""
else:
    def platform_only(a, b=1):
        """Elsewhere."""

def _hidden():
    """Private."""

def bare(): pass

async def fetch(url, *, timeout: float = 1.0) -> bytes:
    """Fetch it."""

class Box:
    """Holds things."""
    def __init__(self, size, /, colour="red", *rest, deep=None): pass
    def put(self, thing): "Put it."
    @staticmethod
    def measure(thing): "Measure it."
    @property
    def weight(self): "In grams."
    class Lid:
        """Closes."""
'''


@pytest.fixture(scope="module")
def table():
    return stdlib_documents()


def test_each_documented_public_object_is_one_document():
    import ast

    found = list(documented_objects(ast.parse(SOURCE), "pack"))
    assert [signature for signature, _, _ in found] == [
        "module pack",
        "pack.platform_only(a)",
        "async pack.fetch(url, *, timeout: float=1.0) -> bytes",
        "class pack.Box(size, /, colour='red', *rest, deep=None)",
        "pack.Box.put(thing)",
        "pack.Box.measure(thing)",
        "pack.Box.weight",
        "class pack.Box.Lid",
    ]
    lines = SOURCE.splitlines()
    for signature, _, line in found[1:]:
        assert signature.split(".")[-1].split("(")[0] in lines[line - 1]


def test_docstrings_equal_those_of_the_imported_modules(table):
    rows = [row for row in table.to_pylist() if row["kind"] == "docs" and row["source"].startswith("stdlib:Lib/shutil.py:")]
    by_name = {row["text"].split("(")[0]: row for row in rows}
    for name in ("copyfile", "copytree", "disk_usage", "make_archive"):
        function = getattr(shutil, name)
        signature, docstring = by_name[f"shutil.{name}"]["text"].split("\n\n", 1)
        assert docstring == inspect.getdoc(function)
        assert signature.startswith(f"shutil.{name}(")
        assert by_name[f"shutil.{name}"]["source"] == f"stdlib:Lib/shutil.py:{function.__code__.co_firstlineno}"


def test_code_is_the_file_itself_and_tests_are_left_out(table):
    code = {row["source"]: row for row in table.to_pylist() if row["kind"] == "code"}
    assert code["stdlib:Lib/shutil.py"]["text"] == Path(shutil.__file__).read_text(encoding="utf-8")
    assert code["stdlib:Lib/shutil.py"]["licence"] == "PSF-2.0"
    assert not [source for source in code if "/test/" in source or "site-packages" in source or "_sysconfigdata" in source]
    assert table.schema == SCHEMA


def test_the_reference_holds_the_language_topics(table):
    reference = table.filter(pc.equal(table["kind"], "reference")).to_pylist()
    assert len(reference) > 50
    assert any(row["text"].startswith('The "assert" statement') for row in reference)
    assert all(row["source"].rsplit(":", 1)[1].isdigit() for row in reference)


def test_topics_split_over_files_are_found_whatever_their_name(tmp_path):
    (tmp_path / "a.py").write_text("topics = {'if': 'The if\\nstatement', 'x': 'y'}\nmodule_docs = {'abc': 'library/abc'}\n")
    (tmp_path / "b.py").write_text("PARTS: dict = {\n 'for':\n 'The for\\n' 'loop'}\n")
    texts = [(document.text, document.source) for name in ("a.py", "b.py") for document in topics_of_file(tmp_path / name, Path(name))]
    assert texts == [("The if\nstatement\n", "stdlib:Lib/a.py:1"), ("The for\nloop\n", "stdlib:Lib/b.py:2")]


def test_nothing_is_imported():
    import subprocess

    code = (
        "import sys; from plinth.data.stdlib import stdlib_documents; before = set(sys.modules); stdlib_documents();"
        "print(sorted(m for m in set(sys.modules) - before if m in ('turtle', 'antigravity', 'tkinter', 'this', 'pydoc_data.topics')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": _src()})
    assert done.stdout.strip() == "[]"


def _src() -> str:
    import plinth

    return str(Path(plinth.__file__).parents[1])


def test_a_file_that_does_not_parse_is_still_code(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n    pass  # of another version\n")
    (tmp_path / "good.py").write_text('"""Doc."""\n')
    kinds = [(row["source"], row["kind"]) for row in stdlib_documents(tmp_path).to_pylist()]
    assert kinds == [("stdlib:Lib/broken.py", "code"), ("stdlib:Lib/good.py", "code"), ("stdlib:Lib/good.py:1", "docs")]


def test_an_interpreter_without_sources_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no Python sources"):
        stdlib_documents(tmp_path)


def test_the_default_root_is_the_running_interpreters(table):
    assert Path(sysconfig.get_path("stdlib"), table["source"][0].as_py().removeprefix("stdlib:Lib/")).is_file()
