"""The host side of running samples: one numpy row each, updated for all of them at once after every decode step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from april.core.errors import EngineError
from april.core.ids import Version
from april.core.random import sample_key, uniforms
from april.core.routes import Routes
from april.core.sample import Segment
from april.engines.embedded.sampler import NUM_SPEC_COLUMNS, SpecColumns, spec_columns
from april.engines.embedded.scheduler import Request

Ints = npt.NDArray[np.int64]


class SlotTable:
    """State of up to `num_slots` running samples; unreported tokens wait in fixed buffers.

    Args:
        num_slots: rows.
        buffer_tokens: unreported tokens a slot can hold.
    """

    def __init__(self, num_slots: int, buffer_tokens: int) -> None:
        self.requests: list[Request | None] = [None] * num_slots
        self.keys = np.zeros(num_slots, np.uint64)
        self.response_tokens = np.zeros(num_slots, np.int64)
        self.total_tokens = np.zeros(num_slots, np.int64)
        self.limit_tokens = np.zeros(num_slots, np.int64)
        self.last_token = np.zeros(num_slots, np.int64)
        self.mixed_kv = np.zeros(num_slots, np.bool_)
        self._unreported = np.zeros(num_slots, np.int64)
        self._tokens = np.zeros((num_slots, buffer_tokens), np.int32)
        self._logprobs = np.zeros((num_slots, buffer_tokens), np.float32)
        self._entropies = np.zeros((num_slots, buffer_tokens), np.float32)
        self._routes: Routes | None = None
        self._stop_ids = np.full((num_slots, 1), -1, np.int64)
        self._has_strings = np.zeros(num_slots, np.bool_)
        self._spec = np.zeros((num_slots, NUM_SPEC_COLUMNS))
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots without a sample."""
        return len(self._free)

    def open(self, request: Request) -> int:
        """Give the request a slot."""
        slot = self._free.pop()
        spec = request.sample.spec
        self.requests[slot] = request
        self.keys[slot] = sample_key(spec.seed, request.id)
        self.total_tokens[slot] = len(request.context)
        self.response_tokens[slot] = len(request.context) - request.num_prompt
        self.limit_tokens[slot] = request.limit_tokens
        self.last_token[slot] = request.context[-1]
        self.mixed_kv[slot] = False
        self._unreported[slot] = 0
        self._has_strings[slot] = bool(spec.stop_strings)
        self._spec[slot] = spec_columns(spec)
        self._set_stop_ids(slot, spec.stop_token_ids)
        return slot

    def _set_stop_ids(self, slot: int, ids: tuple[int, ...]) -> None:
        missing = len(ids) - self._stop_ids.shape[1]
        if missing > 0:
            self._stop_ids = np.pad(self._stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self._stop_ids[slot] = -1
        self._stop_ids[slot, : len(ids)] = ids

    def request(self, slot: int) -> Request:
        """The request in an occupied slot."""
        request = self.requests[slot]
        if request is None:
            raise EngineError("a slot has no sample", got=slot)
        return request

    def close(self, slot: int) -> None:
        """Free a slot; its unreported tokens are gone, so take them first."""
        self.requests[slot] = None
        self._free.append(slot)

    def specs(self, slots: Ints) -> SpecColumns:
        """Sampling parameters of these slots."""
        columns: SpecColumns = self._spec[slots]
        return columns

    def stop_ids(self, slots: Ints) -> Ints:
        """Stop tokens of these slots, (n, any), -1 where a slot has fewer."""
        ids: Ints = self._stop_ids[slots]
        return ids

    def uniforms(self, slots: Ints, num_positions: int) -> npt.NDArray[np.float64]:
        """The addressed uniforms (num_positions, n) of each slot's next tokens."""
        return uniforms(self.keys[slots], self.response_tokens[slots] + np.arange(num_positions)[:, None])

    def unsampled(self, slots: Ints) -> Ints:
        """Tokens that each slot's limit leaves."""
        left: Ints = self.limit_tokens[slots] - self.response_tokens[slots]
        return left

    def room(self, slots: Ints) -> Ints:
        """Tokens that each slot can hold before it has to report."""
        room: Ints = self._tokens.shape[1] - self._unreported[slots]
        return room

    def record(
        self,
        slots: Ints,
        tokens: Ints,
        logprobs: npt.NDArray[np.float64],
        entropies: npt.NDArray[np.float64] | None,
        routes: Routes | None = None,
    ) -> tuple[Ints, Ints]:
        """Append one token to each of these distinct slots.

        Returns:
            Slots that end with a stop token, and slots (not among them) that reached their limit.
        """
        column = self._unreported[slots]
        self._tokens[slots, column] = tokens
        self._logprobs[slots, column] = logprobs
        if entropies is not None:
            self._entropies[slots, column] = entropies
        if routes is not None:
            if self._routes is None:
                self._routes = np.zeros((*self._tokens.shape, *routes.shape[1:]), routes.dtype)
            self._routes[slots, column] = routes
        self._unreported[slots] = column + 1
        self.total_tokens[slots] += 1
        response = self.response_tokens[slots] + 1
        self.response_tokens[slots] = response
        self.last_token[slots] = tokens
        eos = (self._stop_ids[slots] == tokens[:, None]).any(1)
        return slots[eos], slots[(response >= self.limit_tokens[slots]) & ~eos]

    def with_strings(self, slots: Ints) -> Ints:
        """Those of these slots that have stop strings."""
        found: Ints = slots[self._has_strings[slots]]
        return found

    def full(self, slots: Ints) -> Ints:
        """Those of these slots whose buffer has no room for another token."""
        found: Ints = slots[self._unreported[slots] == self._tokens.shape[1]]
        return found

    def tail(self, slot: int, num_tokens: int) -> npt.NDArray[np.int32]:
        """The last response tokens of a slot, at most `num_tokens`, reported or not."""
        request, count = self.request(slot), int(self._unreported[slot])
        fresh = self._tokens[slot, :count]
        missing = min(num_tokens, int(self.response_tokens[slot])) - count
        if missing <= 0:
            return fresh[count - min(num_tokens, count) :]
        return np.concatenate([request.context[len(request.context) - missing :], fresh])

    def tokens(self, slot: int) -> npt.NDArray[np.int32]:
        """Prompt and response of a slot."""
        return np.concatenate([self.request(slot).context, self._tokens[slot, : self._unreported[slot]]])

    def take_segment(self, slot: int, version: Version, sampler: str) -> Segment | None:
        """Report what is unreported; the tokens join the request's context."""
        count = int(self._unreported[slot])
        if not count:
            return None
        request = self.request(slot)
        tokens = self._tokens[slot, :count].copy()
        entropies = self._entropies[slot, :count].copy() if request.sample.spec.entropy else None
        routes = None if self._routes is None else self._routes[slot, :count].copy()
        prompt_routes = request.prompt_routes if len(request.context) == request.num_prompt else None
        request.context = np.concatenate([request.context, tokens])
        self._unreported[slot] = 0
        return Segment(tokens, self._logprobs[slot, :count].copy(), version, sampler, entropies, routes, prompt_routes)
