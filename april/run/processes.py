"""Which part of a run computes in which process; everything that is made in a child is made here.

    training.process = "child"    controller + engine | trainer
    engine.process = "child"      controller + trainer | engine
    both                          controller | engine | trainer

The controller keeps driver, pool, schedule and rewards. Weights go from one process to another through one piece of shared
memory that all of them hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from april.config.recipe import Recipe
from april.core.clock import WallClock
from april.distributed.remote_engine import RemoteEngine
from april.distributed.remote_trainer import RemoteTrainer
from april.distributed.shared_weights import Layout, WeightBuffer
from april.engines.base import Engine
from april.models.policy import Policy
from april.training.single import Trainer

Role = Literal["trainer", "engine"]


def in_child(recipe: Recipe, role: Role) -> bool:
    """Whether a part has a process of its own."""
    return getattr(recipe.training if role == "trainer" else recipe.engine, "process", "main") == "child"


def any_child(recipe: Recipe) -> bool:
    """Whether any part has."""
    return in_child(recipe, "trainer") or in_child(recipe, "engine")


def threads_of(recipe: Recipe, role: Role | None = None) -> int:
    """CPU threads of torch in the process of a part, or in the controller.

    Two processes are busy at once when there is a child, so `model.threads = 0` gives each half of the cores: threads that
    spin for a core that another process holds cost both of them.
    """
    section = {"trainer": recipe.training, "engine": recipe.engine}.get(role or "")
    own = getattr(section, "threads", None)
    if own is not None:
        return int(own)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return recipe.model.threads or max(1, cores // (2 if any_child(recipe) else 1))


def share_weights(recipe: Recipe, policy: Policy) -> WeightBuffer | None:
    """Shared memory for the policy's weights, where another process needs it."""
    return WeightBuffer(Layout.of(policy.weights())) if any_child(recipe) else None


def remote_engine(recipe: Recipe, clock: WallClock, buffer: WeightBuffer) -> RemoteEngine:
    """The engine of a recipe in a child process, which is started."""
    make, threads = partial(_engine_in_child, recipe), threads_of(recipe, "engine")
    engine = RemoteEngine(make, clock=clock, limits=recipe.limits, buffer=buffer, threads=threads, name=recipe.engine.type)
    engine.start()
    return engine


def remote_trainer(recipe: Recipe, clock: WallClock, buffer: WeightBuffer, newest: Callable[[], Path | None]) -> RemoteTrainer:
    """The trainer of a recipe in a child process, which is started by its first use."""
    make, threads = partial(_trainer_in_child, recipe), threads_of(recipe, "trainer")
    return RemoteTrainer(make, clock=clock, buffer=buffer, limits=recipe.limits, newest=newest, threads=threads)


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
