"""One cell of a study: a cluster, a workload, a schedule and a seed, run through the real driver in virtual time.

next batch -> update -> publish, as in `april.run.loop`; only the engine, the rewards and the trainer are models of themselves
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from april import registry
from april.config.schema import Config
from april.core.clock import VirtualClock
from april.core.group import Batch
from april.core.ids import NO_VERSION
from april.core.random import stream_key
from april.core.sampling import SamplingSpec
from april.engines.base import Load
from april.engines.simulated.config import SimulatedConfig
from april.engines.simulated.engine import SimulatedEngine
from april.observe.trace import Timeline
from april.rollout.driver import Driver
from april.selection.sampler import PromptSampler
from april.simulate.cost import Cluster, Costs, cluster_costs
from april.simulate.workload import Lengths, Workload
from april.simulate.world import (
    FixedOrder,
    MeteredPool,
    RewardTimes,
    SimulatedRewards,
    SimulatedTrainer,
    TraceWatcher,
    zero_variance,
)

Row = dict[str, Any]
SPARE_STEPS = 8
"""Steps that are planned beyond the last one, so that no schedule winds down while it is measured."""


class CellConfig(Config):
    """Everything that a simulated run depends on, but its seed."""

    schedule: Annotated[SerializeAsAny[Config], BeforeValidator(lambda value: registry.parse("schedule", value, "schedule"))] = (
        Field(description="any registered schedule")
    )
    workload: Workload = Field(default=Workload(), description="lengths, prompts, tools")
    cluster: Cluster | None = Field(None, description="devices and model; one H100 node with Qwen3-4B when left out")
    costs: str | None = Field(None, description="in place of a cluster: a file of measured constants")
    engine: SimulatedConfig = Field(default=SimulatedConfig(report_every_s=1.0), description="how replicas are used")
    rewards: RewardTimes = Field(default=RewardTimes(), description="how long judging takes")
    filter: Literal["none", "zero_variance"] = Field("none", description="zero_variance: DAPO's dynamic sampling")
    groups_per_step: int = Field(32, ge=1, description="prompts of an update (N)")
    group_size: int = Field(8, ge=1, description="samples of a prompt (G)")
    steps: int = Field(30, ge=1, description="updates that are simulated")
    warmup_steps: int = Field(10, ge=0, description="first updates that are left out of the means")

    @model_validator(mode="after")
    def _consistent(self) -> CellConfig:
        if self.cluster is not None and self.costs is not None:
            raise ValueError("give a cluster or a file of costs, not both")
        if self.warmup_steps >= self.steps:
            raise ValueError("no step is left after the warm-up")
        return self

    def resolved_costs(self, folder: Path | None = None) -> Costs:
        """The constants, from the file or from the cluster."""
        if self.costs is None:
            return cluster_costs(self.cluster or Cluster())
        path = Path(self.costs)
        return Costs.load(path if path.exists() or folder is None else folder / path)


@dataclass(slots=True)
class Simulation:
    """A simulated run in progress.

    Attributes:
        rows: one a step.
    """

    config: CellConfig
    costs: Costs
    clock: VirtualClock
    lengths: Lengths
    engine: SimulatedEngine
    trainer: SimulatedTrainer
    pool: MeteredPool
    driver: Driver
    timeline: Timeline
    rows: list[Row] = field(default_factory=list)

    def step(self) -> Row:
        """One update, written down as a row."""
        driver, clock, before = self.driver, self.clock, self.engine.load()
        start_s, wasted, trained_s = clock.now(), self.pool.wasted_tokens, self.trainer.busy_s
        self.timeline.step = len(self.rows)
        with self.timeline.span("driver", "rollout"):
            batch = driver.next_batch()
        rollout_s = clock.now() - start_s
        with self.timeline.span("trainer", "update"):
            self.trainer.submit(batch)
            updated = driver.wait_for_update()
        train_s = clock.now() - start_s - rollout_s
        with self.timeline.span("driver", "publish"):
            driver.publish({}, updated.version, driver.schedule.update_mode)
        step_s = clock.now() - start_s
        row: Row = {
            "step": batch.step,
            "time_s": clock.now(),
            "step_s": step_s,
            "rollout_s": rollout_s,
            "train_s": train_s,
            "publish_s": step_s - rollout_s - train_s,
            "update_s": self.trainer.busy_s - trained_s,
            "wasted_tokens": self.pool.wasted_tokens - wasted,
            **_engine_row(before, self.engine.load()),
            **batch_row(batch),
        }
        row["length_bias"] = row["length_mean"] / self.lengths.mean_tokens
        self.rows.append(row)
        return row


def _engine_row(before: Load, after: Load) -> Row:
    names = ("generated_tokens", "prefill_tokens", "preemptions", "busy_s", "slot_s")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def batch_row(batch: Batch) -> Row:
    """What `april.rollout.measure.describe_batch` says, from spans alone: no array as long as the tokens.

    `lag_tokens` counts trained tokens by their lag, as a list over lag 0, 1, 2, ...
    """
    by_lag: dict[int, int] = {}
    lengths: list[int] = []
    cut = 0
    for group in batch.groups:
        for sample, _ in group.rewarded:
            lengths.append(len(sample))
            cut += sample.stop == "length"
            for span in sample.spans:
                lag = batch.version - span.version
                if span.version != NO_VERSION and (batch.max_token_lag is None or lag <= batch.max_token_lag):
                    by_lag[lag] = by_lag.get(lag, 0) + span.end - span.start
    return {
        "num_groups": len(batch.groups),
        "num_samples": len(lengths),
        "consumed_tokens": sum(lengths),
        "length_mean": float(np.mean(lengths)) if lengths else float("nan"),
        "truncated": cut,
        "lag_tokens": [by_lag.get(lag, 0) for lag in range(max(by_lag, default=0) + 1)],
    }


def open_simulation(
    config: CellConfig, seed: int, *, folder: Path | None = None, timeline: Path | None = None, trace_samples: int = 2000
) -> Simulation:
    """Put a simulated run together.

    Args:
        seed: of lengths, successes, latencies and failures.
        folder: where relative paths of the study start.
        timeline: file of the run's timeline; none is written when left out.
        trace_samples: samples whose lives are drawn in it.
    """
    costs, clock = config.resolved_costs(folder), VirtualClock()
    lengths = Lengths(config.workload, seed, config.group_size, folder)
    engine = SimulatedEngine(
        lengths.course, clock, costs.engine, config.engine, num_replicas=costs.num_replicas, seed=stream_key(seed, "failures")
    )
    rewards = SimulatedRewards(clock, lengths, config.rewards, seed)
    trainer, pool = SimulatedTrainer(clock, costs, engine), MeteredPool()
    schedule = registry.builder("schedule", config.schedule.type)(config.schedule)  # type: ignore[attr-defined]
    lines = Timeline(timeline, clock)
    named = lengths.recorded is not None and bool(lengths.recorded.prompts)
    driver = Driver(
        clock=clock,
        engine=engine,
        rewards=rewards,
        sources=(trainer,),
        schedule=schedule,
        prompts=FixedOrder(lengths.prompts()) if named else PromptSampler(lengths.prompts(), seed),
        spec=SamplingSpec(max_new_tokens=config.workload.max_tokens),
        groups_per_step=config.groups_per_step,
        group_size=config.group_size,
        steps=config.steps + SPARE_STEPS + schedule.max_lag_steps,
        pool=pool,
        group_filters=[zero_variance] if config.filter == "zero_variance" else [],
        max_retries=1000,
        watcher=None if timeline is None else TraceWatcher(lines, trace_samples),
    )
    return Simulation(config, costs, clock, lengths, engine, trainer, pool, driver, lines)


def run_cell(
    config: CellConfig,
    seed: int,
    *,
    folder: Path | None = None,
    timeline: Path | None = None,
    trace_samples: int = 2000,
    on_step: Callable[[Row], None] = lambda _row: None,
) -> tuple[list[Row], dict[str, float]]:
    """Simulate a cell to its last step.

    Returns:
        rows of all steps, and the figures of those after the warm-up.
    """
    simulation = open_simulation(config, seed, folder=folder, timeline=timeline, trace_samples=trace_samples)
    for _ in range(config.steps):
        on_step(simulation.step())
    simulation.timeline.close()
    return simulation.rows, totals(simulation.rows[config.warmup_steps :], simulation.costs)


def totals(rows: list[Row], costs: Costs) -> dict[str, float]:
    """Figures of some steps: sums over sums, never means of means."""

    def total(name: str) -> float:
        return float(sum(row[name] for row in rows))

    wall_s, generated = total("step_s"), total("generated_tokens")
    by_lag = np.zeros(max(len(row["lag_tokens"]) for row in rows))
    for row in rows:
        by_lag[: len(row["lag_tokens"])] += row["lag_tokens"]
    steps = np.array([row["step_s"] for row in rows])
    rollout = np.array([row["rollout_s"] for row in rows])
    busy_s, update_s = total("busy_s"), total("update_s")
    share = 0.0 if costs.placement == "colocated" else costs.train_share
    worked_s = busy_s + update_s if costs.placement == "colocated" else busy_s * (1 - share) + update_s * share
    lags = np.arange(len(by_lag))
    return {
        "consumed_tokens_per_s": total("consumed_tokens") / wall_s,
        "generated_tokens_per_s": generated / wall_s,
        "rollout_tokens_per_s": generated / total("rollout_s") if total("rollout_s") else float("nan"),
        "samples_per_s": total("num_samples") / wall_s,
        "step_s": float(steps.mean()),
        "step_cv": float(steps.std() / steps.mean()),
        "rollout_s": float(rollout.mean()),
        "rollout_cv": float(rollout.std() / rollout.mean()) if rollout.mean() else 0.0,
        "train_s": total("train_s") / len(rows),
        "update_s": update_s / len(rows),
        "publish_s": total("publish_s") / len(rows),
        "idle_fraction": max(0.0, 1 - worked_s / wall_s),
        "rollout_idle_fraction": max(0.0, 1 - busy_s / (wall_s if share else max(busy_s, total("rollout_s")))),
        "lag_mean": float((by_lag * lags).sum() / by_lag.sum()),
        "lag_p95": float(np.searchsorted(np.cumsum(by_lag) / by_lag.sum(), 0.95)),
        "lag_max": float(np.flatnonzero(by_lag)[-1]),
        "stale_token_fraction": float(1 - by_lag[0] / by_lag.sum()),
        "length_mean": total("consumed_tokens") / total("num_samples"),
        "length_bias": float(np.average([r["length_bias"] for r in rows], weights=[r["num_samples"] for r in rows])),
        "truncated_fraction": total("truncated") / total("num_samples"),
        "waste_fraction": total("wasted_tokens") / generated,
        "prefill_fraction": total("prefill_tokens") / generated,
        "preemptions_per_step": total("preemptions") / len(rows),
    }
