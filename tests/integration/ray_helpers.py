"""Ray clusters of this machine, for tests; nothing of them is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}
"""A node that dies is noticed within seconds."""
MEMORY_BYTES = 100 << 20


@contextmanager
def two_nodes(head_cpus: int = 6, other_cpus: int = 3) -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes on this machine, and the one of them that may be killed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": head_cpus, "object_store_memory": MEMORY_BYTES, "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster, cluster.add_node(num_cpus=other_cpus, object_store_memory=MEMORY_BYTES)
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_node(cluster: Any, node: Any, run: Any) -> None:
    """All processes of a node, and of the run's actors on it, end at one moment, as in a power cut."""
    pids = [child.pid for child in children_of(run) if child.node == node.node_id]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    cluster.remove_node(node, allow_graceful=False)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children_of(run: Any) -> list[Any]:
    """The actors of engines and trainer whose place is known."""
    found = [engine._child for engine in run.parts.engine.engines.values()]
    trainer = run.parts.trainer._child
    found += getattr(trainer, "children", [trainer])
    return [child for child in found if child is not None and child.node]


def num_held(run: Any, node: str) -> int:
    """Samples in engines on a node."""
    engines = run.parts.engine.engines.values()
    return sum(len(engine._open) for engine in engines if engine._child is not None and engine._child.node == node)


def on(cluster: Any, *, engines: int = 2, ranks: int = 1) -> tuple[str, ...]:
    """Overrides that spread a run over the nodes of a cluster."""
    return (
        "backend=ray",
        f"placement.address='{cluster.address}'",
        "placement.trainer.strategy=spread",
        "placement.engine.strategy=spread",
        f"engine.replicas={engines}",
        f"training.ranks={ranks}",
        "training.threads=1",
    )
