"""Weights that tell who made them, and engines whose tokens tell which weights they have."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from process_helpers import LIMITS, Stepped, ThreadChild

from april.core.clock import WallClock
from april.core.ids import Version
from april.core.sample import Sample
from april.distributed.broadcast_weights import BroadcastWeights
from april.distributed.child import Launch
from april.distributed.disk_weights import DiskWeights
from april.distributed.layout import Layout
from april.distributed.remote_engine import RemoteEngine
from april.distributed.shared_weights import WeightBuffer
from april.distributed.transport import WeightTransport
from april.engines.base import UpdateMode, Weights
from april.engines.scripted import Reply

TRANSPORTS = ("shared_memory", "disk", "broadcast")


def weights_of(number: float) -> dict[str, torch.Tensor]:
    """Tensors of several types and shapes that hold one number."""
    return {
        "matrix": torch.full((6, 5), float(number)),
        "vector": torch.full((7,), number, dtype=torch.float64),
        "half": torch.full((3,), number, dtype=torch.bfloat16),
        "none": torch.empty(0),
        "scale": torch.tensor(float(number)),
    }


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def transport_named(name: str, folder: Path, deadline_s: float = 20.0) -> WeightTransport:
    """A transport for `weights_of`; broadcasts are sent in many small buckets."""
    layout = Layout.of(weights_of(0))
    if name == "disk":
        return DiskWeights(folder / "weights", layout)
    if name == "broadcast":
        return BroadcastWeights(layout, bucket_bytes=64, deadline_s=deadline_s)
    return WeightBuffer(layout)


def in_thread(launch: Launch) -> ThreadChild:
    """An engine's process as a thread, with a transport of its own as a process would have."""
    arguments = tuple(_own(argument) for argument in launch.arguments)
    return ThreadChild(Launch(launch.name, launch.main, arguments, launch.threads))


def _own(argument: Any) -> Any:
    if isinstance(argument, DiskWeights):
        return pickle.loads(pickle.dumps(argument))
    return argument


class Marked(Stepped):
    """An engine whose tokens are the number that its weights hold."""

    def __init__(self, length: int = 12, pause_s: float = 0.0) -> None:
        super().__init__(length, pause_s=pause_s, max_running=2)
        self._number = -1
        self._replies = lambda _sample: Reply((self._number,) * length)

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        """Look at all of the weights."""
        found = {float(tensor.double().min()) for tensor in weights.values() if tensor.numel()}
        found |= {float(tensor.double().max()) for tensor in weights.values() if tensor.numel()}
        if len(found) != 1:
            raise ValueError(f"half a version: {found}")
        self._number = int(found.pop())
        super().update_weights(weights, version, mode)


def make_marked(pause_s: float, clock: WallClock) -> Marked:
    return Marked(pause_s=pause_s)


def marked(name: str, transport: WeightTransport, pause_s: float = 0.0, **limits: Any) -> RemoteEngine:
    """A `Marked` engine, remote, in a thread."""
    return RemoteEngine(
        lambda clock: make_marked(pause_s, clock),
        clock=WallClock(),
        limits=LIMITS.model_copy(update=limits),
        transport=transport,
        name=name,
        spawn=in_thread,
    )


def tokens_of(sample: Sample) -> set[int]:
    """The different tokens of a sample: the numbers of the weights that made it."""
    return set(sample.token_ids.tolist())
