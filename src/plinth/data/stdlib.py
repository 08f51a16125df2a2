"""The embedded default text: the standard library of the Python interpreter that runs Plinth.

Nothing is shipped or downloaded, and no module is imported: the sources are parsed. Three kinds of documents come out:
`code` (a source file with its docstrings), `docs` (one documented public object: its qualified signature and its docstring)
and `reference` (a topic of the language reference). Each names its file and line below Lib/.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from plinth.config import UserError
from plinth.data.documents import Document, TableBuilder

LICENCE = "PSF-2.0"
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
    | {"__pycache__", "lib-dynload", "_bundled", "pydoc_data", "__phello__"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")  # written by the installation
PUBLIC_NAMES = {"_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime", "_collections_abc": "collections.abc"}
_SCOPES = (ast.If, ast.Try, ast.With)


def stdlib_documents(root: Path | None = None) -> pa.Table:
    """Return the document table of the running interpreter's standard library, or of another one's at `root`.

    Columns as in `documents.SCHEMA`; `source` is "stdlib:Lib/shutil.py" for a file and "stdlib:Lib/shutil.py:230" for an object
    or a topic; `group` is the file, so that a docstring and the file it stands in are held out together.
    Raises UserError when this interpreter comes without its library's sources.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    builder = TableBuilder()
    for path in source_files(root):
        for document in documents_of_file(path, path.relative_to(root)):
            builder.add(document)
    if builder.num_documents == 0:
        raise UserError(
            f"{root} holds no Python sources, so there is no default text. Name your own text files, "
            "or run with an interpreter that has its library's sources."
        )
    for path in sorted((root / "pydoc_data").rglob("*.py")):
        for document in topics_of_file(path, path.relative_to(root)):
            builder.add(document)
    return builder.finish()


def source_files(root: Path) -> Iterator[Path]:
    """Yield the library's .py files in a fixed order, without tests, bundled packages and what the installation wrote."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in EXCLUDED_FOLDERS and not name.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith(EXCLUDED_PREFIXES):
                yield Path(folder, name)


def documents_of_file(path: Path, relative: Path) -> Iterator[Document]:
    """Yield a source file as `code`, then its documented public objects as `docs` (none when it does not parse)."""
    code = _read(path)
    if not code.strip():
        return
    source = f"stdlib:Lib/{relative.as_posix()}"
    yield Document(code, source, "code", LICENCE, None, source)
    module = module_name(relative)
    if any(part.startswith("_") for part in module.split(".")):
        return
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a template or a file of another version that a distribution put there
        return
    for signature, docstring, line in documented_objects(tree, module):
        yield Document(f"{signature}\n\n{docstring}", f"{source}:{line}", "docs", LICENCE, None, source)


def module_name(relative: Path) -> str:
    """Return the dotted name under which users import a file: asyncio/tasks.py is asyncio.tasks, _pydecimal.py is decimal."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    name = ".".join(parts)
    return PUBLIC_NAMES.get(name, name)


def documented_objects(tree: ast.Module, module: str) -> Iterator[tuple[str, str, int]]:
    """Yield (qualified signature, docstring, line) of the module itself and of each public object that has a docstring."""
    if docstring := ast.get_docstring(tree):
        yield f"module {module}", docstring, 1
    seen: set[str] = set()
    for node, prefix, in_class in _definitions(tree.body, module, False):
        name = f"{prefix}.{node.name}"
        docstring = ast.get_docstring(node)
        if docstring and docstring.strip() and name not in seen:
            seen.add(name)
            yield signature_of(node, name, in_class), docstring, node.lineno


def _definitions(body: list[ast.stmt], prefix: str, in_class: bool) -> Iterator[tuple]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_"):
                yield node, prefix, in_class
                if isinstance(node, ast.ClassDef):
                    yield from _definitions(node.body, f"{prefix}.{node.name}", True)
        elif isinstance(node, _SCOPES):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            branches = [*node.body, *handlers, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            yield from _definitions(branches, prefix, in_class)


def signature_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, in_class: bool) -> str:
    """Return how a caller writes the object: a method without self, a class with its constructor's arguments."""
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return f"class {name}({_arguments(member, bound=True)})"
        return f"class {name}"
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if in_class and any(text.split("(")[0].endswith("property") or text.endswith(".setter") for text in decorators):
        return name
    arguments = _arguments(node, bound=in_class and "staticmethod" not in decorators)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}{name}({arguments}){returns}"


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> str:
    arguments = node.args
    if bound and (arguments.posonlyargs or arguments.args):
        positional = arguments.posonlyargs + arguments.args
        num_defaults = min(len(arguments.defaults), len(positional) - 1)
        arguments = ast.arguments(
            posonlyargs=arguments.posonlyargs[1:],
            args=arguments.args if arguments.posonlyargs else arguments.args[1:],
            vararg=arguments.vararg,
            kwonlyargs=arguments.kwonlyargs,
            kw_defaults=arguments.kw_defaults,
            kwarg=arguments.kwarg,
            defaults=arguments.defaults[len(arguments.defaults) - num_defaults :],
        )
    return ast.unparse(arguments)


def topics_of_file(path: Path, relative: Path) -> Iterator[Document]:
    """Yield the topics of the language reference in one file of pydoc_data.

    A topic is an entry of several lines in a dictionary literal, whichever file and name an interpreter keeps it under.
    """
    source = f"stdlib:Lib/{relative.as_posix()}"
    for statement in ast.parse(_read(path)).body:
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if not isinstance(value, ast.Dict):
            continue
        for key, entry in zip(value.keys, value.values):
            if isinstance(key, ast.Constant) and isinstance(entry, ast.Constant) and isinstance(entry.value, str) and "\n" in entry.value:
                where = f"{source}:{key.lineno}"
                yield Document(entry.value.strip() + "\n", where, "reference", LICENCE, None, where)


def _read(path: Path) -> str:
    with tokenize.open(path) as file:  # honours a coding cookie
        return file.read()
