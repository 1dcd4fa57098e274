"""A trainer of several processes, and what stands for it in the controlling process.

    RankedTrainer  -- every command, to every rank -->  rank 0, rank 1, ...: serve_trainer, each with its part
                  <---- Done, Answer from rank 0; from the others only that they failed, or silence

Ranks speak to each other through `torch.distributed`. One that dies leaves the others waiting, so all of them are ended and
started again together, as `april.distributed.remote_trainer` does with one.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from april.core.clock import WallClock
from april.distributed.channel import Channel, Closed
from april.distributed.child import Child, Failed, Launch
from april.distributed.remote_trainer import RemoteTrainer
from april.distributed.trainer_process import serve_trainer
from april.distributed.transport import WeightTransport
from april.training.single import Trainer

if TYPE_CHECKING:
    from torch.distributed import Store

    from april.training.sharded_ranks import Ranks

JoinRanks = Callable[[int, int, "str | Store"], "Ranks"]
"""Meets the other ranks: from the own number, the count and the rendezvous."""
MakeShard = Callable[["Ranks", WallClock], tuple[Trainer, Any]]
"""Makes the trainer of one rank, and the tokenizer that is saved with its policy."""
_BLAME_S = 1.0
"""How long ranks may take to tell why they failed, once one is gone; the one that was killed says nothing."""


class RankedTrainer(RemoteTrainer):
    """See `RemoteTrainer`; the processes of all ranks live and die together.

    Args:
        join: meets the other ranks, in the child; importable.
        make: makes the trainer of one rank, in the child; importable.
        ranks: how many.
        spawns: starts the process of each rank; children of this one by default.
        meet: makes a rendezvous for ranks on several machines, which gives each its store; a file by default.
        **options: of `RemoteTrainer`.
    """

    def __init__(
        self,
        join: JoinRanks,
        make: MakeShard,
        *,
        ranks: int,
        spawns: Sequence[Callable[[Launch], Any]] | None = None,
        meet: Callable[[], Callable[[int], Store]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(make, **options)  # type: ignore[arg-type]  # called by the ranks, with who they are
        self._join, self._num_ranks, self._spawns, self._meet = join, ranks, spawns, meet

    @property
    def pids(self) -> list[int]:
        """Process ids, rank 0 first; empty while there are none."""
        return [child.pid for child in self._child.children] if isinstance(self._child, RankGroup) else []

    def waitables(self) -> Sequence[Any]:
        """The connections to all ranks."""
        return [child.channel for child in self._child.children] if isinstance(self._child, RankGroup) else ()

    def _spawn(self) -> RankGroup:
        meeting = None if self._meet else Path(tempfile.mkdtemp(prefix="april-ranks-"))
        rendezvous = self._meet() if self._meet else f"file://{meeting}/store"
        launches = [
            Launch(
                f"{self.name} rank {rank}",
                serve_rank,
                (
                    rank,
                    self._num_ranks,
                    rendezvous,
                    self._join,
                    self._make,
                    self._clock.origin_s,
                    self._transport,
                ),
                self._threads,
            )
            for rank in range(self._num_ranks)
        ]
        return RankGroup(launches, meeting, self._spawns)


class RankGroup:
    """The processes of all ranks; stands where one `Child` would.

    Args:
        launches: of the ranks, in their order.
        meeting: a folder that they meet in, removed at the end.
        spawns: starts the process of each rank; children of this one by default.
    """

    def __init__(
        self, launches: Sequence[Launch], meeting: Path | None, spawns: Sequence[Callable[[Launch], Any]] | None = None
    ) -> None:
        self._meeting = meeting
        self.children = [(spawns[rank] if spawns else Child)(launch) for rank, launch in enumerate(launches)]
        self.channel = RankChannels(self.children)

    @property
    def pid(self) -> int:
        """The process id of rank 0."""
        return self.children[0].pid

    @property
    def lost_node(self) -> bool:
        """Whether a rank went with the machine that it was on."""
        return any(getattr(child, "lost_node", False) for child in self.children)

    def kill(self, grace_s: float = 0.0) -> str:
        """End all processes; returns how those ended that did so before."""
        until_s = time.monotonic() + grace_s
        while grace_s and not any(not child.alive for child in self.children) and time.monotonic() < until_s:
            time.sleep(0.01)
        gone = [not child.alive for child in self.children]
        ends = [child.kill() for child in self.children]
        told = [f"rank {rank} {end}" for rank, end in enumerate(ends) if end and (gone[rank] or "placed" in end)]
        return "; ".join(told) or "all ranks were killed"

    def close(self) -> None:
        """End all processes and drop the connections."""
        for child in self.children:
            child.close()
        if self._meeting is not None:
            shutil.rmtree(self._meeting, ignore_errors=True)


class RankChannels:
    """The connections to all ranks as one: commands go to all of them, rank 0 answers, the end of one is the end of all."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children
        self._troubles: dict[int, str] = {}

    def send(self, message: Any) -> None:
        """Hand a message to every rank."""
        packed = self._children[0].channel.pack(message)
        for child in self._children:
            child.channel.send(packed)

    def receive(self) -> list[Any]:
        """What rank 0 has sent, and errors of April's own kinds from any rank.

        Raises:
            Closed: a rank is gone; says which, and what the others told.
        """
        messages = self._messages()
        if not messages and self._troubles:
            until_s = time.monotonic() + _BLAME_S
            while len(self._troubles) < len(self._children) and time.monotonic() < until_s:
                time.sleep(0.01)
                messages += self._messages()
            if not messages:
                raise Closed(self._told())
        return messages

    def _messages(self) -> list[Any]:
        messages: list[Any] = []
        for rank, child in enumerate(self._children):
            if rank in self._troubles:
                continue
            try:
                found = child.channel.receive()
            except Closed as closed:
                self._troubles[rank] = f"rank {rank} (process {child.pid}): {closed}"
                continue
            for message in found:
                if isinstance(message, Failed) and message.foreign:
                    self._troubles[rank] = f"rank {rank} (process {child.pid}) failed: {message.error.got}"
                elif rank == 0 or isinstance(message, Failed):
                    messages.append(message)
        return messages

    def _told(self) -> str:
        """Silent ends first: the others fail because of them."""
        told = sorted(self._troubles.values(), key=lambda trouble: " failed: " in trouble)
        return "lost a rank: " + "; ".join(line.splitlines()[0][:200] for line in told)


class _Mute:
    """The connection of a rank that does not answer: it receives, and what it would send is not sent."""

    def __init__(self, channel: Channel) -> None:
        self.receive, self.wait = channel.receive, channel.wait

    def send(self, message: Any) -> None:
        """Drop it."""


def serve_rank(
    channel: Channel,
    rank: int,
    count: int,
    rendezvous: str | Callable[[int], Store],
    join: JoinRanks,
    make: MakeShard,
    origin_s: float,
    transport: WeightTransport,
) -> None:
    """The life of one rank's process: `serve_trainer`, together with the others."""
    ranks = join(rank, count, rendezvous if isinstance(rendezvous, str) else rendezvous(rank))
    answering: Any = channel if rank == 0 else _Mute(channel)
    serve_trainer(answering, partial(make, ranks), origin_s, transport)
    ranks.leave()
