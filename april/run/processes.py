"""Which part of a run computes in which process; everything that is made in a child is made here.

    training.process = "child"    controller + engine | trainer
    engine.process = "child"      controller + trainer | engine
    both                          controller | engine | trainer
    training.ranks = 2            controller + engine | trainer rank 0 | trainer rank 1

The controller keeps driver, pool, schedule and rewards. Weights go from one process to another through the transport that the
recipe names (`april.config.publishing`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from april.config.recipe import Recipe
from april.core.clock import WallClock
from april.distributed.broadcast_weights import BroadcastWeights
from april.distributed.child import Launch
from april.distributed.disk_weights import DiskWeights
from april.distributed.layout import Layout
from april.distributed.ranks import RankedTrainer
from april.distributed.ray_cluster import HostRole, RayCluster
from april.distributed.remote_engine import RemoteEngine
from april.distributed.remote_trainer import RemoteTrainer
from april.distributed.shared_weights import WeightBuffer
from april.distributed.transport import WeightTransport
from april.engines.base import Engine
from april.engines.pool import EnginePool
from april.models.policy import Policy
from april.rewards.workers import StartWorker
from april.run.folders import weights_folder
from april.training.single import Trainer, adapted

if TYPE_CHECKING:
    from torch.distributed import Store

    from april.training.sharded_ranks import Ranks

Role = Literal["trainer", "engine"]


def in_child(recipe: Recipe, role: Role) -> bool:
    """Whether a part has a process of its own; a trainer of several ranks always has."""
    if recipe.backend == "ray" or (role == "trainer" and recipe.training.ranks > 1):
        return True
    return getattr(recipe.training if role == "trainer" else recipe.engine, "process", "main") == "child"


def any_child(recipe: Recipe) -> bool:
    """Whether any part has."""
    return in_child(recipe, "trainer") or in_child(recipe, "engine")


def replicas_of(recipe: Recipe) -> int:
    """How many engines there are."""
    return int(getattr(recipe.engine, "replicas", 1))


def threads_of(recipe: Recipe, role: Role | None = None) -> int:
    """CPU threads of torch in the process of a part, or in the controller.

    Two processes are busy at once when there is a child, more with several engines, so `model.threads = 0` gives each an
    equal part of the cores: threads that spin for a core that another process holds cost both of them.
    """
    section = {"trainer": recipe.training, "engine": recipe.engine}.get(role or "")
    own = getattr(section, "threads", None)
    if own is not None:
        return int(own)
    if recipe.backend == "ray" and role is not None and not recipe.model.threads:
        return max(1, int(getattr(recipe.placement, role).cpus))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = 1 + (replicas_of(recipe) if in_child(recipe, "engine") else 1) if any_child(recipe) else 1
    return recipe.model.threads or max(1, cores // busy)


def published(recipe: Recipe, policy: Policy) -> dict[str, torch.Tensor]:
    """Tensors of the names and shapes that a trainer of this policy publishes."""
    return adapted(policy, recipe.training).weights()


def share_weights(recipe: Recipe, policy: Policy, folder: Path, cluster: RayCluster | None = None) -> WeightTransport | None:
    """What carries the policy's weights to another process, where one needs them; `folder` is the run's."""
    if cluster is not None:
        return cluster.weights(Layout.of(published(recipe, policy)))
    return transport_of(recipe, Layout.of(published(recipe, policy)), folder) if any_child(recipe) else None


def transport_of(recipe: Recipe, layout: Layout, folder: Path) -> WeightTransport:
    """The transport that a recipe names, for tensors of a layout; the disk's lies in `folder`, or where the recipe says."""
    options, num_bytes = recipe.publishing, recipe.publishing.bucket_mib << 20
    if options.transport == "disk":
        return DiskWeights(weights_folder(recipe, folder), layout, file_bytes=num_bytes, fsync=options.fsync)
    if options.transport == "broadcast":
        return BroadcastWeights(layout, bucket_bytes=num_bytes, deadline_s=options.deadline_s, device=options.device)
    return WeightBuffer(layout)


def cluster_of(recipe: Recipe, policy: Policy) -> RayCluster | None:
    """The places of a run on a Ray cluster, where the recipe wants one; waits for them."""
    if recipe.backend != "ray":
        return None
    counts: dict[HostRole, int] = {
        "trainer": recipe.training.ranks,
        "engine": replicas_of(recipe),
        "reward": recipe.scoring.workers,
    }
    return RayCluster(recipe.placement, counts, Layout.of(published(recipe, policy)).num_bytes)


def start_worker_of(recipe: Recipe, cluster: RayCluster | None) -> StartWorker | None:
    """What starts reward workers; None for child processes."""
    if cluster is None or not recipe.scoring.workers:
        return None
    from april.distributed.ray_rewards import start_in_actors

    return start_in_actors([cluster.spawn("reward", index) for index in range(recipe.scoring.workers)])


def engines_of(recipe: Recipe, make: Callable[[str], Engine], clock: WallClock) -> Engine:
    """The engine of a recipe, made under its name; several are one pool."""
    name, num = str(getattr(recipe.engine, "type", "engine")), replicas_of(recipe)
    if num == 1:
        return make(name)
    engines: dict[str, Engine] = {}
    with ExitStack() as made:
        for each in (f"{name} {index}" for index in range(num)):
            engines[each] = make(each)
            made.callback(engines[each].close)
        pool = EnginePool(engines, clock)
        made.pop_all()
        return pool


def one_of(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one engine of several, by its name: of several servers, each has its own."""
    urls = getattr(recipe.engine, "urls", ())
    if len(urls) < 2:
        return recipe
    engine = recipe.engine.model_copy(update={"urls": (urls[int(name.rpartition(" ")[2])],), "replicas": 1})
    return recipe.model_copy(update={"engine": engine})


def remote_engine(
    recipe: Recipe, clock: WallClock, transport: WeightTransport, name: str, spawn: Callable[[Launch], Any] | None = None
) -> RemoteEngine:
    """An engine of a recipe in a child process, or wherever `spawn` starts one; it is started."""
    make, threads = partial(_engine_in_child, one_of(recipe, name)), threads_of(recipe, "engine")
    engine = RemoteEngine(make, clock=clock, limits=recipe.limits, transport=transport, threads=threads, name=name, spawn=spawn)
    engine.start()
    return engine


def remote_trainer(
    recipe: Recipe,
    clock: WallClock,
    transport: WeightTransport,
    newest: Callable[[], Path | None],
    cluster: RayCluster | None = None,
) -> RemoteTrainer:
    """The trainer of a recipe in a child process or an actor, or one for each rank, started by its first use."""
    options: dict[str, Any] = {"clock": clock, "transport": transport, "limits": recipe.limits, "newest": newest}
    ranks = recipe.training.ranks
    if ranks == 1:
        options["spawn"] = None if cluster is None else cluster.spawn("trainer", 0)
        return RemoteTrainer(partial(_trainer_in_child, recipe), threads=threads_of(recipe, "trainer"), **options)
    join, make = partial(_join_ranks, recipe), partial(_rank_in_child, recipe)
    if cluster is not None:
        options |= {"spawns": [cluster.spawn("trainer", rank) for rank in range(ranks)], "meet": cluster.meeting}
    return RankedTrainer(join, make, ranks=ranks, threads=_threads_of_rank(recipe), **options)


def _engine_in_child(recipe: Recipe, clock: WallClock) -> Engine:
    from april.run.build import build_engine, load_policy

    policy, tokenizer = load_policy(recipe)
    torch.set_num_threads(threads_of(recipe, "engine"))
    return build_engine(recipe, policy, tokenizer, clock)


def _trainer_in_child(recipe: Recipe, clock: WallClock) -> tuple[Trainer, Any]:
    from april.run.build import build_trainer, load_policy

    policy, tokenizer = load_policy(recipe)
    torch.set_num_threads(threads_of(recipe, "trainer"))
    return build_trainer(recipe, policy, clock), tokenizer.backend


def _threads_of_rank(recipe: Recipe) -> int:
    """CPU threads of each rank: what the recipe says, or its part of what one trainer would have."""
    return int(recipe.training.threads or 0) or max(1, threads_of(recipe, "trainer") // recipe.training.ranks)


def _join_ranks(recipe: Recipe, rank: int, count: int, rendezvous: str | Store) -> Ranks:
    from april.run.build import device_of
    from april.training.sharded_ranks import Ranks

    device: Literal["cpu", "cuda"] = "cuda" if device_of(recipe.model.device).type == "cuda" else "cpu"
    backend, timeout_s = recipe.training.sharding.backend, recipe.limits.train_s + recipe.limits.start_s
    number = 0 if recipe.backend == "ray" else None  # Ray shows each actor only the devices that are its own
    return Ranks.join(rank, count, rendezvous, device=device, device_number=number, backend=backend, timeout_s=timeout_s)


def _rank_in_child(recipe: Recipe, ranks: Ranks, clock: WallClock) -> tuple[Trainer, Any]:
    from april.run.build import load_policy, needs_reference
    from april.training.sharded import ShardedTrainer

    on_cpu = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cpu"})})
    policy, tokenizer = load_policy(on_cpu)  # whole in CPU memory; only the parts of this rank reach its device
    reference = load_policy(on_cpu, recipe.model.reference)[0] if needs_reference(recipe) else None
    torch.set_num_threads(_threads_of_rank(recipe))
    trainer = ShardedTrainer(
        policy, recipe.algorithm, recipe.training, ranks=ranks, reference=reference, clock=clock, total_steps=recipe.steps
    )
    return trainer, tokenizer.backend
