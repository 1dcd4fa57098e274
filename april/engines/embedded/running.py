"""The samples being decoded: slots, their KV rows, and the tensors that stay on the device from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from april.core.ids import GroupId, SampleId, Version
from april.core.sample import Segment
from april.engines.embedded.chunks import ChunkDecoder, chunk_rows
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.emitted import Column, Doubles, Emitted, host_values
from april.engines.embedded.forward import Forward
from april.engines.embedded.memory import KvMemory
from april.engines.embedded.retain import Kept, KeptKv, Key
from april.engines.embedded.sampler import SpecBatch, draw, spec_batch_of
from april.engines.embedded.scheduler import Request, choose_preempted
from april.engines.embedded.select import make_chunks
from april.engines.embedded.slots import Ints, SlotTable
from april.engines.embedded.speculate import Drafts, Feed, Payoff, accepted_counts, feed_of
from april.models.kv import KvBucket
from april.models.kv_draft import DraftStep

_UNIFORMS_STEPS = 16
_GROW_STEPS = 8


class RunningBatch:
    """Members change between steps; while they do not, a step prepares nothing.

    Args:
        forward: the model.
        config: number of slots, length of report buffers.
        classes: row capacities of KV memory.
    """

    def __init__(self, forward: Forward, config: EmbeddedConfig, classes: tuple[int, ...]) -> None:
        self._forward, self._budget_tokens = forward, config.kv_tokens
        self._table = SlotTable(config.max_running, config.report_every_tokens)
        self._memory = KvMemory(classes, forward.bucket, config.max_running, config.kv_tokens)
        self._slot_of: dict[SampleId, int] = {}
        self._groups: dict[GroupId, dict[SampleId, int]] = {}
        drafts = config.max_draft_tokens if forward.takes_drafts else 0
        self._drafts = Drafts(config.draft_match_tokens, drafts, config.kv_tokens) if drafts else None
        self.payoff = Payoff(config.draft_overhead_rows, adaptive=config.draft_adaptive)
        if self._drafts is None:
            self.payoff.state = "off: this forward verifies no guesses" if config.max_draft_tokens else "off"
        self._chunks = make_chunks(forward, config, classes[-1])
        self._order: Ints = np.zeros(0, np.int64)
        self._let_go()

    @property
    def size(self) -> int:
        """Samples being decoded."""
        return len(self._slot_of)

    @property
    def num_free(self) -> int:
        """Samples that could join."""
        return self._table.num_free

    @property
    def reserved_tokens(self) -> int:
        """KV tokens of all occupied rows, used or not."""
        return self._memory.reserved_tokens

    @property
    def kv_tokens(self) -> int:
        """KV tokens written for running samples."""
        return int(sum(self._memory.num_tokens[slot] for slot in self._slot_of.values()))

    def slots(self) -> list[int]:
        """Occupied slots, oldest submission first."""
        return sorted(self._slot_of.values(), key=lambda slot: self._table.request(slot).serial)

    def slots_of(self, ids: Iterable[SampleId]) -> list[int]:
        """Slots of those ids that run, oldest submission first."""
        wanted = {self._slot_of[id_] for id_ in ids if id_ in self._slot_of}
        return [slot for slot in self.slots() if slot in wanted]

    def relatives(self, id_: SampleId) -> list[int]:
        """Slots of running members of the same group, in the order in which they started."""
        return [slot for other, slot in self._groups.get(id_.group, {}).items() if other != id_]

    def tokens(self, slot: int) -> npt.NDArray[np.int32]:
        """Prompt and response of a slot."""
        return self._table.tokens(slot)

    def request(self, slot: int) -> Request:
        """The request in a slot."""
        return self._table.request(slot)

    def expect(self, requests: Sequence[Request]) -> None:
        """Allocate the rows of requests that are about to be added."""
        self._let_go()
        self._memory.expect([len(request.context) for request in requests])

    @property
    def kept(self) -> KeptKv:
        """KV of samples that do not run."""
        return self._memory.kept

    def keep(self, key: Key, kept: Kept) -> None:
        """Keep this KV where there is room."""
        self._let_go()
        self._memory.keep(key, kept)

    def give_back(self) -> None:
        """Give back the memory that no running sample holds."""
        self._let_go()
        self._memory.give_back()

    def _let_go(self) -> None:
        """Memory is about to move: nothing here may hold it, or point to it, any longer."""
        self._rows: Sequence[Any] = ()
        self._buckets: list[KvBucket] = []
        self._changed = True

    def add(self, request: Request, source: torch.Tensor | None, *, mixed: bool = False) -> int:
        """Start a request whose tokens but the last have the KV `source`; returns its slot."""
        slot = self._table.open(request)
        if len(request.context) == request.num_prompt:
            request.prompt_routes = self._forward.prefix_routes(request.context[:-1])
        self._table.mixed_kv[slot] = mixed
        self._memory.insert(slot, len(request.context) - 1, source)
        self._slot_of[request.id] = self._groups.setdefault(request.id.group, {})[request.id] = slot
        if self._drafts is not None:
            self._drafts.open(slot, request.id.group, request.context.tolist())
        self._changed = True
        return slot

    def remove(self, slots: Sequence[int], *, keep: bool = False) -> None:
        """Stop decoding these slots; unreported tokens are lost, so take them first; `keep` their KV where there is room."""
        kept = [(self._table.request(slot).id, self._kept(slot)) for slot in slots] if keep else []
        for slot in slots:
            self._forget(slot)
            self._memory.remove(slot)
            self._table.close(slot)
        self._changed = self._changed or bool(slots)
        for id_, kv in kept:
            self.keep(id_, kv)

    def _forget(self, slot: int) -> None:
        id_ = self._table.request(slot).id
        del self._slot_of[id_], self._groups[id_.group][id_]
        if not self._groups[id_.group]:
            del self._groups[id_.group]
        if self._drafts is not None:
            self._catch_up(self._drafts, slot)
            self._drafts.close(slot)

    def _kept(self, slot: int) -> Kept:
        token_ids = self.tokens(slot)[:-1]
        return Kept(token_ids, self.prefix_kv(slot, len(token_ids)).clone(), self.is_mixed(slot))

    def prefix_kv(self, slot: int, num_tokens: int) -> torch.Tensor:
        """KV of a running sample's first tokens."""
        return self._memory.read(slot, num_tokens)

    def is_mixed(self, slot: int) -> bool:
        """Whether the slot's KV was made by older weights than those that sample."""
        return bool(self._table.mixed_kv[slot])

    def mark_mixed(self) -> None:
        """All running samples, and parked ones, go on with KV of the former weights."""
        self._table.mixed_kv[list(self._slot_of.values())] = True
        self.kept.age()

    def _growing(self) -> Ints:
        slots = self._sync_order()
        growing: Ints = slots[self._memory.num_tokens[slots] == self._memory.capacity[slots]]
        return growing

    def _growing_soon(self, num_steps: int) -> Ints:
        """Slots that would be full within so many steps, where the budget lets all of them grow; else the full ones."""
        slots = self._sync_order()
        needed = self._memory.num_tokens[slots] + np.minimum(num_steps, self._table.unsampled(slots))
        soon: Ints = slots[needed > self._memory.capacity[slots]]
        fits = self.reserved_tokens + self._memory.growth_tokens(soon) <= self._budget_tokens
        return soon if fits else self._growing()

    def over_budget(self) -> list[int]:
        """Slots that have to leave, so that the rows that are full can grow."""
        growing = self._growing()
        if not len(growing):
            return []
        slots = self.slots()
        grows = set(growing.tolist())
        reserved = [int(self._memory.capacity[slot]) for slot in slots]
        growth = [
            self._memory.next_class(size) - size if slot in grows else 0 for slot, size in zip(slots, reserved, strict=True)
        ]
        serials = [self._table.request(slot).serial for slot in slots]
        return [slots[index] for index in choose_preempted(serials, reserved, growth, self._budget_tokens)]

    def grow(self) -> None:
        """Move full rows into their next class, and with them those that will be full soon: rows are moved together."""
        growing = self._growing()
        if self._chunks is not None:  # nobody looks before the chunk is over
            growing = self._growing_soon(self._chunks.num_steps)
        elif len(growing):
            growing = self._growing_soon(_GROW_STEPS)
        if len(growing):
            self._let_go()
            self._memory.promote(growing.tolist())

    def _sync_order(self) -> Ints:
        """Slots in the order of the KV rows; prepares the tensors of a step after members have changed."""
        if not self._changed:
            return self._order
        self._changed = False
        self._order = slots = self._memory.order()
        device = self._forward.device
        self._buckets = self._memory.buckets()
        self._rows = self._forward.rows(self._buckets, self._memory.num_tokens[slots])
        self._tokens = torch.from_numpy(self._table.last_token[slots]).to(device)
        self._positions = torch.from_numpy(self._memory.num_tokens[slots]).to(device)
        self._specs = self._spec_batch(slots)
        self._uniforms: Iterator[torch.Tensor] = iter(())
        return slots

    def _spec_batch(self, slots: Ints) -> SpecBatch:
        """Sampling parameters of these slots, which may be named more than once."""
        return spec_batch_of(self._table.specs(slots), self._forward.vocab_size, self._forward.device, self._forward.dtype)

    def step(self) -> Emitted:
        """Sample one token for every running sample, or more where guesses hold."""
        slots = self._sync_order()
        if self._chunks is not None:
            return self._chunk_step(slots, self._chunks)
        feed = self._feed(slots)
        return self._plain_step(slots) if feed is None else self._draft_step(slots, feed)

    def _plain_step(self, slots: Ints) -> Emitted:
        for rows in self._rows:
            rows.begin_step()
        longest = max(rows.longest for rows in self._rows)
        logits = self._forward.decode(self._tokens, self._positions, longest, self._rows)
        drawn = draw(logits, self._specs, self._next_uniforms(slots))
        self._tokens = drawn.tokens
        self._positions += 1
        self._memory.num_tokens[slots] += 1
        return Emitted(slots, host_values(drawn)[:, :, None], np.ones(len(slots), np.int64), self._forward.routes)

    def _chunk_step(self, slots: Ints, chunks: ChunkDecoder) -> Emitted:
        """Several steps between which the host does not look; rows that end meanwhile wait for the end of the chunk."""
        rows = chunk_rows(self._table, self._memory, slots, chunks.num_steps)
        values, counts = chunks.decode(self._buckets, rows)
        self._memory.num_tokens[slots] += counts
        return Emitted(slots, values, counts)

    def _feed(self, slots: Ints) -> Feed | None:
        """Last tokens and guesses of the next step; None when nobody guesses."""
        num_rows = self.payoff.rows(len(slots)) if self._drafts is not None else 0
        if self._drafts is None or not num_rows:
            return None
        for slot in slots.tolist():
            self._catch_up(self._drafts, slot)
        room = np.minimum(self._memory.capacity[slots] - self._memory.num_tokens[slots], self._table.room(slots))
        most = np.minimum(room, self._table.unsampled(slots)) - 1
        guesses: list[list[int]] = [[] for _ in slots]
        for row, slot in enumerate(slots[:num_rows].tolist()):
            guesses[row] = self._drafts.guess(slot, int(most[row]))
        pays = self.payoff.pays(len(slots), sum(map(len, guesses)))
        return feed_of(self._table.last_token[slots], guesses) if pays else None

    def _catch_up(self, drafts: Drafts, slot: int) -> None:
        missing = int(self._table.total_tokens[slot]) - drafts.num_tokens(slot)
        if missing:
            drafts.extend(slot, self._table.tail(slot, missing).tolist())

    def _draft_step(self, slots: Ints, feed: Feed) -> Emitted:
        device, lengths, packed = self._forward.device, self._memory.num_tokens[slots], feed.packed
        row, offset = np.nonzero(packed)
        parts = [torch.from_numpy(part).split([bucket.size for bucket in self._buckets]) for part in (lengths, feed.counts)]
        steps = [DraftStep(*part) for part in zip(self._buckets, *parts, strict=True)]
        tokens, positions = (torch.from_numpy(part).to(device) for part in (feed.token_ids[packed], lengths[row] + offset))
        logits = self._forward.decode(tokens, positions, max(step.longest for step in steps), steps)
        uniforms = self._table.uniforms(slots, packed.shape[1])[offset, row]
        found = host_values(draw(logits, self._spec_batch(slots[row]), torch.from_numpy(uniforms).to(device)))
        values = np.zeros((len(found), *packed.shape))
        values[:, packed] = found
        return self._verified(slots, feed, values)

    def _verified(self, slots: Ints, feed: Feed, values: Doubles) -> Emitted:
        """Keep the guesses that were drawn, and the token drawn behind them."""
        accepted, drafted = accepted_counts(feed.token_ids, values[0].astype(np.int64), feed.counts), feed.counts - 1
        self.payoff.verified(int(drafted.sum()), int(accepted.sum()))
        for row in np.flatnonzero(drafted).tolist():
            if self._drafts is not None:
                self._drafts.verified(int(slots[row]), int(drafted[row]), int(accepted[row]))
        self._memory.num_tokens[slots] += 1 + accepted
        self._changed = True  # rows have grown by unequal numbers
        return Emitted(slots, values, 1 + accepted)

    def record(self, column: Column) -> tuple[Ints, Ints]:
        """Append one token to each of these slots; those that end with a stop token, and others that reached their limit."""
        return self._table.record(column.slots, column.tokens, column.logprobs, column.entropies, column.routes)

    def _next_uniforms(self, slots: Ints) -> torch.Tensor:
        """Uniforms (n,) of the next position; drawn for some positions at once while members stay."""
        found = next(self._uniforms, None)
        if found is None:
            block = torch.from_numpy(self._table.uniforms(slots, _UNIFORMS_STEPS)).to(self._forward.device)
            self._uniforms = iter(block.unbind())
            found = next(self._uniforms)
        return found

    def with_strings(self, slots: Ints) -> list[int]:
        """Those of these slots that have stop strings."""
        found: list[int] = self._table.with_strings(slots).tolist()
        return found

    def full(self, slots: Ints) -> list[int]:
        """Those of these slots whose unreported tokens fill their buffer."""
        found: list[int] = self._table.full(slots).tolist()
        return found

    def tail(self, slot: int, num_tokens: int) -> npt.NDArray[np.int32]:
        """The last response tokens of a slot."""
        return self._table.tail(slot, num_tokens)

    def take_segment(self, slot: int, version: Version, sampler: str) -> Segment | None:
        """The slot's unreported tokens."""
        return self._table.take_segment(slot, version, sampler)
