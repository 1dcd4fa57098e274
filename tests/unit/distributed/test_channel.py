"""Messages between processes: whole, in order, never waited for, and damage is noticed."""

from __future__ import annotations

import pickle
import socket
import struct
import zlib

import numpy as np
import pytest

from april.distributed.channel import Channel, Closed


def pair() -> tuple[Channel, Channel]:
    ours, theirs = Channel.pair()
    return Channel(ours), Channel(theirs)


def received(channel: Channel, count: int) -> list[object]:
    messages: list[object] = []
    while len(messages) < count:
        assert channel.wait(10.0), "nothing comes"
        messages += channel.receive()
    return messages


def test_messages_come_in_order_and_large_ones_do_not_block_the_sender() -> None:
    one, other = pair()
    big = np.arange(3_000_000)  # far more than a socket holds; nobody reads yet
    for message in ("first", big, "last"):
        one.send(message)
    first, middle, last = received(other, 3)
    assert (first, last) == ("first", "last") and np.array_equal(middle, big)  # type: ignore[arg-type]
    assert other.receive() == [] and not other.wait(0)
    one.close(), other.close()


def test_what_was_sent_before_the_end_is_still_received() -> None:
    one, other = pair()
    one.send(1)
    one.flush(5.0)
    one.close()
    assert received(other, 1) == [1]
    with pytest.raises(Closed, match=r"it closed the connection$"):
        received(other, 1)
    other.send(2)  # to nobody: no error here, the end is told by receive
    other.close()


def frame(message: object, checksum: int | None = None) -> bytes:
    payload = pickle.dumps(message)
    return header(payload, zlib.crc32(payload) if checksum is None else checksum) + payload


def header(payload: bytes, checksum: int) -> bytes:
    sizes = struct.pack("<QI", len(payload), checksum)
    return sizes + struct.pack("<I", zlib.crc32(sizes))


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (frame("x")[:-1], "in the middle of a message"),
        (frame("x", checksum=1), "a damaged message .the checksum differs"),
        (header(b"abc", zlib.crc32(b"abc")) + b"abc", "a damaged message"),
    ],
)
def test_damage_is_noticed_behind_what_came_whole(sent: bytes, told: str) -> None:
    end, raw = socket.socketpair()
    channel = Channel(end)
    raw.sendall(frame("whole") + sent)
    raw.close()
    assert received(channel, 1) == ["whole"]
    with pytest.raises(Closed, match=told):
        channel.receive()
    channel.close()


def test_a_damaged_length_is_told_at_once_and_not_waited_for() -> None:
    end, raw = socket.socketpair()
    channel = Channel(end)
    damaged = bytearray(frame("x"))
    damaged[3] ^= 0x40  # 1 GiB more
    raw.sendall(frame("whole") + damaged)
    assert received(channel, 1) == ["whole"]
    with pytest.raises(Closed, match=r"a damaged message .the checksum of its header differs"):
        channel.receive()
    raw.close()
    channel.close()


def test_closing_frees_a_writer_that_nobody_reads() -> None:
    one, other = pair()
    one.send(np.zeros(3_000_000))
    one.close()
    assert not one._writer.is_alive()
    with pytest.raises(Closed):
        while True:
            other.wait(5.0)
            other.receive()
    other.close()
