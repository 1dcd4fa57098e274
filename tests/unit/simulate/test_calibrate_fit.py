"""Fits of measured points: constants that made the points come back, and what cannot be fitted is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from april import registry
from april.core.errors import DataError
from april.engines.simulated.costs import EngineCosts, interpolated
from april.simulate.calibrate import DecodePoint, Measurements, PrefillPoint, UpdatePoint, fit_costs, fit_non_negative
from april.simulate.cell import CellConfig, run_cell
from april.simulate.cost import Costs

TRUE = EngineCosts(
    step_fixed_s=0.0,
    step_per_sequence_s=0.0,
    step_by_batch_s=((1, 0.001), (4, 0.0015), (16, 0.002), (64, 0.004), (128, 0.007)),
    context_token_read_s=4e-7,
    admission_s=0.002,
    admit_s=1e-4,
    prefill_per_token_s=3e-5,
    prefill_per_token2_s=2e-8,
    max_running=128,
)


def measured(noise: float = 0.0, **fields: object) -> Measurements:
    """Points that the true costs would give, each off by up to `noise`."""
    rng = np.random.default_rng(0)

    def off() -> float:
        return float(1 + noise * rng.uniform(-1, 1))

    decode = [
        DecodePoint(batch=batch, context_tokens=batch * context, step_s=TRUE.step_s(batch, batch * context) * off())
        for batch in (1, 2, 4, 8, 16, 32, 64, 100, 128)
        for context in (20, 100, 400)
    ]
    prefill = [
        PrefillPoint(
            samples=n,
            tokens=tokens,
            seconds=(TRUE.admission_s + n * (TRUE.admit_s + TRUE.prefill_s(tokens)) + TRUE.step_s(n, n * tokens)) * off(),
        )
        for n in (1, 8, 64)
        for tokens in (16, 128, 512)
    ]
    updates = [UpdatePoint(tokens=tokens, seconds=(0.05 + 1e-4 * tokens) * off()) for tokens in (500, 1000, 4000)]
    whole = {"what": "a test", "decode": decode, "prefill": prefill, "updates": updates, "max_running": 128, **fields}
    return Measurements.model_validate(whole)


def test_constants_come_back() -> None:
    costs = fit_costs(measured(sample_s=5e-5, sync_s=0.01))
    assert dict(costs.engine.step_by_batch_s) == pytest.approx(dict(TRUE.step_by_batch_s))
    assert costs.engine.context_token_read_s == pytest.approx(4e-7)
    got = (costs.engine.admission_s, costs.engine.admit_s, costs.engine.prefill_per_token_s, costs.engine.prefill_per_token2_s)
    assert got == pytest.approx((0.002, 1e-4 + 5e-5, 3e-5, 2e-8))
    assert (costs.train.fixed_s, costs.train.per_token_s, costs.engine.sync_s) == pytest.approx((0.05, 1e-4, 0.01))
    assert costs.calibration is not None and costs.calibration.decode.max_fraction < 1e-9
    assert (costs.num_replicas, costs.placement, costs.train.switch_s) == (1, "colocated", 0.0)


def test_noise_shows_in_the_reported_error_and_no_constant_is_negative() -> None:
    costs = fit_costs(measured(noise=0.2))
    assert costs.calibration is not None and 0.02 < costs.calibration.decode.median_fraction < 0.2
    assert costs.engine.step_s(64, 6400) == pytest.approx(TRUE.step_s(64, 6400), rel=0.15)
    assert min(seconds for _, seconds in costs.engine.step_by_batch_s) >= 0
    assert min(costs.engine.admit_s, costs.engine.prefill_per_token2_s, costs.train.fixed_s) >= 0


def test_least_squares_with_a_constant_at_its_bound() -> None:
    """y = 3 x - 1 at x = 1, 2: without the bound the intercept is -1; with it the slope alone minimises the relative error."""
    constants, error = fit_non_negative([(1.0, 1.0), (1.0, 2.0)], [2.0, 5.0], 2)
    slope = (1 / 2 + 2 / 5) / (1 / 4 + 4 / 25)
    assert constants == pytest.approx([0.0, slope])
    assert error.max_fraction == pytest.approx(max(abs(slope / 2 - 1), abs(2 * slope / 5 - 1)))
    assert fit_non_negative([], [], 2)[0] == [0.0, 0.0]
    assert fit_non_negative([(0.0, 1.0), (0.0, 2.0)], [2.0, 4.0], 2)[0] == pytest.approx([0.0, 2.0])


def test_a_table_is_linear_inside_and_constant_outside() -> None:
    table = ((4, 1.0), (16, 2.5), (64, 3.0))
    assert [interpolated(table, batch) for batch in (1, 4, 8, 16, 40, 64, 500)] == pytest.approx(
        [1.0, 1.0, 1.5, 2.5, 2.75, 3.0, 3.0]
    )
    assert interpolated((), 7) == 0.0
    with pytest.raises(ValueError, match="ascending"):
        EngineCosts(step_by_batch_s=((4, 1.0), (4, 2.0)))


@pytest.mark.parametrize("batches", [(), (8,), (8, 8, 8, 8)])
def test_too_few_points_are_refused(batches: tuple[int, ...]) -> None:
    points = [DecodePoint(batch=batch, context_tokens=100, step_s=0.001) for batch in batches]
    with pytest.raises(DataError, match="decode steps cannot be fitted"):
        fit_costs(Measurements(what="a test", decode=tuple(points)))


def test_frozen_constants_are_hardware_for_a_cell(tmp_path: Path) -> None:
    fit_costs(measured()).save(tmp_path / "costs.json")
    assert Costs.load(tmp_path / "costs.json").calibration is not None
    times = []
    for costs in ("costs.json", "slow.json"):
        tree = {
            "schedule": {"type": "sync"},
            "costs": costs,
            "engine": {"report_every_s": 0.0},
            "workload": {"lengths": "fixed", "mean_tokens": 50, "prompt_tokens": 10, "max_tokens": 64},
            "groups_per_step": 4,
            "group_size": 4,
            "steps": 2,
            "warmup_steps": 1,
        }
        if costs == "slow.json":  # negative control: other constants, other times
            slow = Costs.load(tmp_path / "costs.json")
            slow.model_copy(update={"engine": slow.engine.model_copy(update={"admission_s": 1.0})}).save(tmp_path / costs)
        cell = registry.validate(CellConfig, tree, "")
        assert isinstance(cell, CellConfig)
        times.append(run_cell(cell, 0, folder=tmp_path)[1]["rollout_s"])
    engine = fit_costs(measured()).engine
    steps = sum(engine.step_s(16, 160 + 16 * done) for done in range(50))
    taken_in = engine.admission_s + 16 * engine.admit_s + 4 * engine.prefill_s(10)
    assert times[0] == pytest.approx(steps + taken_in, rel=1e-6)
    assert times[1] == pytest.approx(times[0] + 1.0 - engine.admission_s, rel=1e-6) and math.isfinite(times[1])
