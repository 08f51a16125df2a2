"""Text to SQL: every query of the grammar runs, and nothing but reading is possible."""

import random
import sqlite3

import numpy as np
import pytest

from plinth.config import UserError
from plinth.inference.grammar_constraint import GrammarCompiler
from plinth.inference.sql import describe, read_tables, run_query, select_grammar


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("sql") / "shop of 'Ann'.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            '''
            CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT, population INTEGER, "where" TEXT);
            CREATE TABLE "odd name" (id INTEGER, "a ""b""" TEXT, city_id INTEGER REFERENCES city(id), price REAL);
            INSERT INTO city VALUES (1, 'Köln', 1000000, 'west'), (2, 'Ulm', 120000, 'south'), (3, NULL, 5, 'x');
            INSERT INTO "odd name" VALUES (7, 'x', 1, 2.5), (8, 'y', 2, 3.5), (9, 'z', 1, 4.0);
            '''
        )
    connection.close()
    return path


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, (tokenizer.end_id,))


def test_tables_and_links_are_read(database):
    city, odd = read_tables(database)
    assert describe([city]) == "city(id, name, population, where)"
    assert dict(city.columns) == {"id": True, "name": False, "population": True, "where": False}
    assert odd.links == (("city_id", "city", "id"),)


def test_every_query_that_is_drawn_runs(database, compiler):
    grammar, kinds = select_grammar(read_tables(database)), set()
    for seed in range(40):
        draw, constraint, tokens = random.Random(seed), compiler.start(grammar), []
        while len(tokens) < 400 and not constraint.finished():
            ids = np.unpackbits(constraint.allowed(), bitorder="little").nonzero()[0].tolist()
            token = (constraint.forced() or [draw.choice(ids)])[0]
            if token in compiler.end_ids:
                break
            constraint.advance(token)
            tokens.append(token)
        query = compiler.tokenizer.decode(tokens)
        assert constraint.error is None
        run_query(database, query)
        kinds |= {word for word in ("JOIN", "WHERE", "GROUP BY", "ORDER BY", "LIMIT", "COUNT") if word in query}
    assert len(kinds) == 6


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name FROM city WHERE population > 200000",
        "SELECT COUNT(*) FROM city",
        "SELECT name, COUNT(*) FROM city GROUP BY name ORDER BY COUNT(*) DESC LIMIT 3",
        'SELECT city.name, "odd name".price FROM "odd name" JOIN city ON "odd name".city_id = city.id ORDER BY city.population',
        "SELECT AVG(population), MAX(population) FROM city WHERE \"where\" = 'we''st' AND name IS NOT NULL",
    ],
)
def test_common_questions_have_their_query(database, compiler, query):
    assert compiler.accepts(select_grammar(read_tables(database)), query)
    run_query(database, query)


@pytest.mark.parametrize(
    "query", ["SELECT nothing FROM city", "SELECT price FROM city", "DROP TABLE city", "SELECT name FROM city WHERE id = 'a'"]
)
def test_what_the_tables_do_not_have_is_not_allowed(database, compiler, query):
    assert not compiler.accepts(select_grammar(read_tables(database)), query)


def test_answers_are_those_of_the_database(database):
    answer = run_query(database, "SELECT name, population FROM city WHERE name IS NOT NULL ORDER BY population")
    assert (answer.columns, answer.rows, answer.truncated) == (["name", "population"], [("Ulm", 120000), ("Köln", 1000000)], False)
    assert run_query(database, "SELECT id FROM city", max_rows=2).truncated


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("SELEC", "failed: .*syntax"),
        ("DROP TABLE city", "refused: not authorized"),
        ("INSERT INTO city VALUES (9, 'a', 1, 'b')", "not authorized"),
        ("ATTACH DATABASE '/tmp/other.db' AS other", "not authorized"),
        ("PRAGMA table_info(city)", "not authorized"),
        ("SELECT load_extension('x')", "not authorized"),
        ("SELECT 1; SELECT 2", "refused: .*one statement"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n", "not authorized|longer than"),
        (
            "SELECT COUNT(*) FROM " + ", ".join(f"city c{i}" for i in range(40)),
            "longer",
        ),
    ],
)
def test_only_reading_for_a_bounded_time(database, query, error):
    with pytest.raises(UserError, match=error):
        run_query(database, query, time_limit_s=0.05)


def test_what_is_no_database_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_tables(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("not a database, " * 100)
    with pytest.raises(UserError, match="cannot be read"):
        read_tables(tmp_path / "text.db")
    sqlite3.connect(tmp_path / "empty.db").execute("VACUUM").connection.close()
    with pytest.raises(UserError, match="has no tables"):
        read_tables(tmp_path / "empty.db")
