"""SQL, judged by running it beside the right query on a small database (for ReEx-SQL)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.rewards.base import Verifier
from april.rewards.sql_run import Database, Result

FINAL = r"(?s)<final_sql>(.*?)</final_sql>"
INTERMEDIATE = r"(?s)<intermediate_sql>(.*?)</intermediate_sql>"
QUOTED = r"""('(?:[^']|'')*'|"[^"]*")"""
MAX_INTERMEDIATE = 10


class SqlReward(Config):
    """Runs the response's SQL query in SQLite: 1 when it finds what the item's query finds, else 0."""

    type: Literal["sql"] = "sql"
    answer_pattern: str = Field(FINAL, description="Regular expression that finds the query (last match).")
    intermediate_pattern: str = Field(INTERMEDIATE, description="Regular expression that finds the queries asked on the way.")
    max_steps: int = Field(5_000_000, ge=1, description="Of SQLite's virtual machine, for each query.")
    max_rows: int = Field(10_000, ge=1, description="Of a result; a query that finds more has failed.")

    @field_validator("answer_pattern", "intermediate_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str) -> str:
        return checked_pattern(value) or value

    def build(self) -> Verifier:
        """The verifier."""
        return Sql(self.answer_pattern, self.intermediate_pattern, self.max_steps, self.max_rows)


@dataclass(frozen=True, slots=True)
class Sql:
    """Judges a query. The item holds "schema", a script that makes and fills the tables, and in "answer" the right query.

    Parts: format (one answer, at the end), execution (the same result), exact (the same text), entity (F1 of the tables and
    columns that are read) and exploration (share of the intermediate queries that found something new).

    Source: ReEx-SQL (arXiv 2505.12768); the definitions of the parts are reconstructed.
    """

    answer_pattern: str = FINAL
    intermediate_pattern: str = INTERMEDIATE
    max_steps: int = 5_000_000
    max_rows: int = 10_000

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        query, gold = last_match(text, self.answer_pattern), str(item["answer"])
        queries = [query or "" for query in _all_matches(text, self.intermediate_pattern)]
        with Database(str(item["schema"]), self.max_steps, self.max_rows) as database:
            expected = database.run(gold)
            if expected.rows is None:
                raise ValueError(f"the item's query does not run: {expected.error}")
            found = database.run(query) if query is not None else Result(None)
            explored = exploration(queries, database)
        right = float(same_result(found, expected, ordered=is_ordered(gold)))
        parts = {
            "answered": float(query is not None),
            "format": float(ends_with_one(text, self.answer_pattern)),
            "execution": right,
            "exact": float(query is not None and normal(query) == normal(gold)),
            "entity": 0.0 if found.rows is None else f1(found.entities, expected.entities),
            "exploration": explored,
        }
        return Reward(right, right == 1, parts)


def same_result(found: Result, expected: Result, *, ordered: bool = False) -> bool:
    """Whether two results have as many columns and the same rows, in any order unless `ordered`; a failed query has none."""
    if found.rows is None or expected.rows is None or found.num_columns != expected.num_columns:
        return False
    return found.rows == expected.rows if ordered else Counter(found.rows) == Counter(expected.rows)


def exploration(queries: Sequence[str], database: Database) -> float:
    """Share of the queries, at most 10 of which count, that read a table, find rows and were not asked before; 0 without any."""
    asked, useful = set(), 0
    for query in queries[:MAX_INTERMEDIATE]:
        result = database.run(query)
        useful += bool(result.rows and result.entities and normal(query) not in asked)
        asked.add(normal(query))
    return useful / len(queries) if queries else 0.0


def f1(found: frozenset[str], expected: frozenset[str]) -> float:
    """Harmonic mean of precision and recall; 1 for two empty sets."""
    if not found and not expected:
        return 1.0
    return 2 * len(found & expected) / (len(found) + len(expected))


def normal(query: str) -> str:
    """A query without what does not matter: case outside of quotes, runs of white space, a semicolon at its end."""
    pieces = re.split(QUOTED, query.strip().rstrip("; \n\t"))
    return "".join(piece if index % 2 else re.sub(r"\s+", " ", piece.lower()) for index, piece in enumerate(pieces))


def ends_with_one(text: str, pattern: str) -> bool:
    """Whether there is one match, and nothing after it."""
    matches = list(re.finditer(pattern, text))
    return len(matches) == 1 and not text[matches[0].end() :].strip()


def is_ordered(query: str) -> bool:
    """Whether a query says in which order its rows come: ORDER BY outside of parentheses and quotes."""
    bare, nested = re.sub(QUOTED, "", query), 1
    while nested:
        bare, nested = re.subn(r"\([^()]*\)", "", bare)
    return re.search(r"(?i)\border\s+by\b", bare) is not None


def _all_matches(text: str, pattern: str) -> list[str | None]:
    return [match.group(1 if match.re.groups else 0) for match in re.finditer(pattern, text)]
