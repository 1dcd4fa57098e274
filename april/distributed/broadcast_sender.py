"""The sending side of a broadcast: a copy of the newest weights, and a thread that sends it to those who ask.

    asks of members -> gather those who want the version -> one group of them -> buckets

A round begins when every member of the last rounds that lacks the version has asked, or is known to be gone; nobody is waited
for beyond a deadline. Who is left out asks, and gets a round of its own.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from april.core.errors import ProcessError
from april.core.ids import NO_VERSION, Version
from april.distributed.broadcast_group import Group, Meeting, first_line
from april.distributed.layout import Layout

NEWEST, TROUBLE = "newest", "trouble"
"""Keys of the store: (version, digest) that was written last; why the last round that failed did so."""
_BUSY_S, _IDLE_S = 0.002, 0.05
_WRITTEN_S = 1.0
"""A question is written down this soon after it is counted."""
_SETTLE_S = 0.05
"""The first round waits this long for members that are not known yet."""
_REGATHER_S = 2.0
"""After a round that failed, those who are well ask again at once."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A member wants a version.

    Attributes:
        number: of the question.
        member: who.
        version: that it wants.
        group: that it is in.
    """

    number: int
    member: str
    version: Version
    group: int | None


class Sender:
    """Holds the newest weights and sends them.

    Args:
        meeting: of its own.
        layout: of the tensors.
        device: of the memory that is sent from.
        bucket_bytes: sent at once.
        deadline_s: half of it is the longest wait for members to ask, and for each of them while it is sent to.
    """

    def __init__(self, meeting: Meeting, layout: Layout, device: torch.device, bucket_bytes: int, deadline_s: float) -> None:
        self._meeting, self._layout, self._device = meeting, layout, device
        self._bucket_bytes, self._deadline_s = bucket_bytes, deadline_s
        self._flat = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        self._tensors = layout.views(self._flat)
        self._version: Version = NO_VERSION
        self._still = threading.Lock()
        self._wake, self._stopped = threading.Event(), False
        self._next, self._open = 1, dict[int, float]()
        self._group: Group | None = None
        self._members: tuple[str, ...] = ()
        self._known, self._served = set[str](), set[str]()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="april-broadcast", daemon=True)
        self._thread.start()

    def stage(self, weights: Mapping[str, Tensor], version: Version) -> tuple[Version, str]:
        """Take a copy of weights, which is sent from now on; returns the version and its digest.

        Raises:
            ProcessError: they are not the tensors of the layout, or those of before are still being sent.
        """
        if not self._still.acquire(timeout=2 * self._deadline_s):
            raise ProcessError("the weights of before are still being sent", where=f"version {version}", got=f"{self._version}")
        try:
            self._version = NO_VERSION
            self._layout.copy(weights, self._tensors)
            self._version, self._served = version, set()
            return version, digest_of(self._flat)
        finally:
            self._still.release()
            self._wake.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._wake.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stopped:
            try:
                asks = self._new_asks()
                if asks:
                    self._round(self._gathered(asks))
                    continue
            except RuntimeError:  # the store is gone, and with it the run
                return
            self._wake.wait(_BUSY_S if self._known - self._served else _IDLE_S)
            self._wake.clear()

    def _new_asks(self) -> list[Ask]:
        """Questions that have come and are not answered; those for versions that are not there yet stay."""
        newest, now_s = self._meeting.count("asked", 0), time.monotonic()
        self._open |= dict.fromkeys(range(self._next, newest + 1), now_s + _WRITTEN_S)
        self._next = newest + 1
        asks = []
        for number, until_s in list(self._open.items()):
            found = self._meeting.get(f"ask/{number}")
            if found is None:
                if now_s > until_s:  # a sender before this one has answered it, or it will never be written down
                    del self._open[number]
                continue
            self._open[number] = math.inf
            ask = Ask(number, str(found["member"]), int(found["version"]), found["group"])
            if self._useless(ask):
                self._forget(ask)
            elif ask.version < self._version:
                self._answer(ask, {"newest": self._version})
            elif ask.version == self._version:
                asks.append(ask)
        return asks

    def _useless(self, ask: Ask) -> bool:
        return bool(self._meeting.take(f"withdrawn/{ask.number}")) or self._meeting.get(f"gone/{ask.member}") is not None

    def _forget(self, ask: Ask) -> None:
        self._open.pop(ask.number, None)
        self._meeting.store.delete_key(f"ask/{ask.number}")

    def _answer(self, ask: Ask, answer: Mapping[str, object]) -> None:
        self._forget(ask)
        self._meeting.put(f"answer/{ask.number}", answer)

    def _gathered(self, asks: list[Ask]) -> list[Ask]:
        """These questions and those that come while others are expected; the newest of each member."""
        began_s = time.monotonic()
        patience_s = _REGATHER_S if self._failed else self._deadline_s / 2
        settle_s = 0.0 if self._known else _SETTLE_S
        while True:
            self._served -= {ask.member for ask in asks}  # one that has it and asks again has lost it
            lacking = self._known - self._served - {ask.member for ask in asks}
            lacking -= {member for member in lacking if self._meeting.get(f"gone/{member}") is not None}
            waited_s = time.monotonic() - began_s
            if self._stopped or (not lacking and waited_s >= settle_s) or waited_s >= patience_s:
                break
            time.sleep(_BUSY_S)
            asks = self._new_asks()  # those of before are still open
        self._known = {ask.member for ask in asks} | (self._known & self._served)
        newest = {ask.member: ask for ask in sorted(asks, key=lambda ask: ask.number)}
        return [newest[member] for member in sorted(newest)]

    def _round(self, asks: list[Ask]) -> None:
        """One broadcast to all who have asked."""
        with self._still:
            asks = [ask for ask in asks if ask.version == self._version]
            if not asks:  # another version was written meanwhile: they are still open
                return
            members, group = tuple(ask.member for ask in asks), self._group
            if group is not None and (members != self._members or any(ask.group != group.number for ask in asks)):
                group = None
            number = self._meeting.count("groups") if group is None else group.number
            size = len(asks) + 1
            for rank, ask in enumerate(asks, 1):
                self._answer(ask, {"group": number, "rank": rank, "size": size})
            self._group = None
            try:
                if group is None:
                    group = Group(self._meeting, number, 0, size, self._device, self._deadline_s / 2)
                group.broadcast(self._flat, self._bucket_bytes)
            except RuntimeError as error:
                self._failed = True
                self._meeting.put(TROUBLE, f"version {self._version} to {', '.join(members)}: {first_line(error)}")
                return
            self._group, self._members, self._failed = group, members, False
            self._served |= set(members)


def digest_of(flat: Tensor) -> str:
    """SHA-256 of flat memory, uint8 (bytes,)."""
    return hashlib.sha256(flat.cpu().numpy().data).hexdigest()
