"""The documented public objects of the running interpreter's standard library, read from its source with `ast` alone.

No module is imported, so nothing in the library runs. An object carries the name under which its users know it: a class that
`asyncio/events.py` defines and `asyncio/__init__.py` passes on is `asyncio.X`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from plinth.config import UserError

SKIPPED_PACKAGES = frozenset("antigravity distutils encodings ensurepip idlelib lib2to3 msilib pydoc_data this turtledemo venv".split())
UNASKED_PACKAGES = frozenset("genericpath nt ntpath nturl2path sre_compile sre_constants sre_parse tkinter turtle".split())
PUBLIC_NAMES = {  # where the documented module is only a door to another file
    "posixpath": "os.path",
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
WELL_KNOWN = tuple(
    "os.path shutil json pathlib random re os tempfile collections functools textwrap csv string statistics datetime copy glob "
    "zipfile tarfile threading subprocess asyncio logging argparse inspect ast contextlib dataclasses typing types urllib.parse "
    "urllib.request http.client http.server http.cookies socket ssl base64 gzip bz2 lzma pickle shelve sqlite3 configparser "
    "calendar heapq bisect hashlib hmac secrets fractions decimal enum abc operator io unittest unittest.mock doctest traceback "
    "warnings weakref queue multiprocessing concurrent.futures email email.message email.utils html html.parser "
    "xml.etree.ElementTree xml.dom.minidom uuid ipaddress fileinput fnmatch linecache difflib pprint locale gettext getpass "
    "platform importlib importlib.util importlib.metadata pkgutil dis tokenize token keyword pdb profile cProfile pstats timeit "
    "tracemalloc trace sched selectors signal stat filecmp mimetypes smtplib ftplib imaplib poplib socketserver webbrowser "
    "wsgiref.util xmlrpc.client optparse getopt cmd shlex code codeop codecs colorsys struct numbers reprlib sysconfig site "
    "runpy zipapp zipimport graphlib zoneinfo plistlib netrc stringprep quopri mailbox symtable tabnanny py_compile compileall "
    "logging.handlers logging.config collections.abc tomllib ctypes ctypes.util curses.textpad contextvars copyreg".split()
)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class PythonObject:
    """A public function, class or method with a docstring."""

    module: str
    """documented module, such as os.path"""
    name: str
    """name within the module, such as copyfile or Path.exists"""
    type: str
    """function, class, method or property"""
    doc: str
    """docstring, cleaned of its indentation"""
    parameters: str | None
    """parameters as in the source, without self, cls and annotations; None for classes and properties"""
    returns: str | None
    """return annotation as in the source"""
    source: str
    """file relative to the library's folder and line, such as shutil.py:230"""

    @property
    def subject(self) -> str:
        """The full name, such as shutil.copyfile."""
        return f"{self.module}.{self.name}"

    @property
    def last_name(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass
class Library:
    """All that was read: the objects, and the names that an invented one must avoid."""

    objects: list[PythonObject]
    """documented public objects, in order of file and line"""
    defined_in: dict[str, set[str]]
    """every name that some file defines at top level, or takes from a module without source -> the modules' names"""
    identifiers: set[str] = field(default_factory=set)
    """every word of every file that looks like an identifier, comments and strings included"""
    module_identifiers: dict[str, set[str]] = field(default_factory=dict)
    """the same for each documented module, with the files of its package"""
    opaque_modules: set[str] = field(default_factory=set)
    """modules that take names from a module without source and do not list them, so that what they hold cannot be read here"""


@dataclass
class _File:
    module: str
    relative: str
    tree: ast.Module
    words: set[str]
    attributes: set[tuple[str, str]]
    is_package: bool


def read_library(root: Path | None = None) -> Library:
    """Read the standard library under `root` (default: the running interpreter's).

    Raises UserError when the folder holds no source.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    files = {file.module: file for file in _read_files(root)}
    if not files:
        raise UserError(f"{root} holds no Python source. Run Plinth with an interpreter whose standard library has its .py files.")
    exported = {module: _exported_names(file, files) for module, file in files.items()}
    doors = _doors(files, exported)
    library = Library(objects=[], defined_in=defaultdict(set))
    for file in files.values():
        library.objects.extend(_public_objects(file, exported[file.module], doors))
        library.identifiers |= file.words
        for name in _defined_names(file.tree):
            library.defined_in[name].add(file.module)
    for file in files.values():
        for module, name in file.attributes:
            if module in sys.stdlib_module_names and module not in files and not module.startswith("_"):
                library.defined_in[name].add(module)
    for target in {item.module for item in library.objects}:
        library.module_identifiers[target] = _words_of(target, files)
        if _is_opaque(target, files):
            library.opaque_modules.add(target)
    return library


def _read_files(root: Path) -> Iterator[_File]:
    for path in _library_paths(root):
        parts = path.relative_to(root).with_suffix("").parts
        if {"test", "tests", "__main__"} & set(parts):
            continue
        is_package = parts[-1] == "__init__"
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a file for another version of Python tells nothing about this one
        module = ".".join(parts[:-1] if is_package else parts)
        words = set(re.findall(r"[A-Za-z_]\w*", text))
        attributes = set(re.findall(r"\b([a-z_]\w*)\.([A-Za-z_]\w*)", text))
        yield _File(module, path.relative_to(root).as_posix(), tree, words, attributes, is_package)


def _library_paths(root: Path) -> Iterator[Path]:
    for entry in sorted(root.iterdir()):  # site-packages beside the library is never entered
        if entry.stem in sys.stdlib_module_names and entry.stem not in SKIPPED_PACKAGES:
            yield from sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] * (entry.suffix == ".py")


def _exported_names(file: _File, files: dict[str, _File]) -> set[str]:
    """Return a module's public names: its __all__ where that can be read, else all without an underscore."""
    declared = {text for node in _export_lists(file.tree) for text in _string_constants(node)}
    if file.is_package:
        for module, name, _ in _imported_names(file, files):
            if name == "*" and module in files and module != file.module:
                declared |= _exported_names(files[module], files)
    return declared or {name for name in _top_level_names(file.tree) if not name.startswith("_")}


def _export_lists(tree: ast.Module) -> Iterator[ast.expr]:
    """Give each expression that is assigned to __all__ or added to it."""
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                yield node.value
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("__all__."):
            yield from node.value.args


def _string_constants(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def _defined_names(tree: ast.Module) -> Iterator[str]:
    for node in _statements(tree.body):
        if isinstance(node, DEFINITIONS):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _top_level_names(tree: ast.Module) -> Iterator[str]:
    yield from _defined_names(tree)
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Give the statements of a body and of the if and try blocks within it."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from _statements([*node.body, *handlers, *node.orelse])


def _imported_names(file: _File, files: dict[str, _File]) -> Iterator[tuple[str, str, str]]:
    """Give (module, name, local name) of each `from module import name`, relative ones resolved."""
    for node in _statements(file.tree.body):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = file.module.split(".")
        package = parts if file.is_package else parts[:-1]
        if node.level:
            stem = package[: len(package) - node.level + 1]
            module = ".".join([*stem, *([node.module] if node.module else [])])
        else:
            module = node.module or ""
        for alias in node.names:
            yield module, alias.name, alias.asname or alias.name


def _doors(files: dict[str, _File], exported: dict[str, set[str]]) -> dict[tuple[str, str], str]:
    """Map (defining module, name) to the package that passes the name on to its users."""
    doors: dict[tuple[str, str], str] = {}
    for package, file in sorted(files.items()):
        if not file.is_package:
            continue
        for module, name, local in _imported_names(file, files):
            if module not in files or not module.startswith(package + "."):
                continue
            names = exported[module] if name == "*" else {name} if name == local else set()
            for item in names & exported[package]:
                doors.setdefault((module, item), package)
    return doors


def _public_objects(file: _File, exported: set[str], doors: dict[tuple[str, str], str]) -> Iterator[PythonObject]:
    if file.module.split(".")[0] in UNASKED_PACKAGES:
        return
    for node in _statements(file.tree.body):
        if not isinstance(node, DEFINITIONS) or node.name.startswith("_"):
            continue
        module = doors.get((file.module, node.name), PUBLIC_NAMES.get(file.module, file.module))
        if node.name not in exported or any(part.startswith("_") for part in module.split(".")):
            continue
        yield from _documented(file, node, module, "class" if isinstance(node, ast.ClassDef) else "function", node.name)
        if isinstance(node, ast.ClassDef):
            for member in _statements(node.body):
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)) and not member.name.startswith("_"):
                    yield from _documented(file, member, module, _member_type(member), f"{node.name}.{member.name}")


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [ast.unparse(decorator).split("(")[0].rpartition(".")[2] for decorator in node.decorator_list]


def _member_type(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return "property" if {"property", "cached_property", "abstractproperty", "setter", "deleter"} & set(_decorators(node)) else "method"


def _documented(file: _File, node: ast.AST, module: str, type_: str, name: str) -> Iterator[PythonObject]:
    doc = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
    if not doc or not doc.strip():
        return
    special_form = type_ == "function" and bool(node.args.args) and node.args.args[0].arg == "self"  # type: ignore[attr-defined]
    callable_ = type_ in ("function", "method") and not special_form  # typing writes its special forms as decorated functions
    yield PythonObject(
        module=module,
        name=name,
        type=type_,
        doc=inspect.cleandoc(doc),
        parameters=_parameters(node, type_) if callable_ else None,  # type: ignore[arg-type]
        returns=ast.unparse(node.returns) if callable_ and node.returns is not None else None,  # type: ignore[attr-defined]
        source=f"{file.relative}:{node.lineno}",  # type: ignore[attr-defined]
    )


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, type_: str) -> str:
    bound = type_ == "method" and "staticmethod" not in _decorators(node)
    text = ast.unparse(_without_annotations(node.args, drop_first=bound))
    return text.removeprefix("/, ") if bound else text


def _without_annotations(arguments: ast.arguments, drop_first: bool) -> ast.arguments:
    def bare(items: list[ast.arg]) -> list[ast.arg]:
        return [ast.arg(arg=item.arg) for item in items]

    positional, regular = bare(arguments.posonlyargs), bare(arguments.args)
    if drop_first:
        positional, regular = (positional[1:], regular) if positional else (positional, regular[1:])
    return ast.arguments(
        posonlyargs=positional,
        args=regular,
        vararg=ast.arg(arg=arguments.vararg.arg) if arguments.vararg else None,
        kwonlyargs=bare(arguments.kwonlyargs),
        kw_defaults=arguments.kw_defaults,
        kwarg=ast.arg(arg=arguments.kwarg.arg) if arguments.kwarg else None,
        defaults=arguments.defaults[-(len(positional) + len(regular)) :] if positional or regular else [],
    )


def _files_behind(target: str, files: dict[str, _File]) -> list[_File]:
    hidden = {behind for behind, public in PUBLIC_NAMES.items() if public == target}
    return [file for module, file in files.items() if module == target or module in hidden or module.startswith(target + ".")]


def _words_of(target: str, files: dict[str, _File]) -> set[str]:
    return set().union(*(file.words for file in _files_behind(target, files)))


def _is_opaque(target: str, files: dict[str, _File]) -> bool:
    for file in _files_behind(target, files):
        takes_all = any(name == "*" and module not in files for module, name, _ in _imported_names(file, files))
        lists = list(_export_lists(file.tree))
        if takes_all and not (lists and all(_is_literal(node) for node in lists)):
            return True
    return False


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True
