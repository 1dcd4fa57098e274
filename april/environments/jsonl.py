"""Problems from a file with one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.errors import DataError, nearest
from april.core.pattern import checked_pattern, last_match
from april.environments.base import Item


class JsonlTask(Config):
    """Problems from a local JSON-lines file; further fields of a line stay in the item."""

    type: Literal["jsonl"] = "jsonl"
    path: str = Field(description="The file, relative to the working directory.")
    question_field: str = Field("question", description="Field that holds the question.")
    answer_field: str = Field("answer", description="Field that holds the answer, or the worked solution that ends in it.")
    answer_pattern: str | None = Field(
        None, description='Regular expression that finds the answer in its field (last match), such as "#### (.+)" for GSM8K.'
    )
    limit: int | None = Field(None, ge=1, description="Only this many items from the start.")

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str | None) -> str | None:
        return checked_pattern(value)

    def load(self) -> list[Item]:
        """Read the file.

        Raises:
            DataError: for a missing or empty file, a line that is not a JSON object, a missing field, or an answer
                that the pattern does not find; all with the line number.
        """
        path = Path(self.path)
        if not path.is_file():
            near = [entry.name for entry in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
            hint = nearest(path.name, near) if near else "check the path; it is relative to the working directory"
            raise DataError(
                "a data file does not exist", where="task.path", got=str(path), expected="a JSON-lines file", hint=hint
            )
        items: list[Item] = []
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    items.append(self._item(line, number, path))
                if self.limit is not None and len(items) == self.limit:
                    break
        if not items:
            hint = "write items into the file, or set task.path to another one"
            raise DataError("a data set is empty", where=str(path), got="no lines", expected="one JSON object a line", hint=hint)
        return items

    def _item(self, line: str, number: int, path: Path) -> Item:
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                "a line is not JSON",
                where=where,
                got=f"{line.strip()[:80]!r} ({error})",
                expected="one JSON object a line",
                hint="correct that line, or convert the file to JSON lines",
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                "a line is not a JSON object",
                where=where,
                got=f"{line.strip()[:80]!r}",
                expected='such as {"question": "...", "answer": "..."}',
                hint="correct that line, or convert the file to JSON lines",
            )
        for option, name in (("question_field", self.question_field), ("answer_field", self.answer_field)):
            if name not in row or row[name] is None:
                hint = f"set task.{option}; {nearest(name, row)}"
                raise DataError(f"a line has no {name!r}", where=where, got="fields " + ", ".join(row), expected=name, hint=hint)
        solution = str(row[self.answer_field])
        further = {key: value for key, value in row.items() if key not in (self.question_field, self.answer_field)}
        metadata = row.get("metadata") or further
        return {
            **further,
            "id": str(row.get("id", f"{path.stem}-{number}")),
            "question": str(row[self.question_field]),
            "answer": self._answer(solution, where),
            "solution": str(row.get("solution", solution)),
            "metadata": metadata,
        }

    def _answer(self, solution: str, where: str) -> str:
        answer = last_match(solution, self.answer_pattern)
        if answer is None:
            raise DataError(
                "an answer does not match the pattern", where=where, got=f"{solution[-80:]!r}", expected=self.answer_pattern
            )
        return answer

    def gold(self, item: Mapping[str, Any]) -> str | None:
        """The worked solution as the file has it."""
        return str(item["solution"])

    def default_reward(self) -> dict[str, Any]:
        """Mathematical equality; the same pattern finds the answer in a response."""
        return {"type": "math", "answer_pattern": self.answer_pattern} if self.answer_pattern else {"type": "math"}
