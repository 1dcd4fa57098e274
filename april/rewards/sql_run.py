"""A small SQLite database in memory that queries can only read, within bounds."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

STEPS_A_CALL = 100
"""Steps of SQLite's virtual machine between two looks at the bound; one step may work on whole values."""
MAX_VALUE_BYTES = 65_536
"""Of one text or blob, and of a query."""
MAX_COLUMNS = 100
MAX_RESULT_BYTES = 1 << 24
"""Of all texts and blobs of a result."""
READS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})


@dataclass(frozen=True, slots=True)
class Result:
    """What a query found.

    Attributes:
        rows: None when it failed.
        num_columns: of the rows.
        entities: the tables and columns that it reads, "table" and "table.column" in lower case; none when it failed.
        error: why it failed.
    """

    rows: list[tuple[Any, ...]] | None
    num_columns: int = 0
    entities: frozenset[str] = frozenset()
    error: str = ""


class Database:
    """Tables in memory.

    Args:
        schema: a script that makes and fills them; trusted.
        max_steps: of the virtual machine for each query. A count, not a time: the same on every machine.
        max_rows: of a result.

    Raises:
        ValueError: the script does not run.
    """

    def __init__(self, schema: str, max_steps: int, max_rows: int) -> None:
        self._max_steps, self._max_rows = max_steps, max_rows
        self._steps = 0
        self._raised: BaseException | None = None
        self._read: set[str] = set()
        self._connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
        try:
            self._connection.executescript(schema)
        except sqlite3.Error as error:
            self._connection.close()
            raise ValueError(f"the item's schema does not run: {error}") from error
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_VALUE_BYTES)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
        self._connection.set_authorizer(self._authorise)
        self._connection.set_progress_handler(self._count, STEPS_A_CALL)

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def run(self, query: str) -> Result:
        """The result of one statement; anything but reading fails, and so does passing a bound."""
        self._steps = 0
        self._read.clear()
        try:
            cursor = self._connection.execute(query)
            rows: list[tuple[Any, ...]] = []
            num_bytes = 0
            for row in cursor:
                num_bytes += sum(len(value) for value in row if isinstance(value, str | bytes))
                if num_bytes > MAX_RESULT_BYTES:
                    return Result(None, error=f"more than {MAX_RESULT_BYTES} bytes")
                if len(rows) == self._max_rows:
                    return Result(None, error=f"more than {self._max_rows} rows")
                rows.append(row)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            if self._raised is not None:
                raise self._raised from None
            return Result(None, error=str(error))
        if cursor.description is None:
            return Result(None, error="no query")
        return Result(rows, len(cursor.description), frozenset(self._read))

    def _authorise(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """Called while a statement is compiled, with what it wants to do; for a read with a table and a column."""
        if action not in READS:
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_READ and first is not None:
            self._read.update({first.lower(), f"{first}.{second}".lower()} if second else {first.lower()})
        return sqlite3.SQLITE_OK

    def _count(self) -> bool:
        try:
            self._steps += STEPS_A_CALL
            return self._steps > self._max_steps
        except BaseException as error:  # a deadline's signal comes here, and SQLite would make an error of the query out of it
            self._raised = error
            return True
