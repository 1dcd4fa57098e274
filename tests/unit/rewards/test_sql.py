"""SQL that is run beside the right query."""

from __future__ import annotations

import pytest
from reward_cases import sample_of

from april.core.group import Failure, Reward
from april.rewards.build import build_reward
from april.rewards.judge import judge
from april.rewards.sql import ends_with_one, is_ordered, normal
from april.rewards.sql_run import Database

SCHEMA = """
CREATE TABLE city (name TEXT, people INTEGER, country INTEGER);
CREATE TABLE country (id INTEGER, name TEXT);
INSERT INTO country VALUES (1, 'A'), (2, 'B');
INSERT INTO city VALUES ('x', 10, 1), ('y', 20, 1), ('z', 30, 2);
"""
GOLD = "SELECT name FROM city WHERE people > 15"


def score(query: str, gold: str = GOLD, before: str = "", **options: object):
    text = f"{before}<final_sql>{query}</final_sql>"
    return judge(build_reward({"type": "sql", **options}), text, sample_of({"schema": SCHEMA, "answer": gold}), 20.0)


def test_the_same_query_in_another_spelling() -> None:
    outcome = score("select  name from CITY\nwhere people > 15;")
    named = {"answered": 1.0, "format": 1.0, "execution": 1.0, "exact": 1.0, "entity": 1.0, "exploration": 0.0}
    assert outcome == Reward(1.0, True, named)


@pytest.mark.parametrize(
    ("query", "execution", "entity"),
    [
        ("SELECT c.name FROM city AS c WHERE c.people >= 20", 1, 1.0),
        ("SELECT name FROM city WHERE people > 15 ORDER BY name DESC", 1, 1.0),
        ("SELECT name FROM city", 0, 2 * 2 / (2 + 3)),  # city and city.name of city, city.name and city.people
        ("SELECT name, people FROM city WHERE people > 15", 0, 1.0),
        ("SELECT name FROM country", 0, 0.0),
        ("SELECT nam FROM city WHERE people > 15", 0, 0.0),
        ("SELECT name FROM city WHERE people > 15; SELECT 1", 0, 0.0),
        ("", 0, 0.0),
    ],
)
def test_results_and_entities(query: str, execution: float, entity: float) -> None:
    outcome = score(query)
    assert (outcome.parts["execution"], outcome.parts["exact"]) == (execution, 0.0)
    assert outcome.parts["entity"] == pytest.approx(entity) and outcome.correct == bool(execution)


def test_rows_are_counted_and_ordered_where_the_right_query_orders_them() -> None:
    ordered = f"{GOLD} ORDER BY people DESC"
    assert not score(GOLD, ordered).correct and score(f"{GOLD} ORDER BY name DESC", ordered).correct
    assert not score("SELECT DISTINCT country FROM city", "SELECT country FROM city").correct
    assert score("SELECT people * 1.0 FROM city", "SELECT people FROM city").correct, "10.0 is 10"


def test_empty_results_agree_with_as_many_columns_only() -> None:
    nothing = "SELECT name FROM city WHERE people > 99"
    assert score("SELECT name FROM city WHERE people < 0", nothing).correct
    assert not score("SELECT * FROM city WHERE people < 0", nothing).correct


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM city",
        "DROP TABLE city",
        "INSERT INTO city VALUES ('w', 1, 1)",
        "PRAGMA writable_schema = 1",
        "ATTACH ':memory:' AS other",
        "VACUUM",
        "CREATE TEMP TABLE t AS SELECT * FROM city",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 20000) SELECT i FROM n",
        "SELECT zeroblob(1000000000)",
        "SELECT name FROM city WHERE name = '\ud800'",
    ],
)
def test_what_is_refused_fails_and_changes_nothing(query: str) -> None:
    with Database(SCHEMA, 200_000, 10_000) as database:
        refused = database.run(query)
        assert refused.rows is None and refused.error and refused.entities == frozenset()
        assert database.run("SELECT sum(people), count(*) FROM city").rows == [(60, 3)]


def test_exploration_counts_new_queries_that_find_something_in_a_table() -> None:
    def explored(*queries: str) -> float:
        return score(GOLD, before="".join(f"<intermediate_sql>{query}</intermediate_sql>" for query in queries)).parts[
            "exploration"
        ]

    assert explored() == 0.0 and explored("SELECT name FROM city") == 1.0
    assert explored("SELECT name FROM city", "select name  from city", "SELECT 1", "SELECT nam FROM city") == 0.25
    assert explored("SELECT name FROM city WHERE people > 99", "SELECT count(*) FROM city") == 0.5
    assert explored(*(f"SELECT name FROM city LIMIT {n}" for n in range(1, 21))) == 0.5, "ten are run"


def test_format_and_no_answer() -> None:
    assert score(GOLD, before="<final_sql>SELECT 1</final_sql>").parts["format"] == 0.0
    assert ends_with_one("a <b>c</b> \n", "<b>c</b>") and not ends_with_one("<b>c</b>.", "<b>c</b>")
    silent = judge(build_reward("sql"), "no idea", sample_of({"schema": SCHEMA, "answer": GOLD}), 5.0)
    assert silent.value == 0.0 and set(silent.parts.values()) == {0.0}


def test_items_that_do_not_run_cost_the_sample() -> None:
    assert "query does not run" in score(GOLD, "SELECT nam FROM city").reason
    broken = judge(build_reward("sql"), "", sample_of({"schema": "CREATE", "answer": GOLD}), 5.0)
    assert isinstance(broken, Failure) and "schema does not run" in broken.reason


def test_texts_of_queries() -> None:
    assert normal("SELECT  'A  b' FROM T ;") == "select 'A  b' from t"
    assert is_ordered("SELECT a FROM t ORDER BY count(b)") and is_ordered("select a from t order\nby a limit 1")
    assert not is_ordered("SELECT a, row_number() OVER (ORDER BY (b)) FROM t WHERE c = 'order by'")


def test_a_result_has_bounds_in_bytes() -> None:
    many = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 2000) SELECT {} FROM c"
    with Database(SCHEMA, 5_000_000, 10_000) as database:
        assert "bytes" in database.run(many.format("zeroblob(60000)")).error
        assert database.run(many.format("zeroblob(6)")).rows is not None, "as many small ones are fine"
        assert "too big" in database.run("SELECT zeroblob(1000000)").error
        assert "too many columns" in database.run("SELECT " + ", ".join("1" * 101)).error


def test_a_deadline_s_signal_is_not_taken_for_an_error_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Exception):
        pass

    class Steps(int):
        def __add__(self, other: int) -> int:
            raise Late

    monkeypatch.setattr(Database, "_steps", property(lambda _self: Steps(0), lambda _self, _value: None), raising=False)
    counting = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 2000) SELECT count(*) FROM c"
    with Database(SCHEMA, 5_000_000, 10_000) as database, pytest.raises(Late):
        database.run(counting)
