"""A run's share of a Ray cluster: placement groups made from the recipe's table, and actors placed in them.

trainer ranks, engines, reward workers   one bundle of resources each, kept for the run
board                                    on the controller's node: weights, and where ranks meet
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from april.config.placement import PlacementConfig, RoleConfig
from april.core.errors import ProcessError, ResourceError
from april.distributed.bounded import bounded
from april.distributed.child import Launch

if TYPE_CHECKING:
    from torch.distributed import Store

    from april.distributed.layout import Layout
    from april.distributed.transport import WeightTransport

HostRole = Literal["trainer", "engine", "reward"]
_MIB = 1 << 20
_MEET_S = 300.0
_CONNECT_S = 120.0
"""How long Ray may take to connect to a cluster."""
_ANSWER_S = 60.0
_CLOSE_S = 10.0
"""For each step of the end: the run is over, and who does not answer is left."""


class RayCluster:
    """A connection to a cluster, and the places of one run on it.

    Args:
        placement: the recipe's table.
        counts: processes of each role.
        num_bytes: of one version of the weights.

    Raises:
        ResourceError: Ray is not installed, cannot be reached, or has no such places.
        ProcessError: it stopped answering meanwhile.
    """

    def __init__(self, placement: PlacementConfig, counts: Mapping[HostRole, int], num_bytes: int) -> None:
        self._placement, self._counts = placement, {role: count for role, count in counts.items() if count}
        self._ours = connect(placement, self._counts, num_bytes)
        self._groups: dict[HostRole, Any] = {}
        self._more: dict[str, Any] = {}
        self._board: Any = None
        self.board = f"april-board-{uuid.uuid4().hex}"
        try:
            self._reserve()
            from april.distributed.ray_weights import start_board

            self._board = bounded(lambda: start_board(self.board), _ANSWER_S, "make the board of the run")
        except BaseException:
            self.close()
            raise

    def spawn(self, role: HostRole, index: int) -> Callable[[Launch], Any]:
        """What starts a part in its place: a `Launch` to an `ActorChild`."""
        return self._starter(role, self._groups[role], index)

    def spawn_more(self, role: HostRole, name: str) -> Callable[[Launch], Any]:
        """What starts a part that the run did not begin with, in a place of its own that the cluster is asked for.

        It is not waited for: a part whose place does not come is late, as one that does not load.

        Raises:
            ProcessError: Ray does not take the request.
        """
        import ray

        make = partial(ray.util.placement_group, [getattr(self._placement, role).bundle])
        self._more[name] = bounded(make, _ANSWER_S, f"ask for a place of {name}")
        return self._starter(role, self._more[name], 0)

    def give_back(self, name: str) -> None:
        """A part that was added is gone: its place is for others."""
        import ray

        group = self._more.pop(name)
        with contextlib.suppress(ProcessError):
            bounded(lambda: ray.util.remove_placement_group(group), _CLOSE_S, f"give the place of {name} back")

    def _starter(self, role: HostRole, group: Any, index: int) -> Callable[[Launch], Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from april.distributed.ray_child import ActorChild

        config = getattr(self._placement, role)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        share = 0.5 if self._shares(role) else 1.0
        options = {
            "num_cpus": config.cpus,
            "num_gpus": config.gpus * share,
            "resources": dict(config.resources),
            "scheduling_strategy": strategy,
        }
        return lambda launch: ActorChild(launch, options)

    def weights(self, layout: Layout) -> WeightTransport:
        """What carries weights of this layout between the actors."""
        from april.distributed.ray_weights import RayWeights

        return RayWeights(layout, self.board)

    def meeting(self) -> Meeting:
        """Where ranks that are started now will meet."""
        return Meeting(self.board, uuid.uuid4().hex)

    def close(self) -> None:
        """Give the places back; end the cluster where it was started for this run."""
        import ray

        if not ray.is_initialized():
            return
        with contextlib.suppress(Exception):  # the connection may be what broke
            bounded(self._give_back, _CLOSE_S, "give the places back")
        self._groups, self._more, self._board = {}, {}, None
        if self._ours:
            try:
                bounded(ray.shutdown, _CLOSE_S, "leave the cluster")
            except ProcessError:
                atexit.unregister(ray.shutdown)  # the end of this process would wait for it once more

    def _give_back(self) -> None:
        import ray

        for group in {id(group): group for group in (*self._groups.values(), *self._more.values())}.values():
            ray.util.remove_placement_group(group)
        if self._board is not None:
            ray.kill(self._board)

    def _shares(self, role: HostRole) -> bool:
        return self._placement.devices == "shared" and role in ("trainer", "engine")

    def _reserve(self) -> None:
        """Make the placement groups and wait for them.

        Raises:
            ResourceError: no nodes have room within the time.
        """
        import ray

        until_s = time.monotonic() + self._placement.timeout_s
        wanted = groups_of(self._placement, self._counts)
        made = []
        for roles, bundles, strategy in wanted:
            make = partial(ray.util.placement_group, bundles, strategy=strategy.upper())
            group = bounded(make, self._placement.timeout_s, f"ask for the places of {', '.join(roles)}")
            made.append((roles, group))
            self._groups |= dict.fromkeys(roles, group)
        late = [group for group, (_, one) in zip(wanted, made, strict=True) if not one.wait(max(0.1, until_s - time.monotonic()))]
        if late:
            raise _no_places(late, self._placement.timeout_s)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of one trainer meet: rank 0 opens a store on its node, and writes its address on the board.

    Attributes:
        board: name of its actor.
        key: of this meeting.
    """

    board: str
    key: str

    def __call__(self, rank: int) -> Store:
        """The store, as `torch.distributed` takes it.

        Raises:
            ProcessError: rank 0 has not come.
            ConnectionError: the board, or the store, does not answer.
        """
        import ray

        from april.distributed.broadcast_group import open_store
        from april.distributed.ray_weights import ask_board, find_board

        board, timeout = find_board(self.board), timedelta(seconds=_MEET_S)
        if rank == 0:
            host = ray.util.get_node_ip_address()
            store = open_store(host, timeout=timeout)
            ask_board(board, "note", self.key, f"{host}:{store.port}")
            return store
        until_s = time.monotonic() + _MEET_S
        while time.monotonic() < until_s:
            if found := ask_board(board, "note", self.key):
                host, _, port = found.rpartition(":")
                return open_store(host, int(port), timeout)
            time.sleep(0.1)
        raise ProcessError("the ranks of a trainer did not meet", where=f"rank {rank}", got="no word of rank 0")


Groups = list[tuple[tuple[HostRole, ...], list[dict[str, float]], str]]


def groups_of(placement: PlacementConfig, counts: Mapping[HostRole, int]) -> Groups:
    """The placement groups of a run: whose, the bundle of each process, and the strategy."""
    groups: Groups = []
    rest: list[HostRole] = ["trainer", "engine", "reward"]
    if placement.devices == "shared":
        trainer, engine = placement.trainer, placement.engine
        both = {**trainer.bundle, **engine.bundle, "CPU": trainer.cpus + engine.cpus}
        for name in trainer.resources.keys() & engine.resources.keys():
            both[name] = trainer.resources[name] + engine.resources[name]
        groups.append((("trainer", "engine"), [both] * max(counts["trainer"], counts["engine"]), trainer.strategy))
        rest = ["reward"]
    for role in rest:
        if counts.get(role):
            config: RoleConfig = getattr(placement, role)
            groups.append(((role,), [config.bundle] * counts[role], config.strategy))
    return groups


def connect(placement: PlacementConfig, counts: Mapping[HostRole, int], num_bytes: int) -> bool:
    """Connect this process to the recipe's cluster; returns whether the connection is to be closed after the run.

    Raises:
        ResourceError: Ray is not installed, or the cluster cannot be reached.
        ProcessError: the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ResourceError(
            "Ray is not installed",
            where="backend",
            got=str(error),
            expected="the package ray",
            hint="pip install 'april-rl[ray]', or leave backend out",
        ) from None
    _mute()
    if ray.is_initialized():
        return False
    address = placement.address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        bundles = [bundle for _, bundles, _ in groups_of(placement, counts) for bundle in bundles]
        own = {
            "num_cpus": int(-(-sum(bundle["CPU"] for bundle in bundles) // 1)),
            "object_store_memory": (placement.object_store_mb or max(256, 6 * num_bytes // _MIB)) * _MIB,
            "include_dashboard": False,
        }
        names = {name for bundle in bundles for name in bundle} - {"CPU", "GPU"}
        own["resources"] = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}
    init = partial(ray.init, address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **own)
    try:
        if own:  # by this thread: the processes that it starts end with the thread that started them
            init()
        else:
            bounded(init, _CONNECT_S, f"connect to {address}")
    except ProcessError:
        raise
    except Exception as error:  # Ray raises errors of many kinds
        raise ResourceError(
            "the Ray cluster cannot be reached" if not own else "Ray does not start",
            where="placement.address",
            got=f"{address}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="`ray status` on that machine; without an address one is started here",
        ) from error
    return True


def _mute() -> None:
    """Ray prints the losses of its processes on standard output, where April's results go; April tells them itself."""
    import ray._private.worker as worker

    logging.getLogger("ray").setLevel(logging.ERROR)
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_arguments, **_options: None


def _no_places(late: Groups, timeout_s: float) -> ResourceError:
    """The error for groups that were not made in time; those that no node could ever hold are named alone."""
    import ray

    nodes = [node["Resources"] for node in bounded(ray.nodes, _ANSWER_S, "list the nodes") if node["Alive"]]
    never = [group for group in late if not any(_fits(group[1][0], node) for node in nodes)]
    groups = never or late
    wanted = "; ".join(f"{len(bundles)} times {_told(bundles[0])}, {strategy}" for _, bundles, strategy in groups)
    return ResourceError(
        "the Ray cluster has no such places",
        where=", ".join(f"placement.{role}" for roles, _, _ in groups for role in roles),
        got="nodes with " + ("; ".join(map(_told, nodes)) or "nothing"),
        expected=f"{wanted}, within {timeout_s:g} s",
        hint="ask for less per process or for fewer processes, add nodes, or raise placement.timeout_s where nodes are started "
        "on demand; `ray status` shows what others hold",
    )


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in bundle.items())


def _told(resources: Mapping[str, float]) -> str:
    shown = {name: amount for name, amount in resources.items() if not (name.endswith("memory") or ":" in name)}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "no resources"
