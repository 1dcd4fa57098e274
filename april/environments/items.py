"""Problems given as Python objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from april.config.schema import Config
from april.core.errors import DataError
from april.environments.base import Item


class ItemsTask(Config):
    """Problems given as a list, from a notebook or inside a recipe."""

    type: Literal["items"] = "items"
    items: list[dict[str, Any]] = Field(description="Dicts with `question` and `answer`; `id`, `metadata` and more are optional.")

    def load(self) -> list[Item]:
        """The items, completed with `id` and `metadata`.

        Raises:
            DataError: for no items, or one without a question or answer.
        """
        if not self.items:
            raise DataError(
                "a data set is empty", where="task.items", got="no items", expected="at least one item", hint="give some items"
            )
        for index, item in enumerate(self.items):
            for name in ("question", "answer"):
                if name not in item:
                    got = "fields " + (", ".join(item) or "none")
                    raise DataError(
                        f"an item has no {name!r}", where=f"task.items[{index}]", got=got, expected="question and answer"
                    )
        return [{"metadata": {}, **item, "id": str(item.get("id", f"item-{index}"))} for index, item in enumerate(self.items)]

    def gold(self, item: Mapping[str, Any]) -> str | None:
        """The item's `solution`, or else its answer."""
        return str(item.get("solution", item["answer"]))

    def default_reward(self) -> dict[str, Any]:
        """The answer, character by character."""
        return {"type": "exact"}
