"""Actors in place of child processes, and weights in the object store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray", reason="the extra april-rl[ray] is not installed")
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError  # noqa: E402

from april.config.placement import PlacementConfig  # noqa: E402
from april.core.errors import EngineError, ProcessError  # noqa: E402
from april.distributed import ray_child, ray_cluster, ray_weights  # noqa: E402
from april.distributed.channel import Closed, pack  # noqa: E402
from april.distributed.child import Failed, Launch  # noqa: E402
from april.distributed.layout import Layout  # noqa: E402
from april.distributed.ray_child import LARGE_BYTES, ActorChild, reason_of, settled  # noqa: E402
from april.distributed.ray_cluster import Meeting, RayCluster, connect  # noqa: E402
from april.distributed.ray_host import Mailbox  # noqa: E402
from april.distributed.ray_weights import RayWeights  # noqa: E402

SIZE = 5_000
WEIGHTS = {"a": torch.zeros(SIZE), "b": torch.zeros(3, 7, dtype=torch.bfloat16), "none": torch.zeros(0)}


# -- what needs no cluster ------------------------------------------------------------------------------------------------


def test_frames_that_overtake_others_wait_for_them() -> None:
    mailbox = Mailbox()
    mailbox.put(1, pack("second"))
    assert not mailbox.wait(0.0) and mailbox.receive() == []
    mailbox.put(0, pack("first"))
    assert mailbox.wait(1.0) and mailbox.receive() == ["first", "second"]
    assert not mailbox.wait(0.0)


def test_a_damaged_frame_ends_the_part_after_what_came_before() -> None:
    mailbox, frame = Mailbox(), bytearray(pack("third"))
    frame[-1] ^= 1
    mailbox.put(0, pack("first"))
    mailbox.put(1, bytes(frame))
    assert mailbox.wait(1.0) and mailbox.receive() == ["first"]
    with pytest.raises(Closed, match="damaged message"):
        mailbox.receive()


def test_what_a_part_sends_is_taken_at_once_and_its_end_is_told() -> None:
    mailbox = Mailbox()
    mailbox.send("one")
    mailbox.send("two")
    assert mailbox.take(0.0) == (pack("one") + pack("two"), False)
    assert mailbox.take(0.0) == (b"", False)
    mailbox.flush(1.0)
    assert mailbox.take(0.0) == (b"", True)


NODE = "The actor is dead because its node has died. Node Id: 00ab\n\tthe actor's node was terminated unexpectedly."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"The actor died unexpectedly before finishing this task.\n\tip: 10.0.0.3\n{NODE}", "its node died (10.0.0.3)"),
        (
            "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
            "unexpectedly exits with a connection error code 2. End of file. Some common causes",
            "its process died (Worker unexpectedly exits with a connection error code 2)",
        ),
        (
            "The actor died because of an error raised in its creation task, x\nImportError: no april",
            "its actor could not be made (ImportError: no april)",
        ),
        ("The actor is dead because it was killed by `ray.kill`.", "its actor died (it was killed by `ray.kill`)"),
    ],
)
def test_reasons_in_few_words(text: str, told: str) -> None:
    class Died(ActorDiedError):
        def __str__(self) -> str:
            return text

    assert reason_of(Died()) == told
    assert reason_of(GetTimeoutError("late")) == "its actor failed (GetTimeoutError: late)"


def test_an_actor_that_cannot_be_reached_is_asked_about_until_it_is_known_why() -> None:
    away, died = ActorUnavailableError("Socket closed", None), ActorDiedError()
    answers: list[Any] = [away, away, died]

    def ask() -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    assert settled(away, ask, pause_s=0.0) is died and not answers
    assert settled(died, ask) is died, "nothing is asked where it is known"
    answers = [away, None, died]
    assert settled(away, ask, pause_s=0.0) is away and answers == [died], "it is there again, but what it said may be lost"
    answers = [GetTimeoutError("late"), died]
    assert settled(away, ask, pause_s=0.0) is away and answers == [died], "silence says nothing new"
    assert settled(away, ask, wait_s=0.0) is away, "not for ever"


@pytest.fixture
def silence() -> Iterator[Any]:
    """A call of Ray's that does not come back before the test is over."""
    over = threading.Event()
    yield lambda *_arguments, **_options: over.wait()
    over.set()


def test_a_cluster_that_does_not_answer_is_not_waited_for_longer_than_its_deadline(
    monkeypatch: pytest.MonkeyPatch, silence: Any
) -> None:
    monkeypatch.setattr(ray, "init", silence)
    monkeypatch.setattr(ray_cluster, "_CONNECT_S", 0.05)
    with pytest.raises(ProcessError, match=r"Ray does not answer\n.*\n.*nothing for 0.05 s, to connect to 10.0.0.1:6379"):
        connect(PlacementConfig(address="10.0.0.1:6379"), {"trainer": 1, "engine": 1}, 1)


def test_the_end_of_a_run_does_not_wait_for_a_cluster_that_is_silent(monkeypatch: pytest.MonkeyPatch, silence: Any) -> None:
    forgotten: list[Any] = []
    monkeypatch.setattr(ray_cluster, "connect", lambda *_arguments: True)
    monkeypatch.setattr(ray_cluster, "_CLOSE_S", 0.05)
    monkeypatch.setattr(ray_weights, "start_board", lambda _name: "board")
    monkeypatch.setattr(RayCluster, "_reserve", lambda _self: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_cluster.atexit, "unregister", forgotten.append)
    for name in ("kill", "shutdown"):
        monkeypatch.setattr(ray, name, silence)
    RayCluster(PlacementConfig(), {"trainer": 1}, 1).close()
    assert forgotten == [silence], "nor does the end of the process"


@pytest.mark.parametrize("actor", [None, "00ab"])
def test_a_board_that_is_not_found_ends_a_run_with_a_word_and_an_actor_for_another(
    monkeypatch: pytest.MonkeyPatch, silence: Any, actor: str | None
) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: actor))
    monkeypatch.setattr(ray_weights, "_ANSWER_S", 0.05)
    weights = RayWeights(Layout.of(WEIGHTS), "april-board-0")
    for get_actor, told in ((silence, "nothing for 0.05 s, to find the board"), (_no_actor, "no such actor")):
        monkeypatch.setattr(ray, "get_actor", get_actor)
        with pytest.raises(ProcessError if actor is None else ConnectionError, match=told):
            weights.holds(1)


def _no_actor(_name: str) -> Any:
    raise ValueError("no such actor")


def test_the_board_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    board = SimpleNamespace(versions=SimpleNamespace(remote=lambda: [3, 4]))
    monkeypatch.setattr(ray, "get_actor", lambda name: (found.append(name), board)[1])
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    weights = RayWeights(Layout.of(WEIGHTS), "april-board-0")
    assert weights.holds(3) and weights.passed(2) and found == ["april-board-0"]


def test_ranks_meet_at_a_port_that_nobody_else_can_get_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the address is told, the port is listened at already."""
    notes: dict[str, str] = {}

    def ask(_board: Any, _method: str, key: str, text: str | None = None) -> str | None:
        if text is not None:
            host, _, port = text.rpartition(":")
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((host, int(port)))
            notes[key] = text
        return notes.get(key)

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(ray_weights, "find_board", lambda _name: None)
    monkeypatch.setattr(ray_weights, "ask_board", ask)
    meeting = Meeting("april-board-0", "first")
    opened, found = meeting(0), meeting(1)
    opened.set("word", "of rank 0")
    assert found.get("word") == b"of rank 0" and list(notes) == ["first"]


# -- on a cluster of this machine -----------------------------------------------------------------------------------------


def answer(channel: Any, number: int) -> None:
    """A part that counts bytes, until it is told to end."""
    channel.send((number, os.environ["OMP_NUM_THREADS"], os.getcwd()))
    while True:
        channel.wait(None)
        for message in channel.receive():
            if message == "end":
                return
            if message == "raise":
                raise KeyError("unlucky")
            if message == "refuse":
                raise EngineError("no room")
            channel.send(message if isinstance(message, int) else len(message))


def read_weights(channel: Any, weights: Any) -> None:
    """A part that reads versions by their numbers, or writes one."""
    while True:
        channel.wait(None)
        for what, version in channel.receive():
            if what == "write":
                weights.write({name: torch.full_like(tensor, version) for name, tensor in WEIGHTS.items()}, version)
                channel.send("written")
                continue
            try:
                with weights.reading(version) as found:
                    channel.send({name: set(tensor.flatten().tolist()) for name, tensor in found.items()})
            except ProcessError as error:
                channel.send(error)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    sys.path.append(str(Path(__file__).parent))  # actors import this file, too
    made = RayCluster(PlacementConfig(timeout_s=60), {"trainer": 2, "engine": 2}, 1 << 20)
    yield made
    made.close()
    sys.path.remove(str(Path(__file__).parent))


@contextlib.contextmanager
def child(cluster: RayCluster, main: Any, *arguments: Any, index: int = 0) -> Iterator[ActorChild]:
    made = cluster.spawn("engine", index)(Launch(f"part {index}", main, arguments, threads=3))
    try:
        yield made
    finally:
        made.close()


def received(part: ActorChild, count: int = 1) -> list[Any]:
    messages: list[Any] = []
    end_s = time.monotonic() + 60
    while len(messages) < count and time.monotonic() < end_s:
        part.channel.wait(1.0)
        messages += part.channel.receive()
    return messages


@pytest.mark.slow
def test_an_actor_answers_in_order_and_large_messages_go_to_several_at_once(cluster: RayCluster) -> None:
    with child(cluster, answer, 1) as first, child(cluster, answer, 2, index=1) as second:
        assert received(first) == [(1, "3", os.getcwd())] and received(second) == [(2, "3", os.getcwd())]
        assert first.pid != second.pid and first.alive
        for number in range(100):
            first.channel.send(number)
        assert received(first, 100) == list(range(100))
        packed = first.channel.pack(bytes(LARGE_BYTES * 3))
        assert isinstance(packed.frame, ray.ObjectRef)
        for part in (first, second):
            part.channel.send(packed)
        assert received(first) == received(second) == [LARGE_BYTES * 3]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end", "raise", "refuse"])
def test_an_actor_ends_with_its_main_function_and_says_why(cluster: RayCluster, how: str) -> None:
    with child(cluster, answer, 1) as part:
        assert len(received(part)) == 1
        part.channel.send(how)
        messages: list[Any] = []
        with pytest.raises(Closed, match="its main function returned"):
            while True:
                part.channel.wait(60)
                messages += part.channel.receive()
        assert [(type(message), message.foreign) for message in messages] == ([] if how == "end" else [(Failed, how == "raise")])
        assert how != "raise" or "KeyError: 'unlucky'" in str(messages[0].error.got)


@pytest.mark.slow
def test_an_actor_that_dies_is_closed_and_one_that_is_stopped_can_be_killed(cluster: RayCluster) -> None:
    with child(cluster, answer, 1) as part:
        assert len(received(part)) == 1
        os.kill(part.pid, signal.SIGKILL)
        with pytest.raises(Closed, match="its process died"):
            received(part)
        assert part.kill() == "" and not part.alive and not part.lost_node
    with child(cluster, answer, 1) as part:
        assert len(received(part)) == 1
        os.kill(part.pid, signal.SIGSTOP)
        part.kill()
        assert not part.alive and part.ended == "it was killed"
        end_s = time.monotonic() + 10
        while Path(f"/proc/{part.pid}/cmdline").exists() and time.monotonic() < end_s:
            time.sleep(0.05)
        assert not Path(f"/proc/{part.pid}/cmdline").exists(), "no stopped process is left"


@pytest.mark.slow
def test_an_actor_that_ray_does_not_end_in_time_is_left_with_a_word_and_ended_when_ray_answers(
    cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, kill = threading.Event(), ray.kill
    monkeypatch.setattr(ray_child, "_KILL_S", 0.05)
    monkeypatch.setattr(ray, "kill", lambda *given, **options: (ready.wait(), kill(*given, **options)))
    with child(cluster, answer, 1) as part:
        assert len(received(part)) == 1
        assert part.kill() == "Ray does not answer: nothing for 0.05 s, to end the actor of part 0" and part.alive
        ready.set()
        part._pump.join(60)
        assert not part.alive and part.ended == "it was killed"


@pytest.mark.slow
def test_versions_are_whole_the_newest_two_stay_and_outlive_their_writer(cluster: RayCluster) -> None:
    weights = cluster.weights(Layout.of(WEIGHTS))
    with child(cluster, read_weights, weights) as writer, child(cluster, read_weights, weights, index=1) as reader:
        for version in (1, 2, 3):
            writer.channel.send(("write", version))
            assert received(writer) == ["written"]
        assert [weights.holds(version) for version in (1, 2, 3, 4)] == [False, True, True, False]
        assert [weights.passed(version) for version in (1, 2, 4)] == [True, False, False]
        writer.close()
        for version in (2, 3):
            reader.channel.send(("read", version))
            assert received(reader) == [{"a": {float(version)}, "b": {float(version)}, "none": set()}]
        reader.channel.send(("read", 1))
        assert "is not in the object store" in str(received(reader)[0])
    third = {name: torch.full_like(tensor, 3) for name, tensor in WEIGHTS.items()}
    assert weights.same(third, 3) and not weights.same(third | {"a": torch.full((SIZE,), 3.5)}, 3)
    assert weights.write(third, 4).num_bytes == weights.layout.num_bytes, "the controller can write, too"
    assert np.isclose(float(weights.view(4)["a"].sum()), 3.0 * SIZE) and not weights.holds(2)
    with pytest.raises(ProcessError, match="do not fit"):
        weights.write({"a": WEIGHTS["a"]}, 5)
