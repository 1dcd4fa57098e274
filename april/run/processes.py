"""Which part of a run computes in which process; everything that is made in a child is made here.

    training.process = "child"    controller + engine | trainer
    engine.process = "child"      controller + trainer | engine
    both                          controller | engine | trainer
    training.ranks = 2            controller + engine | trainer rank 0 | trainer rank 1

The controller keeps driver, pool, schedule and rewards. Weights go from one process to another through one piece of shared
memory that all of them hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from april.config.recipe import Recipe
from april.core.clock import WallClock
from april.distributed.ranks import RankedTrainer
from april.distributed.remote_engine import RemoteEngine
from april.distributed.remote_trainer import RemoteTrainer
from april.distributed.shared_weights import Layout, WeightBuffer
from april.engines.base import Engine
from april.engines.pool import EnginePool
from april.models.policy import Policy
from april.training.single import Trainer

if TYPE_CHECKING:
    from april.training.sharded_ranks import Ranks

Role = Literal["trainer", "engine"]


def in_child(recipe: Recipe, role: Role) -> bool:
    """Whether a part has a process of its own; a trainer of several ranks always has."""
    if role == "trainer" and recipe.training.ranks > 1:
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = 1 + (replicas_of(recipe) if in_child(recipe, "engine") else 1) if any_child(recipe) else 1
    return recipe.model.threads or max(1, cores // busy)


def share_weights(recipe: Recipe, policy: Policy) -> WeightBuffer | None:
    """Shared memory for the policy's weights, where another process needs it."""
    return WeightBuffer(Layout.of(policy.weights())) if any_child(recipe) else None


def engines_of(recipe: Recipe, make: Callable[[str], Engine], clock: WallClock) -> Engine:
    """The engine of a recipe, made under its name; several are one pool."""
    name, num = str(getattr(recipe.engine, "type", "engine")), replicas_of(recipe)
    return make(name) if num == 1 else EnginePool({f"{name} {index}": make(f"{name} {index}") for index in range(num)}, clock)


def remote_engine(recipe: Recipe, clock: WallClock, buffer: WeightBuffer, name: str) -> RemoteEngine:
    """An engine of a recipe in a child process, which is started."""
    make, threads = partial(_engine_in_child, recipe), threads_of(recipe, "engine")
    engine = RemoteEngine(make, clock=clock, limits=recipe.limits, buffer=buffer, threads=threads, name=name)
    engine.start()
    return engine


def remote_trainer(recipe: Recipe, clock: WallClock, buffer: WeightBuffer, newest: Callable[[], Path | None]) -> RemoteTrainer:
    """The trainer of a recipe in a child process, or one for each rank, started by its first use."""
    options: dict[str, Any] = {"clock": clock, "buffer": buffer, "limits": recipe.limits, "newest": newest}
    ranks = recipe.training.ranks
    if ranks == 1:
        return RemoteTrainer(partial(_trainer_in_child, recipe), threads=threads_of(recipe, "trainer"), **options)
    join, make = partial(_join_ranks, recipe), partial(_rank_in_child, recipe)
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


def _join_ranks(recipe: Recipe, rank: int, count: int, rendezvous: str) -> Ranks:
    from april.run.build import device_of
    from april.training.sharded_ranks import Ranks

    device: Literal["cpu", "cuda"] = "cuda" if device_of(recipe.model.device).type == "cuda" else "cpu"
    backend, timeout_s = recipe.training.sharding.backend, recipe.limits.train_s + recipe.limits.start_s
    return Ranks.join(rank, count, rendezvous, device=device, backend=backend, timeout_s=timeout_s)


def _rank_in_child(recipe: Recipe, ranks: Ranks, clock: WallClock) -> tuple[Trainer, Any]:
    from april.run.build import load_policy
    from april.training.sharded import ShardedTrainer

    on_cpu = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cpu"})})
    policy, tokenizer = load_policy(on_cpu)  # whole in CPU memory; only the parts of this rank reach its device
    reference = load_policy(on_cpu, recipe.model.reference)[0] if "reference" in recipe.algorithm.requires else None
    torch.set_num_threads(_threads_of_rank(recipe))
    trainer = ShardedTrainer(
        policy, recipe.algorithm, recipe.training, ranks=ranks, reference=reference, clock=clock, total_steps=recipe.steps
    )
    return trainer, tokenizer.backend
