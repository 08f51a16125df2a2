"""Reading a library's source: public names, doors of packages, signatures, and what cannot be read."""

import sys

import pytest

from plinth.config import UserError
from plinth.tasks.python_objects import read_library

SHUTIL = '''
from os import walk
from time import sleep
__all__ = ["copyfile", "Copier"]
def copyfile(src, /, dst: str, *, follow=True) -> bool:
    """Copy a file.

    At length.
    """
def secret():
    """Not in __all__."""
class Copier:
    """Copies."""
    def run(self, what=None, *args, **kw):
        """Run it."""
    @staticmethod
    def make(source, target=1):
        """Make it."""
    @property
    def state(self):
        """Where it is."""
    def _hidden(self):
        """Private."""
    def undocumented(self):
        pass
if True:
    def late():
        """Not listed."""
'''


@pytest.fixture
def library(tmp_path):
    files = {
        "shutil.py": SHUTIL,
        "json/__init__.py": "from .decoder import *\nfrom ._hidden import loads\n__all__ = ['loads']\n",
        "json/decoder.py": '__all__ = ["Decoder"]\nclass Decoder:\n    """Decodes."""\n    def scan(self, s):\n        """Scans."""\n',
        "json/_hidden.py": 'def loads(s):\n    """Loads."""\ndef rest(s):\n    """Rest."""\n',
        "posixpath.py": '"""Paths."""\ndef join(a, *p):\n    """Join."""\n',
        "socket.py": 'from _socket import *\ndef fromfd(fd):\n    """From."""\n',
        "heapq.py": '__all__ = ["push"]\ntry:\n    from _heapq import *\nexcept ImportError:\n    pass\ndef push(a):\n    """Push."""\n',
        "not_stdlib.py": 'def ours():\n    """Ours."""\n',
        "test/support.py": 'def helper():\n    """Help."""\n',
        "csv.py": "def broken(:\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return read_library(tmp_path)


def test_public_documented_objects_under_their_users_names(library):
    found = {item.subject: (item.type, item.parameters, item.source) for item in library.objects}
    assert found == {
        "shutil.copyfile": ("function", "src, /, dst, *, follow=True", "shutil.py:5"),
        "shutil.Copier": ("class", None, "shutil.py:12"),
        "shutil.Copier.run": ("method", "what=None, *args, **kw", "shutil.py:14"),
        "shutil.Copier.make": ("method", "source, target=1", "shutil.py:17"),
        "shutil.Copier.state": ("property", None, "shutil.py:20"),
        "json.Decoder": ("class", None, "json/decoder.py:2"),
        "json.Decoder.scan": ("method", "s", "json/decoder.py:4"),
        "json.loads": ("function", "s", "json/_hidden.py:1"),
        "os.path.join": ("function", "a, *p", "posixpath.py:2"),
        "socket.fromfd": ("function", "fd", "socket.py:2"),
        "heapq.push": ("function", "a", "heapq.py:6"),
    }


def test_return_annotation_and_clean_docstring(library):
    item = next(item for item in library.objects if item.name == "copyfile")
    assert item.returns == "bool"
    assert item.doc == "Copy a file.\n\nAt length."


def test_opaque_are_modules_that_take_unlisted_names_from_one_without_source(library):
    assert library.opaque_modules == {"socket"}


def test_names_of_a_module_are_all_its_words(library):
    assert {"copyfile", "sleep", "secret", "_hidden"} <= library.module_identifiers["shutil"]
    assert "Decoder" in library.module_identifiers["json"] and "copyfile" not in library.module_identifiers["json"]


def test_a_folder_without_source_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no Python source"):
        read_library(tmp_path)


def test_reading_imports_nothing():
    before = set(sys.modules)
    objects = {item.subject: item for item in read_library().objects}
    assert set(sys.modules) == before
    assert objects["shutil.copyfile"].parameters == "src, dst, *, follow_symlinks=True"
    assert objects["os.path.join"].type == "function"
    assert objects["asyncio.Event.set"].source.startswith("asyncio/locks.py:")
