"""Which prompt is next: every prompt once an epoch, in an order that depends on nothing but the seed
(and, where epochs meet, on which prompts are still being worked on)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from april.core.errors import CheckpointError, DataError
from april.core.prompt import Prompt
from april.core.random import permutation


class PromptSampler:
    """Shuffled epochs over a data set. The cursor moves past a prompt only when that prompt is handed out.

    Args:
        prompts: the data set, in a fixed order.
        seed: of the orders; each epoch has its own.
        together: field of the items; prompts with the same value are handed out one after another, in the order of the data
            set, those without it by themselves.

    Raises:
        DataError: for an empty data set.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int = 0, together: str | None = None) -> None:
        if not prompts:
            raise DataError("a data set is empty", where="task", got="no prompts", expected="at least one prompt")
        self._prompts, self._seed = list(prompts), seed
        self._blocks = None if together is None else _blocks(prompts, together)
        self._epoch, self._position = 0, 0
        self._deferred: list[tuple[int, int]] = []  # turns (epoch, index) of prompts that were open
        self._order = self._order_of(0)

    @property
    def epoch(self) -> float:
        """Passes over the data set so far."""
        return self._epoch + self._position / len(self._prompts)

    def next(self, count: int, is_open: Callable[[str], bool]) -> list[tuple[int, Prompt]]:
        """The next prompts of the order, up to `count`.

        A prompt whose turn comes while it is still being worked on, as happens at the end of an epoch, keeps its turn and
        is given before all others once it is free; while others are free, nothing waits for it.

        Args:
            count: how many are wanted.
            is_open: whether the prompt with this id is in the pool.

        Returns:
            (epoch, prompt) pairs; no prompt twice; fewer than `count` only when every other prompt is open.
        """
        out: list[tuple[int, Prompt]] = []
        taken: set[int] = set()

        def free(index: int) -> bool:
            return index not in taken and not is_open(self._prompts[index].id)

        while len(out) < count and (turn := self._turn(free)) is not None:
            epoch, index = turn
            taken.add(index)
            out.append((epoch, self._prompts[index]))
        return out

    def _turn(self, free: Callable[[int], bool]) -> tuple[int, int] | None:
        """The (epoch, index) of the next free prompt; the cursor moves only when there is one."""
        for at, (epoch, index) in enumerate(self._deferred):
            if free(index):
                del self._deferred[at]
                return epoch, index
        epoch, position, order = self._epoch, self._position, self._order
        passed: list[tuple[int, int]] = []
        for _ in range(2 * len(order)):  # the rest of this epoch and the whole next one hold every prompt
            if position == len(order):
                epoch, position, order = epoch + 1, 0, self._order_of(epoch + 1)
            index, position = int(order[position]), position + 1
            if free(index):
                self._deferred += passed
                self._epoch, self._position, self._order = epoch, position, order
                return epoch, index
            passed.append((epoch, index))
        return None

    def _order_of(self, epoch: int) -> list[int]:
        if self._blocks is None:
            return permutation(self._seed, epoch, len(self._prompts)).tolist()  # type: ignore[no-any-return]
        return [index for block in permutation(self._seed, epoch, len(self._blocks)) for index in self._blocks[block]]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, the turns that were put off, and the size of the data set that they belong to."""
        deferred = [list(turn) for turn in self._deferred]
        return {"epoch": self._epoch, "position": self._position, "deferred": deferred, "num_prompts": len(self._prompts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved cursor.

        Raises:
            CheckpointError: when the data set has another size than the one that the cursor belongs to.
        """
        epoch, position, size = int(state["epoch"]), int(state["position"]), int(state["num_prompts"])
        if size != len(self._prompts) or not 0 <= position <= size or epoch < 0:
            raise CheckpointError(
                "a prompt cursor belongs to another data set",
                where="prompt cursor",
                got=f"epoch {epoch}, position {position} of {size} prompts",
                expected=f"a cursor over {len(self._prompts)} prompts",
                hint="resume with the data set of the run, or start a new run from its weights",
            )
        self._epoch, self._position = epoch, position
        self._deferred = [(int(past), int(index)) for past, index in state["deferred"]]
        self._order = self._order_of(epoch)


def _blocks(prompts: Sequence[Prompt], together: str) -> list[list[int]]:
    """Indices of the prompts that have one value of a field, value by value."""
    found: dict[object, list[int]] = {}
    for index, prompt in enumerate(prompts):
        value = prompt.item.get(together)
        found.setdefault(("alone", index) if value is None else ("value", value), []).append(index)
    return list(found.values())
