"""Configuration: frozen dataclasses to and from dictionaries, JSON and TOML, and the error that users see."""

from __future__ import annotations

import dataclasses
import difflib
import gzip
import json
import math
import os
import tempfile
import tomllib
import types
import typing
import zlib
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that the user can mend; its text names the field, the value, the rule and the way out.

    The command line prints it as one line, without a traceback, and exits with `exit_code`.
    """

    exit_code = 1


def nearest(name: str, candidates: typing.Iterable[str]) -> str:
    """Return `` Did you mean X?`` for the candidate that looks most like `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]}?" if matches else ""


def check_least(config: Any, *names: str, least: float = 1) -> None:
    """Raise UserError for a field that is not None and no finite number, or below `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{name}={value} must be {f'at least {least:g}' if least else '0 or more'}.")


def check_positive(config: Any, *names: str) -> None:
    """Raise UserError for a field that is not None and no finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value} must be positive.")


def read_bytes(path: Path) -> bytes:
    """Return a file's content, decompressed where it is gzip. Raises UserError when it is absent or damaged."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}.") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass, nested ones too, into plain JSON values; paths become strings."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from plain values; `where` prefixes the field's name in errors.

    Raises UserError on an unknown field (with the nearest name), a missing one, or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise UserError(f"{where}{name} is not a field of {cls.__name__}.{nearest(name, fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _coerce(hints[name], values[name], f"{where}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}{name} is missing; {cls.__name__} needs it.")
    return cls(**arguments)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(hint, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}={value!r} is not a table of fields of {getattr(hint, '__name__', hint)}.")
        return from_dict(hint, value, where + ".")  # type: ignore[arg-type]
    if origin in (list, tuple):
        return _coerce_sequence(hint, origin, value, where)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}={value!r} is not a table.")
        item = typing.get_args(hint)[1] if typing.get_args(hint) else Any
        return {key: _coerce(item, entry, f"{where}.{key}") for key, entry in value.items()}
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise UserError(f"{where}={value!r} is not one of {', '.join(map(str, typing.get_args(hint)))}.")
        return value
    return _coerce_scalar(hint, value, where)


def _coerce_union(hint: Any, value: Any, where: str) -> Any:
    members = typing.get_args(hint)
    if value is None and type(None) in members:
        return None
    failure = None
    for member in members:
        if member is type(None):
            continue
        try:
            return _coerce(member, value, where)
        except UserError as error:
            failure = failure or error
    raise failure or UserError(f"{where}={value!r} does not fit {hint}.")


def _coerce_sequence(hint: Any, origin: Any, value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}={value!r} is not a list.")
    members = typing.get_args(hint)
    if origin is tuple and members and members[-1] is not Ellipsis:
        if len(members) != len(value):
            raise UserError(f"{where}={value!r} must have {len(members)} entries.")
        return tuple(_coerce(member, item, f"{where}[{i}]") for i, (member, item) in enumerate(zip(members, value)))
    member = members[0] if members else Any
    return origin(_coerce(member, item, f"{where}[{i}]") for i, item in enumerate(value))


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise UserError(f"{where}={value!r} is not of type {hint.__name__}.")
    return value


def load_config(cls: type[T], path: Path) -> T:
    """Read the dataclass `cls` from a .toml or .json file. Raises UserError that names the file and the field."""
    path = Path(path)
    if path.suffix == ".toml":
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist.") from None
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path} is not valid TOML: {error}.") from None
    else:
        values = read_json(path)
    return from_dict(cls, values, where=f"{path}: ")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError that names the file when it is absent or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None


def save_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    write_atomic(path, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file aside, flush it to the disk, and rename it into place."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
