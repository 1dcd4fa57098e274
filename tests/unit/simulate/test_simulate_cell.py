"""Cells: the real driver and real schedules in virtual time; tokens conserved, shares in range, physics monotone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from april import registry
from april.core.errors import RecipeError
from april.rollout.measure import describe_batch
from april.simulate.cell import CellConfig, batch_row, open_simulation, run_cell, totals
from april.simulate.cost import Costs, TrainCosts
from april.simulate.world import SimulatedTrainer

SPLIT = {"placement": "split", "num_devices": 4, "train_devices": 1}
SCHEDULES: dict[str, dict[str, Any]] = {
    "sync": {},
    "april": {"over_provision": 1.5, "max_lag_steps": 3},
    "one_step": {},
    "bounded_async": {"max_lag_steps": 2},
    "token_budget": {"tokens_per_step": 40_000, "max_lag_steps": 3, "max_running": 64},
    "replicated": {"over_provision": 1.5, "redundant_samples": 1},
    "truncated": {"window_tokens": 600, "max_lag_steps": 4},
    "windowed": {},
    "tail_batching": {},
    "multi_version": {},
    "rolling": {},
    "longest_first": {},
}


def cell(name: str = "sync", **fields: Any) -> CellConfig:
    tree: dict[str, Any] = {
        "schedule": {"type": name, **SCHEDULES.get(name, {})},
        "workload": {"mean_tokens": 1500, "sigma": 1.0, "max_tokens": 8192, "num_prompts": 64, **fields.pop("workload", {})},
        "cluster": {"num_devices": 4, **fields.pop("cluster", {})},
        "groups_per_step": 6,
        "group_size": 4,
        "steps": 6,
        "warmup_steps": 1,
        **fields,
    }
    return registry.validate(CellConfig, tree, "")  # type: ignore[return-value]


@pytest.mark.parametrize("placement", ["colocated", "split"])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name in registry.names("schedule")])
def test_generated_is_consumed_wasted_or_kept(schedule: str, placement: str) -> None:
    """Under every schedule, with tools, failures, slow rewards and a filter: no token appears or vanishes."""
    config = cell(
        schedule,
        cluster=SPLIT if placement == "split" else {},
        engine={"failures_per_hour": 20.0, "restart_s": 5.0, "report_every_s": 0.5},
        workload={"tools": {"mean_turns": 2, "mean_s": 1.0}},
        rewards={"mean_s": 2.0},
        filter="zero_variance",
    )
    simulation = open_simulation(config, 0)
    for _ in range(config.steps):
        simulation.step()
    simulation.driver.park_all()
    consumed = sum(row["consumed_tokens"] for row in simulation.rows)
    kept = simulation.pool.open_tokens
    generated = simulation.engine.load().generated_tokens
    assert generated == consumed + simulation.pool.wasted_tokens + kept + simulation.engine.lost_tokens
    assert simulation.pool.ledger.balanced and consumed > 0 and simulation.engine.load().kv_tokens == 0
    figures = totals(simulation.rows, simulation.costs)
    shares = ("idle_fraction", "rollout_idle_fraction", "waste_fraction", "stale_token_fraction", "truncated_fraction")
    assert all(0 <= figures[name] <= 1 for name in shares), figures
    assert figures["lag_max"] <= simulation.driver.schedule.max_lag_steps


def test_the_account_would_show_a_lost_token() -> None:
    """Negative control: a pool that forgets what it drops does not balance."""
    simulation = open_simulation(cell("replicated"), 0)
    for _ in range(3):
        simulation.step()
    simulation.driver.park_all()
    consumed = sum(row["consumed_tokens"] for row in simulation.rows)
    assert simulation.pool.wasted_tokens > 0
    assert simulation.engine.load().generated_tokens != consumed + simulation.pool.open_tokens


def test_rows_say_what_describe_batch_says() -> None:
    simulation = open_simulation(cell("april"), 1)
    batches = []
    submit = simulation.trainer.submit
    simulation.trainer.submit = lambda batch: (batches.append(batch), submit(batch))[1]  # type: ignore[method-assign]
    for _ in range(5):
        simulation.step()
    stale = 0.0
    for batch, row in zip(batches, simulation.rows, strict=True):
        slow, fast = describe_batch(batch), batch_row(batch)
        lags = fast["lag_tokens"]
        assert slow["lag_mean"] == pytest.approx(sum(i * n for i, n in enumerate(lags)) / sum(lags))
        assert (slow["lag_max"], slow["batch_tokens"]) == (len(lags) - 1, fast["consumed_tokens"])
        assert slow["length_mean"] == pytest.approx(row["length_mean"])
        stale += slow["stale_token_fraction"]
    assert stale > 0


def test_april_without_over_provision_is_sync_and_lengths_are_paired() -> None:
    sync, _ = run_cell(cell("sync"), 2)
    equal, _ = run_cell(cell("april", schedule={"type": "april", "over_provision": 1.0, "max_lag_steps": 1}), 2)
    more, _ = run_cell(cell("april"), 2)
    names = ("step_s", "consumed_tokens", "lag_tokens")
    assert [[row[n] for n in names] for row in equal] == [[row[n] for n in names] for row in sync]
    assert [row["step_s"] for row in more] != [row["step_s"] for row in sync]
    again, _ = run_cell(cell("sync"), 2)
    assert again == sync and run_cell(cell("sync"), 3)[0] != sync


def test_more_devices_are_never_slower_for_sync() -> None:
    times = [run_cell(cell(cluster={"num_devices": n}), 0)[1]["rollout_s"] for n in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_more_provision_is_more_throughput_and_more_lag_where_memory_allows() -> None:
    figures = [
        run_cell(cell(schedule={"type": "april", "over_provision": alpha, "max_lag_steps": 6}, steps=16, warmup_steps=6), 0)[1]
        for alpha in (1.0, 1.5, 2.0)
    ]
    assert [f["lag_mean"] for f in figures] == sorted(f["lag_mean"] for f in figures) and figures[0]["lag_mean"] == 0
    speed = [f["consumed_tokens_per_s"] for f in figures]
    assert speed == sorted(speed) and speed[2] > 1.2 * speed[0]
    assert 0.5 < figures[2]["lag_mean"] < 1.5  # about alpha - 1, by Little's law


def test_one_step_off_takes_the_longer_of_rollout_and_update() -> None:
    """Fixed lengths of 1000 tokens, 10 ms a step, an update of 30 s: 10 s of rollout are hidden; sync adds them up."""
    times = {}
    for name in ("sync", "one_step"):
        config = cell(
            name, workload={"lengths": "fixed", "mean_tokens": 1000, "prompt_tokens": 1}, engine={"report_every_s": 0.0}
        )
        simulation = open_simulation(config, 0)
        flat = simulation.costs.engine.model_copy(
            update={"step_fixed_s": 0.01, "step_per_sequence_s": 0.0, "weights_read_s": 0.0, "context_token_read_s": 0.0,
                    "compute_per_sequence_s": 0.0, "prefill_per_token_s": 0.0, "prefill_per_token2_s": 0.0, "sync_s": 0.0}
        )  # fmt: skip
        simulation.engine.costs = flat
        for replica in simulation.engine.replicas:
            replica.costs = flat
        costs = Costs(engine=flat, train=TrainCosts(fixed_s=30.0), placement="split")
        trainer = SimulatedTrainer(simulation.clock, costs, simulation.engine)
        simulation.trainer = trainer
        simulation.driver.sources = (*simulation.driver.sources[:2], trainer)
        times[name] = [simulation.step()["step_s"] for _ in range(3)]
    assert times["sync"] == pytest.approx([40.0, 40.0, 40.0])
    assert times["one_step"] == pytest.approx([40.0, 30.0, 30.0])


def test_colocated_training_stops_what_runs() -> None:
    """Overlap on the same devices is no gain: the engine stands still during the update and prefills again."""
    split = run_cell(cell("bounded_async", cluster={**SPLIT, "num_devices": 8, "train_devices": 4}), 0)[1]
    colocated = run_cell(cell("bounded_async"), 0)[1]
    assert colocated["prefill_fraction"] > split["prefill_fraction"]
    assert colocated["train_s"] > 3 and colocated["idle_fraction"] < 1


def test_measured_costs_take_the_place_of_a_cluster(tmp_path: Path) -> None:
    reference = run_cell(cell(), 0)[0]
    cell().resolved_costs().save(tmp_path / "costs.json")
    config = cell().model_copy(update={"cluster": None, "costs": "costs.json"})
    assert run_cell(config, 0, folder=tmp_path)[0] == reference


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups_per_stp": 4}, "did you mean 'groups_per_step'"),
        ({"workload": {"sigmas": 1}}, "did you mean 'sigma'"),
        ({"schedule": {"type": "aprill"}}, "did you mean 'april'"),
        ({"steps": 3, "warmup_steps": 3}, "no step is left"),
        ({"costs": "x.json"}, "not both"),
    ],
)
def test_misspelt_cells_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cell(**fields)
