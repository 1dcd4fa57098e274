"""What a task offers, and how its problems are held out for evaluation.

An item is a plain dict: `id` (stable and unique), `question`, `answer`, `metadata`, and whatever else the source has;
templates and rewards read it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from april.core.errors import DataError
from april.core.random import permutation, stream_key

Item = dict[str, Any]


class Task(Protocol):
    """A source of single-turn problems. Every task config is one."""

    def load(self) -> list[Item]:
        """All items, the same at every call."""
        ...

    def gold(self, item: Mapping[str, Any]) -> str | None:
        """A completion that must earn the full reward, for the dry run; None where none is known."""
        ...

    def default_reward(self) -> dict[str, Any]:
        """The reward (`type` and options) that judges this task when the recipe names none."""
        ...


def question_of(item: Mapping[str, Any]) -> str:
    """What makes two items the same problem."""
    return str(item["question"]).strip()


def without(items: Iterable[Item], held_out: Iterable[Item], key: Callable[[Item], str] = question_of) -> list[Item]:
    """The items whose question does not occur in `held_out`, and whose `key` does not either.

    Args:
        items: candidates for training.
        held_out: what training must never see.
        key: a second identity, such as the text of the prompt: two questions may become one prompt.
    """
    held_out = list(held_out)
    questions, keys = {question_of(item) for item in held_out}, {key(item) for item in held_out}
    return [item for item in items if question_of(item) not in questions and key(item) not in keys]


def distinct(items: Sequence[Item], num: int, seed: int, key: Callable[[Item], str] = question_of) -> list[Item]:
    """Up to `num` items with different questions and keys, chosen by the seed; the same choice for the same items."""
    chosen: list[Item] = []
    questions: set[str] = set()
    keys: set[str] = set()
    for index in permutation(stream_key(seed, "held out"), 0, len(items)):
        item = items[index]
        if len(chosen) == num:
            break
        if question_of(item) not in questions and key(item) not in keys:
            questions.add(question_of(item))
            keys.add(key(item))
            chosen.append(item)
    return chosen


def split(
    items: Sequence[Item], num_held_out: int, seed: int, key: Callable[[Item], str] = question_of
) -> tuple[list[Item], list[Item]]:
    """Hold out problems for evaluation.

    Args:
        items: all items of a task.
        num_held_out: problems wanted, all with different questions (and keys).
        seed: chooses which.
        key: see `without`.

    Returns:
        (training, held out); no question or key of the second occurs in the first.

    Raises:
        DataError: when there are too few different problems to hold out and still train.
    """
    held_out = distinct(items, num_held_out, seed, key)
    training = without(items, held_out, key)
    if len(held_out) < num_held_out or not training:
        raise DataError(
            "a data set is too small to hold problems out",
            where="evaluation.num_problems",
            got=f"{len(items)} items, {len({question_of(item) for item in items})} different questions",
            expected=f"more than {num_held_out} different questions",
            hint="make the data set larger, hold fewer problems out, or evaluate on a task of its own (evaluation_task)",
        )
    return training, held_out
