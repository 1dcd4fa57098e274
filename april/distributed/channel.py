"""Messages between two processes of one machine; neither side ever waits for the other to read.

    send -> queue -> writer thread -> socket ......... socket -> receive, which takes what has come

Each message is a pickle behind its length and CRC-32, so a damaged one is noticed and not obeyed.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import socket
import struct
import threading
import zlib
from typing import Any

from april.core.clock import readable

_HEADER = struct.Struct("<QI")
"""Length of the payload and its CRC-32."""
_CHUNK_BYTES = 1 << 20


class Closed(Exception):
    """The other side is gone, or what it sent cannot be understood; the message says which."""


class Channel:
    """One end of a connection.

    Args:
        end: a connected stream socket, owned by the channel from now on.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._inbox, self._outbox = end, bytearray(), queue.SimpleQueue[bytes | None]()
        self._end: str | None = None
        self._writer = threading.Thread(target=self._write, name="april-channel", daemon=True)
        self._writer.start()

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """Two connected ends."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def send(self, message: Any) -> None:
        """Hand over a message; returns at once. To an end that is gone it is lost, which `receive` tells."""
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._outbox.put(_HEADER.pack(len(payload), zlib.crc32(payload)) + payload)

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

    def wait(self, timeout_s: float | None) -> bool:
        """Whether something can be read within this time."""
        return self._end is not None or readable([self._socket], timeout_s)

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
            length, checksum = _HEADER.unpack_from(self._inbox, at)
            start, end = at + _HEADER.size, at + _HEADER.size + length
            if end > len(self._inbox):
                break
            payload = bytes(memoryview(self._inbox)[start:end])
            try:
                if zlib.crc32(payload) != checksum:
                    raise ValueError("the checksum differs")
                messages.append(pickle.loads(payload))
            except Exception as error:  # pickle raises errors of many kinds
                self._end = f"it sent a damaged message ({error})"
                self._inbox.clear()
                return messages
            at = end
        del self._inbox[:at]
        return messages
