"""The ranks of a sharded trainer: processes that share weights and work, and how they find and hear each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from april.core.errors import ModelError

DATA_AXIS = "data"
"""Name of the mesh axis over which weights are sharded and samples are dealt out."""


@dataclass(frozen=True)
class Ranks:
    """One process's place among all of them.

    Attributes:
        index, count: this rank, and how many there are.
        device: that this rank computes on.
        mesh: all ranks along the axis "data".
        control: a gloo group for numbers and small objects in CPU memory.
    """

    index: int
    count: int
    device: torch.device
    mesh: DeviceMesh
    control: Any

    @staticmethod
    def join(
        index: int,
        count: int,
        rendezvous: str | dist.Store,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        device_number: int | None = None,
        backend: Literal["auto", "gloo", "nccl"] = "auto",
        timeout_s: float = 1800.0,
    ) -> Ranks:
        """Meet the other ranks; returns when all have come.

        Args:
            index: of this rank.
            count: of all ranks.
            rendezvous: where they meet, as `torch.distributed` reads it: `file:///PATH` of a file that does not exist yet, or
                `tcp://HOST:PORT`; or a store that all of them have.
            device: kind of device.
            device_number: of the CUDA device; the rank's own number where all ranks are on one machine.
            backend: of the collectives between devices.
            timeout_s: longest wait for the others, at any time.

        Raises:
            ModelError: there is no such CUDA device.
        """
        place = torch.device("cpu")
        if device == "cuda":
            number = index if device_number is None else device_number
            if number >= torch.cuda.device_count():
                raise ModelError(
                    "each rank needs a CUDA device of its own",
                    where="training.ranks",
                    got=f"rank {index} of {count}, {torch.cuda.device_count()} devices",
                    hint='lower training.ranks, or set model.device = "cpu"',
                )
            place = torch.device("cuda", number)
            torch.cuda.set_device(place)
        nccl = device == "cuda" and backend != "gloo"
        timeout = timedelta(seconds=timeout_s)
        where: dict[str, Any] = {"init_method": rendezvous}
        if isinstance(rendezvous, dist.Store):
            rendezvous.set_timeout(timeout)
            where = {"store": rendezvous}
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", rank=index, world_size=count, timeout=timeout, **where)
        control = dist.new_group(backend="gloo") if nccl else dist.group.WORLD
        return Ranks(index, count, place, init_device_mesh(device, (count,), mesh_dim_names=(DATA_AXIS,)), control)

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.index == 0

    def leave(self) -> None:
        """End the connection to the others."""
        dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank; picklable."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.control)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a CPU tensor over all ranks, in place."""
        dist.all_reduce(tensor, group=self.control)
        return tensor

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.barrier(group=self.control)


def deal(weights: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal out pieces of work so that ranks are even: the heaviest first, each to the rank that has least.

    The heaviest rank has at most 4/3 of the best possible (Graham 1969, "Bounds on multiprocessing timing anomalies").

    Args:
        weights: of each piece, above 0.
        num_ranks: how many share the work.

    Returns:
        For each rank ascending indices into `weights`; each index occurs once, and a rank has none only when the pieces are
        fewer than the ranks.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        shares[rank].append(index)
        loads[rank] += weights[index]
    return [sorted(share) for share in shares]
