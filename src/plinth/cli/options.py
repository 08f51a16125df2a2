"""How every verb reads its command line: by tyro, which tells one default of each option.

A docstring may name a default in words, as in "(default: the model's context)": what None, or an empty tuple, stands for. tyro would add
"(default: None)" behind it; here the words stand alone. They speak of the default that the dataclass declares: where a verb sets another,
as a stage does for `train.steps`, its value takes their place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import MISSING_NONPROP, ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

T = TypeVar("T")

WORDS = re.compile(r"\s*\(default:\s(?:[^()]|\([^()]*\))*\)")
"""a default in words, which may hold parentheses of their own"""


def read_options(
    options: type[T],
    *,
    prog: str,
    args: Sequence[str],
    description: str | None = None,
    default: T | None = None,
    config: tuple[Any, ...] = (),
) -> T:
    """Return a verb's arguments as the dataclass `options`; help ends the process with 0, wrong usage with 2.

    `default` is an instance to take defaults from, in which tyro.MISSING stands for what is required; `config` has tyro.conf's markers.
    """
    instance: Any = MISSING_NONPROP if default is None else default
    return tyro.cli(options, prog=prog, args=args, description=description, default=instance, config=config, registry=one_default_each())


def one_default_each() -> ConstructorRegistry:
    """Return the rules by which tyro reads dataclasses: its own, with each field told by `told_once`."""
    registry, within = ConstructorRegistry(), False

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal within
        if within or not is_dataclass(info.type):
            return None
        within = True  # so that the rules are asked again without this one
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            within = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        declared = {field.name: field for field in fields(info.type)}
        return replace(spec, fields=tuple(told_once(option, declared[option.name]) for option in spec.fields))

    return registry


def told_once(option: StructFieldSpec, declared: Field[Any]) -> StructFieldSpec:
    """Return an option whose help names one default; docstrings are read when help is asked for, not before."""

    def text() -> str:
        return (option.helptext() if callable(option.helptext) else option.helptext) or ""

    def in_words() -> bool:
        value = declared.default if declared.default_factory is MISSING else declared.default_factory()
        return bool(WORDS.search(text())) and option.default == value

    def help_text() -> str:
        return text() if in_words() else WORDS.sub("", text())

    def hint(value: str) -> str:
        return "" if in_words() else f"(default: {value or 'none'})"

    told: Any = Annotated[option.type, tyro.conf.arg(help_behavior_hint=hint)]
    return replace(option, type=told, helptext=help_text)
