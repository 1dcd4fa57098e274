"""Messages between two processes of one machine; neither side ever waits for the other to read.

    send -> queue -> writer thread -> socket ......... socket -> receive, which takes what has come

Each message is a pickle behind its length and CRC-32, and these behind a CRC-32 of their own: a damaged message is noticed
and not obeyed, and a damaged length is not waited for.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import socket
import struct
import threading
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from april.core.clock import readable

_HEADER = struct.Struct("<QII")
"""Length of the payload, its CRC-32, and the CRC-32 of these two."""
_SUMMED_BYTES = 12
_CHUNK_BYTES = 1 << 20


class Closed(Exception):
    """The other side is gone, or what it sent cannot be understood; the message says which."""


class Packed(NamedTuple):
    """A message that is ready to be sent, to any number of receivers."""

    frame: Any


def pack(message: Any) -> bytes:
    """A message as it is sent."""
    payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    sizes = struct.pack("<QI", len(payload), zlib.crc32(payload))
    return b"".join([sizes, struct.pack("<I", zlib.crc32(sizes)), payload])


def unpack(frame: bytes) -> Any:
    """The message of one whole frame.

    Raises:
        ValueError: it was damaged.
    """
    length, checksum = _sizes(frame[: _HEADER.size])
    payload = memoryview(frame)[_HEADER.size :]
    if len(payload) != length or zlib.crc32(payload) != checksum:
        raise ValueError("the checksum differs")
    return pickle.loads(payload)


def _sizes(header: bytes) -> tuple[int, int]:
    """Length and CRC-32 of a payload.

    Raises:
        ValueError: the header was damaged.
    """
    length, checksum, own = _HEADER.unpack(header)
    if zlib.crc32(header[:_SUMMED_BYTES]) != own:
        raise ValueError("the checksum of its header differs")
    return length, checksum


class Channel:
    """One end of a connection.

    Args:
        end: a connected stream socket, owned by the channel from now on.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._inbox, self._outbox = end, bytearray(), queue.SimpleQueue[Any]()
        self._end: str | None = None
        self._writer = threading.Thread(target=self._write, name="april-channel", daemon=True)
        self._writer.start()

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """Two connected ends."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def pack(self, message: Any) -> Packed:
        """A message that is made ready once, for channels of this kind to several receivers."""
        return Packed(pack(message))

    def send(self, message: Any) -> None:
        """Hand over a message, packed or not; returns at once. To an end that is gone it is lost, which `receive` tells."""
        self._outbox.put(message.frame if isinstance(message, Packed) else pack(message))

    def receive(self) -> list[Any]:
        """Messages that have come, in order; never waits.

        Raises:
            Closed: no more will come; only after everything that came whole was returned.
        """
        if self._end is None:
            self._read()
        messages = self._parsed()
        if not messages and self._end is not None:
            raise Closed(self._end)
        return messages

    def wait(self, timeout_s: float | None, others: Sequence[Any] = ()) -> bool:
        """Whether something can be read within this time, here or of `others`."""
        return self._end is not None or readable([self._socket, *others], timeout_s)

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return self._socket.fileno()

    def flush(self, timeout_s: float) -> None:
        """Wait until everything is sent; nothing can be sent afterwards."""
        self._outbox.put(None)
        self._writer.join(timeout_s)

    def close(self) -> None:
        """Drop what is not sent or read."""
        self._end = self._end or "it was closed here"
        self._outbox.put(None)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a writer that waits for the other side to read
        self._writer.join(1.0)
        self._socket.close()

    def _write(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._socket.sendall(frame)
            except OSError:
                return

    def _read(self) -> None:
        while True:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self._end = f"the connection broke ({error})"
                return
            if not chunk:
                self._end = "it closed the connection" + (" in the middle of a message" if self._has_part() else "")
                return
            self._inbox += chunk

    def _has_part(self) -> bool:
        """Whether less than a whole message lies behind the last whole one."""
        at = 0
        while at + _HEADER.size <= len(self._inbox):
            at += _HEADER.size + _HEADER.unpack_from(self._inbox, at)[0]
        return at != len(self._inbox)

    def _parsed(self) -> list[Any]:
        messages: list[Any] = []
        at = 0
        while at + _HEADER.size <= len(self._inbox):
            try:
                length, _ = _sizes(bytes(self._inbox[at : at + _HEADER.size]))
                end = at + _HEADER.size + length
                if end > len(self._inbox):
                    break
                messages.append(unpack(bytes(memoryview(self._inbox)[at:end])))
            except Exception as error:  # pickle raises errors of many kinds
                self._end = f"it sent a damaged message ({error})"
                self._inbox.clear()
                return messages
            at = end
        del self._inbox[:at]
        return messages
