"""The connections to all ranks as one: who answers, who is blamed, and that the end of one is the end of all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from april.config.resolve import resolve
from april.core.errors import ModelError, ProcessError
from april.distributed import ranks
from april.distributed.channel import Channel, Closed
from april.distributed.child import Failed
from april.distributed.ranks import RankChannels, RankGroup
from april.run import processes


class FakeChild:
    """Both ends of a connection; the process is imagined."""

    def __init__(self, pid: int) -> None:
        ours, theirs = Channel.pair()
        self.channel, self.other, self.pid, self.alive = Channel(ours), Channel(theirs), pid, True

    def says(self, message: object) -> None:
        self.other.send(message)
        self.channel.wait(10)

    def dies(self) -> None:
        self.alive = False
        self.other.flush(10)
        self.other.close()
        self.channel.wait(10)

    def kill(self, grace_s: float = 0.0) -> str:
        end = "ended by SIGKILL" if not self.alive else "killed now"
        self.alive = False
        return end

    def close(self) -> None:
        self.other.close()
        self.channel.close()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeChild]]:
    monkeypatch.setattr(ranks, "_BLAME_S", 0.2)
    made = [FakeChild(100 + rank) for rank in range(3)]
    yield made
    for child in made:
        child.close()


def test_a_trainer_of_ranks_is_in_child_processes_that_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    shared = resolve("quickstart", overrides=["training.ranks=2", "model.threads=0"]).recipe
    told = resolve("quickstart", overrides=["training.ranks=2", "training.threads=3"]).recipe
    assert processes.in_child(shared, "trainer") and not processes.in_child(shared, "engine")
    assert (processes._threads_of_rank(shared), processes._threads_of_rank(told)) == (2, 3)


def error(text: str, foreign: bool) -> Failed:
    return Failed(ProcessError("failed", got=text) if foreign else ModelError("the loss is not finite", got=text), foreign)


def test_every_rank_hears_a_command_and_only_the_first_answers(children: list[FakeChild]) -> None:
    channels = RankChannels(children)  # type: ignore[arg-type]
    channels.send(("update", 1))
    for child in children:
        child.other.wait(10)
        assert child.other.receive() == [("update", 1)]
        child.says(f"answer of {child.pid}")
    assert channels.receive() == ["answer of 100"]


def test_a_silent_end_is_blamed_before_the_errors_it_causes(children: list[FakeChild]) -> None:
    channels = RankChannels(children)  # type: ignore[arg-type]
    children[0].says(error("RuntimeError: connection closed by peer", foreign=True))
    children[1].dies()
    with pytest.raises(Closed, match=r"lost a rank: rank 1 \(process 101\): it closed.*; rank 0 \(process 100\) failed: Runtime"):
        channels.receive()


def test_what_came_before_the_end_is_not_lost(children: list[FakeChild]) -> None:
    channels = RankChannels(children)  # type: ignore[arg-type]
    children[0].says("done")
    children[2].dies()
    assert channels.receive() == ["done"]
    with pytest.raises(Closed, match="rank 2"):
        channels.receive()


def test_an_error_of_the_run_itself_comes_through_from_any_rank(children: list[FakeChild]) -> None:
    channels = RankChannels(children)  # type: ignore[arg-type]
    children[2].says(error("nan", foreign=False))
    assert [message.error.got for message in channels.receive()] == ["nan"]


def test_the_group_ends_together_and_says_who_had_ended_before(
    children: list[FakeChild], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waiting = iter(children)
    monkeypatch.setattr(ranks, "Child", lambda _launch: next(waiting))
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    group = RankGroup([None] * 3, meeting)  # type: ignore[list-item]
    children[1].dies()
    assert group.kill() == "rank 1 ended by SIGKILL"
    assert group.pid == 100 and not any(child.alive for child in children)
    group.close()
    assert not meeting.exists()
