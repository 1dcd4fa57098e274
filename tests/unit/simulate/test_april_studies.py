"""The studies of April's own claims: what is fitted is frozen, what refills is what slime's code does, workloads are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from april import registry
from april.simulate.cell import CellConfig, open_simulation
from april.simulate.study import load_study
from april.simulate.workload import Lengths, Workload


def test_the_constants_of_aprils_table_are_frozen() -> None:
    """Between the twelve points nothing differs but the model, the filter and the mean length of the data set."""
    study = load_study("april_table")
    cells = [cell.config.model_dump(mode="json") for cell in study.cells if cell.arm == "april" and cell.seed == 0]
    assert len(cells) == 12
    for cell in cells:
        assert cell["cluster"].pop("model") in ("Qwen3-4B", "Qwen3-8B") and cell.pop("filter") in ("none", "zero_variance")
        assert cell["workload"].pop("mean_tokens") in (6500, 5400, 4850)
    assert all(cell == cells[0] for cell in cells)
    kinds = [expectation.what.split(":")[0] for expectation in study.config.expect[2:]]
    assert (kinds.count("fitted"), kinds.count("predicted")) == (4, 8)
    assert all("4B" in e.what for e in study.config.expect if e.what.startswith("fitted"))


def test_both_studies_of_ratios_share_their_six_workloads() -> None:
    ratio, adaptive = load_study("default_ratio"), load_study("adaptive")
    assert ratio.points == adaptive.points and len(ratio.points) == 6
    assert {cell.config.workload for cell in ratio.cells} == {cell.config.workload for cell in adaptive.cells}
    bounds = {getattr(cell.config.schedule, "max_lag_steps", 0) for cell in ratio.cells}
    assert bounds == {0, 2} and len(adaptive.config.expect) == 6 * 8


def issued_and_dropped(refill: str) -> tuple[int, int]:
    tree: dict[str, Any] = {
        "schedule": {"type": "replicated", "over_provision": 1.0, "refill": refill},
        "workload": {"mean_tokens": 400, "max_tokens": 2048, "num_prompts": 256},
        "filter": "zero_variance",
        "groups_per_step": 8,
        "group_size": 4,
        "steps": 2,
        "warmup_steps": 1,
    }
    config = registry.validate(CellConfig, tree, "")
    assert isinstance(config, CellConfig)
    simulation = open_simulation(config, 0)
    simulation.driver.next_batch()
    return simulation.pool.ledger.issued // 4, simulation.pool.num_dropped_groups


def test_dynamic_sampling_refills_by_whole_steps() -> None:
    """One by one: what was dropped; by steps: eight more as soon as one is dropped, as in slime's loop."""
    one, dropped = issued_and_dropped("one")
    assert one == 8 + dropped and dropped > 0
    step, _ = issued_and_dropped("step")
    assert step % 8 == 0 and step >= 16


@pytest.mark.parametrize("solved", [0.0, 0.4])
def test_the_easiest_prompts_are_always_solved(solved: float) -> None:
    lengths = Lengths(Workload(solved_fraction=solved, num_prompts=2000), 0, 8)
    certain = lengths.chances >= 1 - 1e-12
    assert certain.mean() == pytest.approx(solved, abs=0.03)
    assert np.quantile(lengths.chances[~certain], 0.5) == pytest.approx(0.5, abs=0.05)
