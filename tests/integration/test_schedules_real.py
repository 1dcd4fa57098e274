"""Every schedule on the real embedded engine: a toy policy whose weights change with each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rollout_helpers import FakeRewards, audit

from april import registry
from april.core.clock import WallClock
from april.core.errors import RolloutError
from april.core.group import Batch, Reward
from april.core.prompt import Prompt
from april.core.sampling import SamplingSpec
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.pool import EnginePool
from april.rollout.driver import Driver
from april.selection.sampler import PromptSampler
from april.testing.toy_model import toy_model

STEPS = 3
EQUAL: dict[str, dict[str, Any]] = {
    "april": {"type": "april", "over_provision": 1.0, "max_lag_steps": 0},
    "bounded_async": {"type": "bounded_async", "max_lag_steps": 0},
    "truncated": {"type": "truncated", "over_provision": 1.0, "max_lag_steps": 0, "window_tokens": 5},
    "longest_first": {"type": "longest_first", "max_running": 3},
    "multi_version": {"type": "multi_version", "max_lag_steps": 0, "update_mode": "drain"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "april": {"type": "april", "over_provision": 2.0, "max_lag_steps": 2},
    "adaptive": {"type": "april", "over_provision": "adaptive", "max_lag_steps": 1},
    "bounded_async": {"type": "bounded_async", "max_lag_steps": 1},
    "windowed": {"type": "windowed", "max_lag_steps": 1},
    "truncated": {"type": "truncated", "max_lag_steps": 1, "window_tokens": 5},
    "token_budget": {"type": "token_budget", "tokens_per_step": 90, "max_running": 8},
    "replicated": {"type": "replicated", "redundant_samples": 1},
    "tail_batching": {"type": "tail_batching", "over_provision": 2.0},
    "multi_version": {"type": "multi_version", "max_lag_steps": 1, "update_mode": "drain"},
    "rolling": {"type": "rolling", "max_lag_steps": 1, "max_running": 12},
}
ONE_VERSION = ("multi_version", "rolling")


def weights_of(version: int) -> dict[str, torch.Tensor]:
    """The toy policy, moved a little by each update."""
    state = toy_model(dtype=torch.float64).state_dict()
    generator = torch.Generator().manual_seed(version)
    for name in sorted(state):
        if version and state[name].is_floating_point():
            state[name] = state[name] + 0.02 * torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
    return state


def run(fields: dict[str, Any], num_engines: int = 1) -> tuple[Driver, list[Batch]]:
    clock = WallClock()
    options = EmbeddedConfig(steps_per_poll=4, max_running=8)
    engines = {
        f"engine {index}": EmbeddedEngine(toy_model(dtype=torch.float64), clock=clock, config=options)
        for index in range(num_engines)
    }
    config = registry.parse("schedule", fields, "schedule")
    prompts = [Prompt(f"p{index}", np.arange(2, 6 + index % 3, dtype=np.int32)) for index in range(40)]
    driver = Driver(
        clock=clock,
        engine=EnginePool(engines, clock) if num_engines > 1 else engines["engine 0"],
        rewards=FakeRewards(clock, lambda sample: Reward(float(len(sample)))),  # type: ignore[arg-type]
        schedule=registry.builder("schedule", fields["type"])(config),
        prompts=PromptSampler(prompts),
        spec=SamplingSpec(max_new_tokens=24, stop_token_ids=(0, 7, 11), seed=5),
        groups_per_step=3,
        group_size=3,
        steps=STEPS,
    )
    batches = []
    for _ in range(STEPS):
        batches.append(driver.next_batch())
        driver.pool.trained()
        driver.publish(weights_of(driver.emitted_steps), driver.emitted_steps, driver.schedule.update_mode)
        audit(driver.pool)
    driver.engine.close()
    return driver, batches


def contents(batches: list[Batch]) -> list[Any]:
    return [
        (sample.id, sample.token_ids.tolist(), sample.versions.tolist(), sample.stop)
        for batch in batches
        for group in batch.groups
        for sample in group.samples
    ]


@pytest.fixture(scope="module")
def synchronous() -> list[Batch]:
    return run({"type": "sync"})[1]


@pytest.mark.parametrize("name", EQUAL)
def test_with_nothing_in_excess_the_tokens_are_those_of_sync(name: str, synchronous: list[Batch]) -> None:
    torch.set_num_threads(1)
    _, batches = run(EQUAL[name])
    assert contents(batches) == contents(synchronous)
    for batch, other in zip(batches, synchronous, strict=True):
        for group, expected in zip(batch.groups, other.groups, strict=True):
            for sample, same in zip(group.samples, expected.samples, strict=True):
                np.testing.assert_allclose(sample.behaviour_logprobs, same.behaviour_logprobs, rtol=0, atol=1e-6)


def test_the_equality_can_fail(synchronous: list[Batch]) -> None:
    assert contents(run(OTHERS["april"])[1]) != contents(synchronous)
    lengths = {len(sample) for batch in synchronous for group in batch.groups for sample in group.samples}
    assert len(lengths) > 5, "without a spread of lengths nothing was compared"


@pytest.mark.parametrize("name", OTHERS)
def test_every_schedule_conserves_and_keeps_its_bound(name: str) -> None:
    torch.set_num_threads(1)
    driver, batches = run(OTHERS[name], num_engines=2 if name == "rolling" else 1)
    ids = [sample.id for batch in batches for group in batch.groups for sample in group.samples]
    assert driver.pool.ledger.balanced and len(ids) == len(set(ids))
    for batch in batches:
        for group in batch.groups:
            for sample, _ in group.rewarded:
                assert batch.version - min(sample.versions) <= driver.schedule.max_lag_steps
                assert len(set(sample.versions)) == 1 or name not in ONE_VERSION


@pytest.mark.parametrize("fields", [{"type": "multi_version"}, {"type": "rolling"}], ids=lambda fields: fields["type"])
def test_what_needs_several_versions_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RolloutError, match="cannot take new weights") as caught:
        run(fields)
    assert fields["type"].split("_")[0] in str(caught.value).lower()
