"""The planner: candidates that make sense, a front that is one, and rows that are recipes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from april.cli.main import main
from april.config.resolve import resolve
from april.core.errors import AprilError, DataError, RecipeError
from april.run.checks import check_recipe
from april.simulate import plan as plan_module
from april.simulate.candidates import Candidate, candidates, front, scale_of, smallest_tp, splits
from april.simulate.cost import Cluster, Costs, TrainCosts
from april.simulate.plan import Plan, PlanRequest, PlanRow, make_plan, ranks
from april.simulate.plan_lengths import parse_lengths
from april.simulate.plan_recipe import command, write_overlays
from april.simulate.plan_report import write_plan_report
from april.simulate.workload import Workload

SMALL = Workload(mean_tokens=600, sigma=1.0, max_tokens=4096, num_prompts=64)
REQUEST: dict[str, Any] = {"model": "Qwen2.5-1.5B", "gpus": 4, "groups_per_step": 4, "group_size": 4, "workload": SMALL}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "RUNGS", ((2, 1, 1), (3, 1, 1)))


def test_a_front_is_what_nothing_beats() -> None:
    points = {0: (10.0, 0.0), 1: (9.0, 1.0), 2: (12.0, 1.0), 3: (12.0, 1.0), 4: (12.05, 2.0), 5: (20.0, 3.0)}
    assert front(points) == [0, 2, 4, 5]
    assert front(points, worth=0.01) == [0, 2, 5]
    assert ranks(points) == {0: 0, 2: 0, 4: 0, 5: 0, 3: 1, 1: 2}


def test_ranks_against_all_pairs() -> None:
    points = {i: (float((i * 7) % 11), float((i * 5) % 7)) for i in range(40)}
    first = {i for i, rank in ranks(points).items() if rank == 0}
    for (i, (rate, lag)), (j, (other, old)) in itertools.permutations(points.items(), 2):
        better = other >= rate and old <= lag and (other > rate or old < lag)
        assert not (i in first and better), (i, j)


def test_candidates_keep_to_what_is_acceptable() -> None:
    sizes = {"mean_tokens": 1000.0, "groups_per_step": 4, "group_size": 4, "num_devices": 8, "tp": 2}
    found = candidates(max_lag_steps=2, **sizes)  # type: ignore[arg-type]
    assert found[0].schedule["type"] == "sync" and {c.schedule["type"] for c in found} >= {"april", "one_step", "bounded_async"}
    assert max(c.schedule.get("max_lag_steps", 0) for c in found) == 2
    ratios = [(c.schedule["over_provision"], c.schedule["max_lag_steps"]) for c in found if c.schedule["type"] == "april"]
    assert all(ratio == "adaptive" or ratio <= lag + 1 for ratio, lag in ratios)
    assert {lag for ratio, lag in ratios if ratio == "adaptive"} == {1, 2}
    assert [c.train_devices for c in found if c.schedule["type"] == "multi_version"] == [2, 4]
    assert {c.train_devices for c in found} == {None, 2, 4}
    on_policy = candidates(max_lag_steps=0, **sizes)  # type: ignore[arg-type]
    assert [c.schedule["type"] for c in on_policy] == ["sync", "longest_first"]
    assert splits(1, 1) == [] and splits(2, 1) == [1] and splits(16, 4) == [4, 8]


def test_replicas_and_scale() -> None:
    assert smallest_tp(Cluster(model="Qwen3-8B", num_devices=8), 16384) == 1
    assert smallest_tp(Cluster(model="Qwen2-VL-72B", num_devices=8), 40960) == 4
    with pytest.raises(RecipeError, match="does not fit"):
        smallest_tp(Cluster(model="Qwen3-235B-A22B", num_devices=4), 16384)
    assert scale_of(8192, 512, 128, 1, 1024) == 8 and scale_of(256, 32, 8, 1, 1024) == 1
    assert scale_of(8192, 512, 4, 1, 1024) == 1, "four replicas remain"


def test_a_plan_is_a_front_of_recipes(quick: None, tmp_path: Path) -> None:
    plan = make_plan(PlanRequest(**REQUEST, max_lag_steps=2), now=lambda: 0.0)
    points = [(row.figures["consumed_tokens_per_s"], row.figures["lag_mean"]) for row in plan.front]
    assert plan.complete and points == sorted(points) and [lag for _, lag in points] == sorted(lag for _, lag in points)
    assert plan.front[0].candidate.schedule["type"] in ("sync", "longest_first") and points[-1][0] > 1.1 * points[0][0]
    assert max(row.figures["lag_max"] for row in plan.rows) <= 2
    commands = [command("quickstart", file) for file in write_overlays(plan, tmp_path / "rows")]
    page = write_plan_report(plan, tmp_path / "plan.html", commands).read_text()
    assert commands[0] == f"april train quickstart --overlay {tmp_path}/rows/sync-4-in-turn.toml" and commands[-1] in page


def planned(tp: int, *candidates: Candidate, **request: Any) -> Plan:
    rows = tuple(PlanRow(one, {"lag_mean": place}, 30, True) for place, one in enumerate(candidates))
    return Plan(PlanRequest(model="Qwen3-8B", **request), rows, tp, 1, True, 0.0)


def test_rows_are_overlays_of_recipes(tmp_path: Path) -> None:
    """All candidates are valid recipes; model, lengths, batch, engines and devices are those of the plan."""
    sizes = {"mean_tokens": 4000.0, "groups_per_step": 16, "group_size": 4, "num_devices": 8}
    for tp in (1, 2):
        plan = planned(tp, *candidates(max_lag_steps=2, tp=tp, **sizes), groups_per_step=16, group_size=4)  # type: ignore[arg-type]
        for row, file in zip(plan.front, write_overlays(plan, tmp_path / str(tp)), strict=True):
            recipe, train = resolve("quickstart", (file,)).recipe, row.candidate.train_devices
            check_recipe(recipe)
            assert recipe.model.path == "Qwen/Qwen3-8B" and recipe.sampling.max_new_tokens == 16384
            assert (recipe.batch.groups_per_step, recipe.batch.group_size) == (16, 4)
            assert recipe.schedule.type == row.candidate.schedule["type"]
            assert (recipe.engine.replicas, recipe.engine.tensor_parallel) == ((8 - (train or 0)) // tp, tp)
            assert recipe.training.ranks == (train or 8)
            placement = (recipe.placement.devices, recipe.placement.trainer.gpus, recipe.placement.engine.gpus)
            if train is not None:
                assert recipe.backend == "ray" and placement == ("split", 1, tp)
            elif tp == 1:
                assert recipe.backend == "ray" and placement == ("shared", 1, 1)
            else:
                assert recipe.backend == "local" and "for the environment to say" in file.read_text()


def test_rows_of_measured_constants_leave_engine_and_policy_alone(tmp_path: Path) -> None:
    plan = planned(1, Candidate({"type": "april", "over_provision": "adaptive", "max_lag_steps": 2}), hardware="c.json", gpus=1)
    (file,) = write_overlays(plan, tmp_path)
    recipe = resolve("quickstart", (file,)).recipe
    assert (recipe.engine.type, recipe.model.path, recipe.training.process) == ("embedded", "packaged", "main")
    assert (
        recipe.schedule.over_provision == "adaptive"
        and file.name == "april-over_provision-adaptive-max_lag_steps-2-1-in-turn.toml"
    )


def test_a_search_ends_when_its_time_is_up(quick: None) -> None:
    ticks = itertools.count()
    plan = make_plan(PlanRequest(**REQUEST, seconds=5), now=lambda: float(next(ticks)))
    assert not plan.complete and len(plan.rows) < 10 and plan.sync.steps == 2


def cut_short(stop_after: int) -> tuple[Plan, list[list[int]]]:
    """A search of five candidates with told figures that ends after so many simulations, and its rounds."""
    rates = {0: (10.0, 0.0), 1: (11.0, 2.0), 2: (20.0, 1.0), 3: (30.0, 2.0), 4: (25.0, 3.0)}
    rounds: list[list[int]] = []

    def simulate(index: int, steps: int, warmup: int, seeds: int) -> dict[str, float]:
        rounds[-1].append(index)
        rate, lag = rates[index]
        return {"consumed_tokens_per_s": rate / steps, "lag_mean": lag}

    time_is_up = lambda: sum(map(len, rounds)) >= stop_after  # noqa: E731
    known, complete = plan_module._search(5, simulate, time_is_up, lambda _line: rounds.append([]))
    pool = [Candidate({"type": "sync", "number": index}) for index in range(5)]
    rows = plan_module._rows(pool, known, 1)
    return Plan(PlanRequest(model="Qwen3-8B"), rows, 1, 1, complete, 0.0), rounds


@pytest.mark.parametrize(
    ("stop_after", "front_of", "steps"),
    [(99, [0, 2, 3], 3), (7, [0, 2, 3], 2), (8, [0, 2, 3], 3), (4, [0, 2, 3], 2), (2, [0, 1], 2)],
)
def test_a_round_that_is_cut_short_never_hides_the_front(
    quick: None, monkeypatch: pytest.MonkeyPatch, stop_after: int, front_of: list[int], steps: int
) -> None:
    """0, 2 and 3 are the front of five: they are first of the four in the second round, which counts once it has them all."""
    monkeypatch.setattr(plan_module, "KEPT", 0.8)
    plan, rounds = cut_short(stop_after)
    assert [row.candidate.schedule["number"] for row in plan.front] == front_of
    assert {row.steps for row in plan.front} == {steps} and plan.complete == (stop_after == 99)
    assert all([0, 3, 2, 4][: len(second)] == second for second in rounds[1:])


def test_a_larger_cluster_is_simulated_small_and_told_whole(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {**REQUEST, "gpus": 8, "groups_per_step": 32, "max_lag_steps": 1}
    whole = make_plan(PlanRequest(**large), now=lambda: 0.0)
    monkeypatch.setattr(plan_module, "MAX_SAMPLES", 64)
    scaled = make_plan(PlanRequest(**large), now=lambda: 0.0)
    assert (whole.scale, scaled.scale) == (1, 2)
    rates = [plan.sync.figures["consumed_tokens_per_s"] for plan in (whole, scaled)]
    assert rates[1] == pytest.approx(rates[0], rel=0.4)
    sizes = {row.candidate.schedule.get("tokens_per_step") for plan in (whole, scaled) for row in plan.rows} - {None}
    assert len(sizes) == 1 and max(row.candidate.train_devices or 0 for row in scaled.rows) == 4


def test_measured_constants_are_hardware(quick: None, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    Costs(train=TrainCosts(fixed_s=1.0)).save(file)
    plan = make_plan(PlanRequest(**{**REQUEST, "gpus": 1, "hardware": str(file)}), now=lambda: 0.0)
    assert {row.candidate.train_devices for row in plan.rows} == {None}
    with pytest.raises(RecipeError, match="one replica"):
        make_plan(PlanRequest(**{**REQUEST, "hardware": str(file)}))


def test_lengths_are_read_from_words_and_files(tmp_path: Path) -> None:
    told = parse_lengths("mean=800, sigma=0.9,max=4096,prompt=50")
    assert (told.mean_tokens, told.sigma, told.max_tokens, told.prompt_tokens) == (800, 0.9, 4096, 50)
    (tmp_path / "trace.csv").write_text("ContextTokens,GeneratedTokens\n10,5\n20,70\n")
    recorded = parse_lengths(str(tmp_path / "trace.csv"))
    assert (recorded.lengths, recorded.max_tokens, recorded.prompt_tokens) == ("recorded", 70, 20)
    (tmp_path / "other.csv").write_text("GeneratedTokens\n90\n")
    assert parse_lengths(str(tmp_path)).max_tokens == 90
    (tmp_path / "lengths.jsonl").write_text('{"prompt": "p", "prompt_tokens": 5000, "tokens": [3, 60]}\n')
    assert (parse_lengths(str(tmp_path)).max_tokens, parse_lengths(str(tmp_path)).prompt_tokens) == (60, 5000)


@pytest.mark.parametrize("text", ["mean=x", "men=5", "nowhere.csv", "mean=9000,max=100"])
def test_lengths_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(AprilError) as caught:
        parse_lengths(text)
    assert isinstance(caught.value, DataError | RecipeError)


def test_the_command(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--groups", "4", "--group-size", "4", "--gpus", "4", "--max-lag", "1"]
    common = ["plan", "--model", "Qwen2.5-1.5B", "--lengths", "mean=600,max=2048", *sizes, "--out", str(tmp_path), "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*common, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and (tmp_path / "plan.html").is_file()
    assert all(Path(row["command"].split()[-1]).is_file() for row in told["front"])
    with pytest.raises(SystemExit) as ended:
        main([*common[:2], "Qwen3-8b", *common[3:]])
    assert ended.value.code == 2 and "Qwen3-8B" in capsys.readouterr().err
