"""Weights that are broadcast: to whoever asks, whole or not at all, and nobody waits for ever for one that is gone."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from publishing_helpers import same, weights_of

from april.core.errors import ProcessError
from april.distributed import broadcast_sender, broadcast_weights
from april.distributed.broadcast_weights import BroadcastWeights
from april.distributed.child import Child, Launch
from april.distributed.layout import Layout
from april.distributed.transport import NotYet

BUCKET = 64


def controller(deadline_s: float = 20.0) -> BroadcastWeights:
    return BroadcastWeights(Layout.of(weights_of(0)), bucket_bytes=BUCKET, deadline_s=deadline_s)


class Reading(threading.Thread):
    """A reader that asks for a version, in a thread of its own."""

    def __init__(self, reader: BroadcastWeights, version: int, times: int = 1) -> None:
        super().__init__(daemon=True)
        self.reader, self.version, self.times = reader, version, times
        self.found: dict[str, torch.Tensor] = {}
        self.errors: list[str] = []
        self.start()

    def run(self) -> None:
        for _ in range(self.times):
            try:
                with self.reader.reading(self.version) as weights:
                    self.found = {name: tensor.clone() for name, tensor in weights.items()}
                    return
            except NotYet as error:
                self.errors.append(str(error.got))

    def ended(self, timeout_s: float = 30.0) -> bool:
        self.join(timeout_s)
        return not self.is_alive()


def read_all(readers: list[BroadcastWeights], version: int, times: int = 1) -> list[Reading]:
    readings = [Reading(reader, version, times) for reader in readers]
    if not all(reading.ended() for reading in readings):
        raise TimeoutError("a reader does not end")
    return readings


def waits(condition: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + 20.0
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.005)
    return condition()


def test_a_version_goes_to_all_who_ask_in_one_group_that_stays() -> None:
    transport = controller()
    readers = [transport.reader(f"engine {index}") for index in range(2)]
    moved = transport.write(weights_of(1), 1)
    assert moved.num_bytes == transport.layout.num_bytes == 5 * BUCKET
    assert all(same(reading.found, weights_of(1)) for reading in read_all(readers, 1))
    groups = {reader._group.number for reader in readers if reader._group}
    assert len(groups) == 1
    transport.write(weights_of(2), 2)
    assert all(same(reading.found, weights_of(2)) for reading in read_all(readers, 2))
    assert {reader._group.number for reader in readers if reader._group} == groups, "nothing is connected anew"
    assert transport.holds(2) and transport.passed(1) and not transport.passed(2) and not transport.holds(1)
    transport.close()


def test_one_that_comes_later_catches_up_and_is_then_one_of_the_group() -> None:
    transport = controller()
    first, second = transport.reader("engine 0"), transport.reader("engine 1")
    transport.write(weights_of(1), 1)
    (reading,) = read_all([first], 1)
    assert same(reading.found, weights_of(1))
    (late,) = read_all([second], 1)
    assert same(late.found, weights_of(1)) and late.errors == []
    transport.write(weights_of(2), 2)
    both = read_all([first, second], 2)
    assert all(same(reading.found, weights_of(2)) for reading in both)
    assert first._group and second._group and first._group.number == second._group.number and first._group.size == 3
    transport.close()


def test_a_version_that_was_passed_is_refused_and_one_to_come_is_waited_for() -> None:
    transport = controller()
    reader = transport.reader("engine 0")
    transport.write(weights_of(1), 1)
    early = Reading(reader, 2)
    transport.write(weights_of(2), 2)
    assert early.ended() and same(early.found, weights_of(2))
    with pytest.raises(NotYet, match="version 2 took its place"), reader.reading(1):
        pass
    with pytest.raises(ProcessError, match="the newest is 2"):
        transport.view(1)
    transport.close()


def test_the_trainer_s_weights_may_change_once_they_are_written() -> None:
    transport, weights = controller(), weights_of(1)
    transport.write(weights, 1)
    weights["matrix"].add_(5)
    (reading,) = read_all([transport.reader("engine 0")], 1)
    assert same(reading.found, weights_of(1))
    assert transport.same(weights_of(1), 1) and not transport.same(weights, 1) and not transport.same(weights_of(1), 0)
    with pytest.raises(ProcessError, match="do not fit"):
        transport.write({"other": torch.zeros(1)}, 2)
    transport.close()


def test_nobody_sends_and_the_reader_says_so_at_its_deadline() -> None:
    transport = controller(deadline_s=0.2)
    assert not transport.holds(0) and not transport.passed(0)
    with pytest.raises(NotYet, match=r"nobody sends it for 0\.2 s"), transport.reader("engine 0").reading(0):
        pass
    transport.close()


@pytest.mark.parametrize("told", [True, False])
def test_one_that_is_gone_is_not_waited_for_and_one_that_hangs_not_for_ever(told: bool) -> None:
    """With a deadline of 60 s the test would not end in time if the controller's word did nothing."""
    transport = controller(deadline_s=60.0 if told else 1.0)
    readers = [transport.reader(f"engine {index}") for index in range(2)]
    transport.write(weights_of(1), 1)
    read_all(readers, 1)
    transport.write(weights_of(2), 2)
    reading = Reading(readers[0], 2)
    if told:
        assert waits(lambda: transport._meeting.count("asked", 0) == 3) and not reading.found, "it waits for the other one"
        transport.gone("engine 1")
    assert reading.ended(20.0) and same(reading.found, weights_of(2))
    again = transport.reader("engine 1")
    (late,) = read_all([again], 2)
    assert same(late.found, weights_of(2)), "its next process is another member"
    transport.close()


def receive_and_die(channel: Any, reader: BroadcastWeights, how: int) -> None:
    """An engine that is lost once the first bytes of a version are there."""
    plain = broadcast_weights.Group.broadcast

    def dying(self: Any, flat: torch.Tensor, bucket_bytes: int) -> None:
        plain(self, flat[:bucket_bytes], bucket_bytes)
        os.kill(os.getpid(), how)

    broadcast_weights.Group.broadcast = dying  # type: ignore[method-assign]
    with reader.reading(1):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_reader_that_is_lost_in_the_middle_costs_the_others_a_second_try(how: signal.Signals) -> None:
    transport = controller(deadline_s=60.0 if how is signal.SIGKILL else 4.0)
    well, ill = transport.reader("engine 0"), transport.reader("engine 1")
    child = Child(Launch("engine 1", receive_and_die, (ill, how)))
    assert waits(lambda: transport._meeting.count("asked", 0) == 1) or child.channel.wait(60.0)
    reading = Reading(well, 1, times=3)
    assert waits(lambda: transport._meeting.count("asked", 0) == 2)
    transport.write(weights_of(1), 1)
    assert reading.ended(40.0) and same(reading.found, weights_of(1))
    assert len(reading.errors) >= 1 and "a broadcast to 2 engines failed" in reading.errors[0], "it was a member of the first try"
    assert "engine 0 #1, engine 1 #1" in str(transport._meeting.get(broadcast_sender.TROUBLE))
    child.close()
    transport.close()


def write_and_die(channel: Any, transport: BroadcastWeights) -> None:
    """A trainer that is killed when it has sent a part of a version."""
    plain = broadcast_sender.Group.broadcast

    def dying(self: Any, flat: torch.Tensor, bucket_bytes: int) -> None:
        plain(self, flat[:bucket_bytes], bucket_bytes)
        os.kill(os.getpid(), signal.SIGKILL)

    broadcast_sender.Group.broadcast = dying  # type: ignore[method-assign]
    transport.write(weights_of(1), 1)
    channel.wait(None)


def test_a_writer_that_dies_in_the_middle_leaves_nothing_half_and_the_next_one_serves_the_same() -> None:
    transport = controller(deadline_s=60.0)
    reader = transport.reader("engine 0")
    child = Child(Launch("trainer", write_and_die, (transport,)))
    (reading,) = read_all([reader], 1)
    assert reading.found == {} and "a broadcast to 1 engines failed" in reading.errors[0]
    assert child.kill(grace_s=30.0) == "ended by SIGKILL"
    assert transport.holds(1) and transport.same(weights_of(1), 1), "what it has to be is known"
    waiting = Reading(reader, 1)
    transport.write(weights_of(1), 1)
    assert waiting.ended() and same(waiting.found, weights_of(1))
    child.close()
    transport.close()


def test_a_copy_for_another_process_meets_at_the_same_store() -> None:
    transport = controller()
    copy = pickle.loads(pickle.dumps(transport.reader("engine 0")))
    assert (copy._port, copy._member, copy._opened) == (transport._port, "engine 0 #1", None)
    transport.write(weights_of(4), 4)
    assert same(dict(copy.view(4)), weights_of(4)) and copy.view(4).transport is copy
    transport.close()
