"""What a broadcast needs of `torch.distributed`: a store to meet through, and a group that sends flat memory in buckets.

Groups are made from their classes, beside the default group that ranks of a trainer may have, and as often as members change.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ANSWER = timedelta(seconds=60.0)
"""How long the store, which computes nothing, may take to answer."""


class Meeting:
    """A connection to the store through which members meet: small values by name. One thread uses it at a time.

    Args:
        host: address that the store is on.
        port: of the store; one is opened in this process when left out, and ends with this object.
    """

    def __init__(self, host: str, port: int | None = None) -> None:
        self.host, self.store = host, open_store(host, port)
        self.port = int(self.store.port)

    def put(self, key: str, value: Any) -> None:
        """Set a value."""
        self.store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """A value; None where there is none."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def take(self, key: str) -> Any:
        """A value, which is removed; None where there is none."""
        value = self.get(key)
        if value is not None:
            self.store.delete_key(key)
        return value

    def count(self, key: str, by: int = 1) -> int:
        """A counter after adding to it."""
        return int(self.store.add(key, by))


def open_store(host: str, port: int | None = None, timeout: timedelta = _ANSWER) -> dist.TCPStore:
    """The store at an address; one is opened in this process where the port is left out, and ends with this object.

    The port of a new one is listened at from the first moment, so no other process can get it meanwhile.
    """
    if port is not None:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    with socket.create_server((host, 0), backlog=1024) as listening:  # on this address only
        port = int(listening.getsockname()[1])
        fd = listening.detach()
    return dist.TCPStore(host, port, is_master=True, master_listen_fd=fd, wait_for_workers=False, timeout=timeout)


class Group:
    """One sender, of rank 0, and those that receive.

    Args:
        meeting: that all members meet through.
        number: of the group; never used twice.
        rank: of this member.
        size: how many members.
        device: of the memory that is sent: gloo for a CPU, NCCL for CUDA.
        timeout_s: longest wait for the others, to meet them and for each bucket.

    Raises:
        RuntimeError: somebody did not come.
    """

    def __init__(self, meeting: Meeting, number: int, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self.number, self.size, self._device, self._timeout = number, size, device, timedelta(seconds=timeout_s)
        store = dist.PrefixStore(f"group/{number}", meeting.store.clone())
        store.set_timeout(self._timeout)
        self._group = self._nccl(store, rank) if device.type == "cuda" else self._gloo(store, rank, meeting.host)

    def _gloo(self, store: Any, rank: int, host: str) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = self._timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        return dist.ProcessGroupGloo(store, rank, self.size, options)

    def _nccl(self, store: Any, rank: int) -> Any:
        torch.cuda.set_device(self._device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return dist.ProcessGroupNCCL(store, rank, self.size, options)

    def broadcast(self, flat: Tensor, bucket_bytes: int) -> None:
        """Send or receive flat memory, uint8 (bytes,), one bucket after the other.

        Raises:
            RuntimeError: a member is gone, or late.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._timeout
        for start in range(0, flat.numel(), bucket_bytes):
            self._group.broadcast([flat[start : start + bucket_bytes]], options).wait(self._timeout)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def wait_until(ready: Callable[[], bool], timeout_s: float, pause_s: float = 0.002) -> bool:
    """Ask again and again until something is ready, less and less often; whether it was, in time."""
    end_s = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() >= end_s:
            return False
        time.sleep(pause_s)
        pause_s = min(0.02, 1.1 * pause_s)
    return True


def first_line(error: BaseException) -> str:
    """The beginning of what a library says."""
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
