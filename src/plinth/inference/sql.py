"""Questions to a database: a grammar of queries that its tables allow, and a way to run one that can change and stall nothing."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plinth.config import UserError
from plinth.inference.grammar import Grammar

PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NUMERIC = ("INT", "REAL", "FLOA", "DOUB", "NUM", "DEC")  # parts of declared types
RESERVED = frozenset(
    "add all alter and as asc between by case check collate column commit create cross default delete desc distinct drop else end escape "
    "except exists foreign from full glob group having if in index inner insert intersect into is isnull join key left like limit match "
    "natural not notnull null of offset on or order outer primary references regexp right rollback select set table then to transaction "
    "union unique update using values view when where with".split()
)
CHECK_EVERY = 1000  # virtual machine steps between two looks at the clock
FUNCTIONS = ("count", "sum", "avg", "min", "max", "like")


@dataclass(frozen=True)
class Table:
    """One table of a database."""

    name: str
    """its name"""
    columns: tuple[tuple[str, bool], ...]
    """(name, whether it holds numbers) of each column"""
    links: tuple[tuple[str, str, str], ...] = ()
    """(column, other table, its column) of each foreign key"""


@dataclass(frozen=True)
class Answer:
    """What a query gave."""

    columns: list[str]
    """names of the result's columns"""
    rows: list[tuple[Any, ...]]
    """its rows"""
    truncated: bool
    """whether there were more rows"""


def read_tables(database: Path | str) -> list[Table]:
    """Return the tables of an SQLite file. Raises UserError when it is none, or has none."""
    with _open(database) as connection:
        try:
            names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name")]
            tables = [_table(connection, name) for name in names if not name.startswith("sqlite_")]
        except sqlite3.DatabaseError as error:
            raise UserError(f"{database} cannot be read as an SQLite database: {error}.") from None
    if not tables:
        raise UserError(f"{database} has no tables.")
    return tables


def _table(connection: sqlite3.Connection, name: str) -> Table:
    columns = [(row[1], any(part in row[2].upper() for part in NUMERIC)) for row in connection.execute(f"PRAGMA table_info({_text(name)})")]
    keys = connection.execute(f"PRAGMA foreign_key_list({_text(name)})")
    return Table(name, tuple(columns), tuple((row[3], row[2], row[4]) for row in keys if row[4]))


def describe(tables: list[Table]) -> str:
    """Return the tables for a prompt, one a line."""
    return "\n".join(f"{table.name}({', '.join(column for column, _ in table.columns)})" for table in tables)


def select_grammar(tables: list[Table]) -> Grammar:
    """Return the grammar of the SELECT queries that these tables allow.

    One table, or two along a foreign key; columns or count, sum, avg, min, max; WHERE with AND and OR, GROUP BY, ORDER BY, LIMIT.
    Every text of it runs without an error. Numbers are compared with numbers, texts with texts.
    """
    sources = [([(table, "")], f" FROM {_name(table.name)}") for table in tables]
    by_name = {table.name: table for table in tables}
    for table in tables:
        for column, other, key in table.links:
            if other in by_name and other != table.name:
                left, right = _name(table.name), _name(other)
                join = f" FROM {left} JOIN {right} ON {left}.{_name(column)} = {right}.{_name(key)}"
                sources.append(([(table, left + "."), (by_name[other], right + ".")], join))
    rules = ["start: " + " | ".join(f"query_{i}" for i in range(len(sources))), *COMMON]
    for i, (members, source) in enumerate(sources):
        rules += _query_rules(i, members, source)
    return Grammar.lark("\n".join(rules))


COMMON = (
    "INTEGER: /0|[1-9][0-9]{0,8}/",
    "NUMBER: /-?(0|[1-9][0-9]{0,8})(\\.[0-9]{1,4})?/",
    "TEXT: /'([^'\\x00-\\x1f\\x7f]|''){0,60}'/",
    'AGGREGATE: "SUM" | "AVG" | "MIN" | "MAX"',
    'COMPARISON: " = " | " <> " | " < " | " > " | " <= " | " >= "',
    'EQUALITY: " = " | " <> " | " LIKE "',
    'DIRECTION: " ASC" | " DESC"',
)


def _query_rules(i: int, members: list[tuple[Table, str]], source: str) -> list[str]:
    columns = [(prefix + _name(name), numeric) for table, prefix in members for name, numeric in table.columns]
    numeric = [_literal(column) for column, is_numeric in columns if is_numeric]
    texts = [_literal(column) for column, is_numeric in columns if not is_numeric]
    every = numeric + texts
    conditions, aggregates = [], ['"COUNT(*)"', f'"COUNT(DISTINCT " column_{i} ")"']
    rules = [f"column_{i}: " + " | ".join(every)]
    if numeric:
        rules.append(f"numeric_{i}: " + " | ".join(numeric))
        conditions.append(f"numeric_{i} COMPARISON NUMBER")
        aggregates.append(f'AGGREGATE "(" numeric_{i} ")"')
    if texts:
        rules.append(f"textual_{i}: " + " | ".join(texts))
        conditions.append(f"textual_{i} EQUALITY TEXT")
    conditions.append(f'column_{i} " IS " "NOT "? "NULL"')
    return [
        *rules,
        f"aggregate_{i}: " + " | ".join(aggregates),
        f"condition_{i}: " + " | ".join(conditions),
        f'where_{i}: " WHERE " condition_{i} ((" AND " | " OR ") condition_{i}){{0,3}}',
        f'items_{i}: "*" | column_{i} (", " column_{i}){{0,5}} | aggregate_{i} (", " aggregate_{i}){{0,2}}',
        f'grouped_{i}: column_{i} (", " aggregate_{i}){{1,3}}',
        f'order_{i}: " ORDER BY " (column_{i} | aggregate_{i}) DIRECTION?',
        f'plain_order_{i}: " ORDER BY " column_{i} DIRECTION?',
        f'limit_{i}: " LIMIT " INTEGER',
        f'query_{i}: "SELECT " ("DISTINCT ")? items_{i} {_literal(source)} where_{i}? plain_order_{i}? limit_{i}? '
        f'| "SELECT " grouped_{i} {_literal(source)} where_{i}? " GROUP BY " column_{i} order_{i}? limit_{i}?',
    ]


def run_query(database: Path | str, query: str, *, time_limit_s: float = 1.0, max_rows: int = 100) -> Answer:
    """Run one query that only reads; nothing in the database can change, no other file is touched.

    Raises UserError when it is malformed, asks for anything but reading, or takes longer than the limit.
    """
    deadline = time.monotonic() + time_limit_s
    with _open(database) as connection:
        connection.set_authorizer(_may_read)
        connection.set_progress_handler(lambda: time.monotonic() > deadline, CHECK_EVERY)
        try:
            cursor = connection.execute(query)
            rows = cursor.fetchmany(max_rows + 1)
        except sqlite3.OperationalError as error:
            reason = f"took longer than {time_limit_s} s" if str(error) == "interrupted" else f"failed: {error}"
            raise UserError(f"the query {reason}.") from None
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            raise UserError(f"the query was refused: {error}.") from None
        names = [column[0] for column in cursor.description or ()]
    return Answer(names, rows[:max_rows], len(rows) > max_rows)


def _may_read(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and second in FUNCTIONS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


class _open:
    """A connection that reads only and is closed behind."""

    def __init__(self, database: Path | str):
        path = Path(database)
        if not path.is_file():
            raise UserError(f"{path} does not exist.")
        self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)

    def __enter__(self) -> sqlite3.Connection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _name(name: str) -> str:
    """Return a name as SQL writes it."""
    if PLAIN_NAME.fullmatch(name) and name.lower() not in RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _literal(text: str) -> str:
    """Return a text as a literal of the grammar's language."""
    return json.dumps(text, ensure_ascii=False)
