"""Who runs next: the waiting queue, admission within the budgets, and the choice of whom to preempt. No torch, no clock.

Decisions depend on the order of calls only. Requests wait in the order of submission; a preempted one goes back to its
place, which is in front of everything submitted later.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from april.core.errors import EngineError
from april.core.ids import SampleId
from april.core.routes import Routes
from april.core.sample import Sample

_SMALLEST_CLASS_TOKENS = 64


@dataclass(eq=False)
class Request:
    """One submitted sample on its way through the engine.

    Attributes:
        serial: order of submission in the engine's life; the youngest has the largest.
        sample: as submitted.
        context: int32 prompt and response tokens that are known to the caller or already reported.
        limit_tokens: response length at which it ends with "length".
        must_finish: whether a drain waits for it.
        prompt_routes: of its prompt's tokens but the last, to report with its first segment.
    """

    serial: int
    sample: Sample
    context: npt.NDArray[np.int32]
    limit_tokens: int
    must_finish: bool = False
    prompt_routes: Routes | None = None

    @property
    def id(self) -> SampleId:
        return self.sample.id

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.sample.prompt.token_ids)


def capacity_classes(max_tokens: int) -> tuple[int, ...]:
    """Row sizes, ascending: 64, 96, 128, 192, ... up to `max_tokens`; at most half of a row is unused."""
    sizes, size = [], _SMALLEST_CLASS_TOKENS
    while size < max_tokens:
        sizes.append(size)
        if size + size // 2 < max_tokens:
            sizes.append(size + size // 2)
        size *= 2
    return (*sizes, max_tokens)


def class_for(num_tokens: int, classes: Sequence[int]) -> int:
    """The smallest class that holds `num_tokens`.

    Raises:
        EngineError: when none does.
    """
    index = bisect.bisect_left(classes, num_tokens)
    if index == len(classes):
        raise EngineError("a sample is longer than any row", got=num_tokens, expected=f"<= {classes[-1]} tokens")
    return classes[index]


@dataclass(frozen=True)
class Room:
    """What an admission may use: rows, KV tokens that can be reserved, and tokens to prefill."""

    rows: int
    kv_tokens: int
    prefill_tokens: int


class WaitingQueue:
    """Requests that are not running, oldest submission first."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Insert by age."""
        bisect.insort(self._requests, request, key=lambda waiting: waiting.serial)

    def remove(self, ids: set[SampleId]) -> list[Request]:
        """Take these requests out; returns them in order."""
        gone = [request for request in self._requests if request.id in ids]
        if gone:
            self._requests = [request for request in self._requests if request.id not in ids]
        return gone

    def admit(
        self,
        room: Room,
        classes: Sequence[int],
        prefill_cost: Callable[[Request], int],
        *,
        only: Callable[[Request], bool] | None = None,
    ) -> list[Request]:
        """Take out the oldest requests that fit into the room, without overtaking.

        Args:
            room: free rows and budgets; one request may exceed the prefill budget when it comes first.
            prefill_cost: tokens that a request would have computed, asked in the order of admission.
            only: requests for which this is false stay, and do not block those behind them.
        """
        taken: list[Request] = []
        kv_tokens, prefill_tokens = room.kv_tokens, room.prefill_tokens
        for request in self._requests:
            if only is not None and not only(request):
                continue
            reserved = class_for(len(request.context), classes)
            if len(taken) == room.rows or reserved > kv_tokens:
                break
            cost = prefill_cost(request)
            if taken and cost > prefill_tokens:
                break
            kv_tokens, prefill_tokens = kv_tokens - reserved, prefill_tokens - cost
            taken.append(request)
        if taken:
            self.remove({request.id for request in taken})
        return taken


def choose_preempted(
    serials: Sequence[int], reserved_tokens: Sequence[int], growth_tokens: Sequence[int], budget_tokens: int
) -> list[int]:
    """Which running samples give up their KV so that the others can grow.

    Args:
        serials: age of each running sample; the largest is the youngest.
        reserved_tokens: KV tokens its row reserves now.
        growth_tokens: further tokens its next class needs; 0 for those that do not grow.
        budget_tokens: KV tokens that may be reserved together.

    Returns:
        Indices into `serials`, youngest first; empty when everything fits.
    """
    needed = sum(reserved_tokens) + sum(growth_tokens)
    chosen: list[int] = []
    for index in sorted(range(len(serials)), key=lambda i: -serials[i]):
        if needed <= budget_tokens:
            break
        needed -= reserved_tokens[index] + growth_tokens[index]
        chosen.append(index)
    return chosen
