"""Engines that join a run and leave it between its steps.

add     a process is started; when it is loaded, the pool takes it in between two steps, on the version that is served
remove  its samples go to the others with their tokens, its process ends
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, cast

from april.config.recipe import Recipe
from april.core.clock import WallClock
from april.core.errors import AprilError, ProcessError, RecipeError
from april.distributed.remote_engine import RemoteEngine
from april.distributed.transport import WeightTransport
from april.engines.pool import EnginePool
from april.run.build import Parts
from april.run.checks import shares_devices
from april.run.processes import in_child, remote_engine, replicas_of
from april.run.requests import take


class ElasticEngines:
    """The engines of a run that come and go.

    Args:
        parts: of the run.
        note: told what becomes of requests.

    Attributes:
        loading: engines that will join, by name.
    """

    def __init__(self, parts: Parts, note: Callable[[str], None]) -> None:
        self._parts, self._note = parts, note
        self._numbers = count(replicas_of(parts.recipe))
        self._placed: set[str] = set()
        self.loading: dict[str, RemoteEngine] = {}
        take(parts.folder)  # what was asked of a run before this one

    def add(self) -> str:
        """Start another engine; returns its name. It joins after the first step that ends when it is loaded.

        Raises:
            RecipeError: engines of this run cannot come and go.
        """
        check_elastic(self._parts.recipe)
        parts, spawn = self._parts, None
        name = f"{parts.recipe.engine.type} {next(self._numbers)}"
        if parts.cluster is not None:
            spawn = parts.cluster.spawn_more("engine", name)
            self._placed.add(name)
        self.loading[name] = remote_engine(parts.recipe, cast(WallClock, parts.clock), self._transport, name, spawn)
        self._note(f"engine {name} is started, and joins when it is loaded")
        return name

    def remove(self, name: str, *, finish: bool = False) -> None:
        """Let an engine go.

        Args:
            name: of an engine, or of one that has not joined yet.
            finish: let it end the samples that it has; they go to the others otherwise.

        Raises:
            RecipeError: engines of this run cannot come and go.
            EngineError: there is no such engine, or no other one.
        """
        check_elastic(self._parts.recipe)
        if name in self.loading:
            self.loading.pop(name).close()
        else:
            self._pool.leave(name, finish=finish)
        self._note(f"engine {name} leaves")

    def turn(self) -> None:
        """Between two steps: do what was asked, take in engines that are loaded, give the places of others back."""
        for request in take(self._parts.folder, self._note):
            try:
                for _ in range(request["add"]):
                    self.add()
                for name in request["remove"]:
                    self.remove(name, finish=request["finish"])
            except (AprilError, OSError) as error:
                self._note(f"not done: {_in_one_line(error)}")
        for name in list(self.loading):
            self._look_at(name)
        for name in self._placed - self.loading.keys() - self._pool_names():
            self._placed.discard(name)
            if self._parts.cluster is not None:
                self._parts.cluster.give_back(name)

    def describe(self) -> list[dict[str, Any]]:
        """Engines that have not joined yet, for status files."""
        blank = {"running": 0, "waiting": 0, "held": 0, "version": 0, "restarts": 0, "state": "being loaded"}
        return [{"name": name, "process": engine.pid, **blank} for name, engine in self.loading.items()]

    def close(self) -> None:
        """End engines that have not joined."""
        while self.loading:
            self.loading.popitem()[1].close()

    @property
    def _pool(self) -> EnginePool:
        return cast(EnginePool, self._parts.engine)

    @property
    def _transport(self) -> WeightTransport:
        """What engines in processes of their own read their weights from."""
        return cast(WeightTransport, self._parts.transport)

    def _pool_names(self) -> set[str]:
        return set(getattr(self._parts.engine, "engines", ()))

    def _look_at(self, name: str) -> None:
        """Take in one that is loaded; give one up that cannot be: the run goes on with those that it has."""
        engine = self.loading[name]
        try:
            engine.poll()
            if engine.pid is None:
                raise ProcessError(f"the {name} process was lost", got="; ".join(engine.all_losses))
            if not engine.loaded:
                return
            version = self._parts.driver.version
            self._pool.join(name, engine, self._transport.view(version) if self._transport.holds(version) else None)
        except (AprilError, OSError) as error:
            self._note(f"engine {name} does not join: {_in_one_line(error)}")
            engine.close()
        else:
            self._note(f"engine {name} has joined")
        del self.loading[name]


def check_elastic(recipe: Recipe) -> None:
    """Engines can come and go where there is a pool of processes.

    Raises:
        RecipeError: there is not.
    """
    for got, holds in (
        ('engine.process = "main"', not in_child(recipe, "engine")),
        ("engine.replicas = 1", replicas_of(recipe) < 2),
        ("engine.urls, and each server is one engine", bool(getattr(recipe.engine, "urls", ()))),
        ('placement.devices = "shared", and each engine has the devices of a rank', shares_devices(recipe)),
    ):
        if holds:
            raise RecipeError(
                "the engines of this run cannot come and go",
                where="engine",
                got=got,
                expected="two engines or more to begin with, each in a process of its own or an actor",
                hint='set engine.replicas = 2 and engine.process = "child", or backend = "ray"',
            )


def _in_one_line(error: Exception) -> str:
    if not isinstance(error, AprilError):
        return str(error).splitlines()[0]
    return error.what if error.got is None else f"{error.what} ({str(error.got).splitlines()[0]})"
