"""Weights through Ray's object store: written once, moved to each node once, read in place there.

    trainer   write --> shelf ...... Host.collect (an object of the board's) <-- Board, on the controller's node
    engine    reading <-- the object: the copy of its node, made by the first reader there

The board holds the newest two versions, whole, on its own node too: a version outlives whoever wrote it, and one that is
held by nobody any more is freed by Ray.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from april.core.errors import ProcessError
from april.core.ids import Version
from april.distributed.bounded import bounded
from april.distributed.layout import Layout
from april.distributed.transport import Moved, NotYet, PublishedWeights, Transfers

NUM_KEPT = 2
_ANSWER_S = 60.0
"""How long the board, which computes nothing, may take to answer."""
_MOVE_S = 600.0
"""How long a version may take from one node to another."""
_shelf: dict[str, npt.NDArray[np.uint8]] = {}


def take_from_shelf(key: str) -> npt.NDArray[np.uint8]:
    """What `RayWeights.write` has left in this process."""
    return _shelf.pop(key)


class Board:
    """The newest versions, and where ranks meet; an actor on the controller's node."""

    def __init__(self) -> None:
        self._held: dict[Version, tuple[Any, Any]] = {}
        self._notes: dict[str, str] = {}
        self._lock = threading.Lock()

    def post(self, version: Version, writer: Any, key: str) -> None:
        """Take a version over from the actor that has written it."""
        self.keep(version, [writer.collect.remote(key)])

    def keep(self, version: Version, references: list[Any]) -> None:
        """Hold an object of our own, or of the controller's, as a version."""
        value = ray.get(references[0])  # held here, so it lies on this node as long as it may be asked for
        with self._lock:
            self._held.pop(version, None)
            self._held[version] = (references[0], value)
            for former in list(self._held)[:-NUM_KEPT]:
                del self._held[former]

    def versions(self) -> list[Version]:
        """Those that can be read, the newest last."""
        with self._lock:
            return list(self._held)

    def get(self, version: Version) -> list[Any]:
        """The object of a version, in a list, so that it is not read on the way; an empty one where there is none."""
        with self._lock:
            return [self._held[version][0]] if version in self._held else []

    def note(self, key: str, text: str | None = None) -> str | None:
        """Write down a word for others, or read it."""
        if text is not None:
            self._notes[key] = text
        return self._notes.get(key)


class RayWeights:
    """See `WeightTransport`.

    Args:
        layout: of the tensors.
        board: name of the board's actor.
    """

    name = "object_store"
    outlives_writer = True

    def __init__(self, layout: Layout, board: str) -> None:
        self.layout, self._board_name = layout, board
        self._found: Any = None
        self._transfers = Transfers()
        self.took, self.take_metrics = self._transfers.took, self._transfers.take_metrics

    def __reduce__(self) -> tuple[Any, ...]:
        return (RayWeights, (self.layout, self._board_name))

    def _ask(self, method: str, *arguments: Any, timeout_s: float = _ANSWER_S) -> Any:
        """Call the board.

        Raises:
            ConnectionError: it does not answer this actor; another one may do better.
            ProcessError: it does not answer the controller.
        """
        try:
            self._found = self._found or find_board(self._board_name)
            return ask_board(self._found, method, *arguments, timeout_s=timeout_s)
        except ConnectionError as error:
            raise _for_this_process(error) from None

    def holds(self, version: Version) -> bool:
        """Whether the board has this version."""
        return version in self._ask("versions")

    def passed(self, version: Version) -> bool:
        """Whether the board has two newer ones in its place."""
        held = self._ask("versions")
        return version not in held and any(other > version for other in held)

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor], version: Version) -> Moved:
        """Copy weights into one block and hand it to the board; returns when it is on the board's node.

        Raises:
            ProcessError: they are other tensors than those of the policy.
        """
        start_s = time.perf_counter()
        block = np.empty(self.layout.num_bytes, np.uint8)
        self.layout.copy(weights, self.layout.views(torch.from_numpy(block)))
        if _in_controller():  # whose objects live as long as the run
            reference = bounded(lambda: ray.put(block), _MOVE_S, f"store version {version} of the weights")
            self._ask("keep", version, [reference], timeout_s=_MOVE_S)
        else:
            key = f"{os.getpid()}-{version}-{time.monotonic_ns()}"
            _shelf[key] = block
            self._ask("post", version, ray.get_runtime_context().current_actor, key, timeout_s=_MOVE_S)
        return Moved(time.perf_counter() - start_s, self.layout.num_bytes)

    def same(self, weights: Mapping[str, Tensor], version: Version) -> bool:
        """Whether these weights are those of a version that the board has, bit for bit."""
        held = self.view(version)
        return weights.keys() == held.keys() and all(torch.equal(tensor.cpu(), held[name]) for name, tensor in weights.items())

    def view(self, version: Version) -> PublishedWeights:
        """A version by name; read where it is looked at.

        Raises:
            ProcessError: the board does not have it.
        """
        held = self._ask("versions")
        if version not in held:
            raise _missing(version, held)
        return PublishedWeights(self, version, lambda: self._read(version), self.layout.num_bytes)

    @contextmanager
    def reading(self, version: Version) -> Iterator[PublishedWeights]:
        """The tensors of a version, in the memory of this node.

        Raises:
            NotYet: it was passed.
            ProcessError: the board does not have it, or it cannot be brought to the controller.
            ConnectionError: it cannot be brought to this actor; another one may do better.
        """
        tensors = self._read(version)
        yield PublishedWeights(self, version, lambda: tensors, self.layout.num_bytes)

    def _read(self, version: Version) -> dict[str, Tensor]:
        found = self._ask("get", version)
        if not found:
            raise _missing(version, self._ask("versions"))
        try:
            return tensors_in(ray.get(found[0], timeout=_MOVE_S), self.layout)
        except RayError as error:
            what = f"version {version} of the weights could not be read: {str(error).splitlines()[0]}"
            raise _for_this_process(ConnectionError(what)) from None

    def reader(self, name: str) -> RayWeights:
        """The same for every engine."""
        return self

    def gone(self, name: str) -> None:
        """Nobody waits for a reader."""

    def close(self) -> None:
        """The board ends with the cluster's connection."""


def tensors_in(block: npt.NDArray[np.uint8], layout: Layout) -> dict[str, Tensor]:
    """The tensors that lie in a block, not copied; not to be written where the block is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        whole = torch.frombuffer(block, dtype=torch.uint8)
    return layout.views(whole)


def start_board(name: str) -> Any:
    """Make the board, on this node; it ends when the handle that comes back does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_concurrency=8)(Board)
    return actor.options(name=name, scheduling_strategy=here).remote()


def find_board(name: str) -> Any:
    """The board of this name.

    Raises:
        ConnectionError: it cannot be found.
    """
    try:
        return bounded(lambda: ray.get_actor(name), _ANSWER_S, "find the board of the run")
    except (RayError, ValueError, ProcessError) as error:
        raise _silent(error) from None


def ask_board(board: Any, method: str, *arguments: Any, timeout_s: float = _ANSWER_S) -> Any:
    """Call the board and wait for its answer.

    Raises:
        ConnectionError: it does not answer.
    """
    try:
        return ray.get(getattr(board, method).remote(*arguments), timeout=timeout_s)
    except (RayError, ValueError) as error:
        raise _silent(error) from None


def _silent(error: Exception) -> ConnectionError:
    told = error.got if isinstance(error, ProcessError) else (str(error).splitlines() or [type(error).__name__])[0]
    return ConnectionError(f"the board of the run does not answer ({told})")


def _in_controller() -> bool:
    return ray.get_runtime_context().get_actor_id() is None


def _for_this_process(error: ConnectionError) -> Exception:
    """An actor that cannot reach others is started again; the controller's run ends, with a word."""
    if not _in_controller():
        return error
    return ProcessError(
        "the weights on the Ray cluster cannot be reached",
        where="backend",
        got=str(error),
        hint="the board is on the controller's node: `ray status` there; `april train --resume FOLDER` goes on",
    )


def _missing(version: Version, held: list[Version]) -> ProcessError:
    kind = NotYet if any(other > version for other in held) else ProcessError  # passed: its reader is told of a newer one
    return kind(
        "a version of the weights is not in the object store",
        where=f"version {version}",
        got=f"versions {held}",
        expected="a version that was written whole",
    )
