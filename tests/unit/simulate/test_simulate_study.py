"""Studies: grids, resumption, summaries, expectations, the command."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from april.cli.main import main
from april.config.load import recipe_names
from april.core.errors import RecipeError
from april.simulate.execute import CellResult, run_study
from april.simulate.report import write_study_report
from april.simulate.study import load_study, make_study
from april.simulate.summary import judge, summarise, table

TREE: dict[str, Any] = {
    "name": "tiny",
    "seeds": 2,
    "base": {
        "groups_per_step": 4,
        "group_size": 2,
        "steps": 4,
        "warmup_steps": 1,
        "workload": {"mean_tokens": 800, "max_tokens": 4096},
        "cluster": {"num_devices": 2},
    },
    "grid": {"workload.sigma": [0.3, 0.9]},
    "arms": {
        "sync": {"schedule": {"type": "sync"}},
        "april": {"schedule": {"type": "april", "max_lag_steps": 3}, "grid": {"schedule.over_provision": [1.5, 2.0]}},
    },
    "expect": [{"what": "faster", "arm": ["april over_provision=1.5", "april over_provision=2.0"], "against": "sync"}],
}
TREE["expect"][0] |= {"low": 1, "high": 9}


def test_a_grid_is_laid_out_in_order_with_arms_that_have_their_own() -> None:
    study = make_study(TREE)
    assert study.arms == ["sync", "april over_provision=1.5", "april over_provision=2.0"] and study.baseline == "sync"
    assert len(study.cells) == 2 * 3 * 2 and len({cell.key for cell in study.cells}) == 12
    first, last = study.cells[0], study.cells[-1]
    assert (first.config.workload.sigma, last.config.workload.sigma, last.seed) == (0.3, 0.9, 1)
    assert last.config.schedule.over_provision == 2.0  # type: ignore[attr-defined]


def test_a_study_goes_on_where_it_stopped_and_repeats_only_what_changed(tmp_path: Path) -> None:
    made: list[str] = []

    def note(result: CellResult, new: bool) -> None:
        made.extend([result.cell.key] if new else [])

    first = run_study(make_study(TREE), tmp_path, on_cell=note)
    assert len(made) == 12
    broken = tmp_path / "cells" / f"{made[3]}.json"
    broken.write_text(broken.read_text()[:100])
    again = run_study(make_study(TREE), tmp_path, on_cell=note)
    assert made[12:] == [made[3]] and [r.figures for r in again] == [r.figures for r in first]
    changed = {**TREE, "arms": {**TREE["arms"], "sync": {"schedule": {"type": "sync"}, "group_size": 3}}}
    run_study(make_study(changed), tmp_path, on_cell=note)
    assert len(made) == 13 + 4
    traces = list((tmp_path / "traces").iterdir())
    assert all(path.suffix == ".json" for path in traces) and len(traces) == 6 + 2
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"rollout", "update", "running"}


def test_a_recording_that_changed_is_simulated_again(tmp_path: Path) -> None:
    lines = [json.dumps({"serial": i, "prompt": f"p{i}", "tokens": [20 + i, 30]}) + "\n" for i in range(8)]
    tree = {"arms": {"sync": {"schedule": {"type": "sync"}}}, "seeds": 1, "base": {
        "groups_per_step": 4, "group_size": 2, "steps": 2, "warmup_steps": 0,
        "workload": {"lengths": "recorded", "path": "lengths.jsonl", "max_tokens": 100}}}  # fmt: skip
    keys, consumed = [], []
    for count in (8, 7):
        (tmp_path / "lengths.jsonl").write_text("".join(lines[:count]))
        results = run_study(make_study(tree, tmp_path), tmp_path / "out")
        keys.append(results[0].cell.key)
        consumed.append([row["consumed_tokens"] for row in results[0].rows])
    assert keys[0] != keys[1] and consumed[0] == [20 + 21 + 22 + 23 + 4 * 30, 24 + 25 + 26 + 27 + 4 * 30]


def fake(study: Any, value: dict[tuple[str, int], float]) -> list[CellResult]:
    row = {"step": 0, "step_s": 1.0, "lag_tokens": [1], "length_bias": 1.0, "consumed_tokens": 5}
    figures = dict.fromkeys(
        ("generated_tokens_per_s", "step_s", "rollout_s", "idle_fraction", "lag_mean", "lag_max", "length_bias",
         "waste_fraction", "preemptions_per_step"), 0.5)  # fmt: skip
    return [
        CellResult(cell, {**figures, "consumed_tokens_per_s": value[cell.arm, cell.seed]}, [row], 0.1, 0.1)
        for cell in study.cells
    ]


def test_ratios_are_paired_by_seed_and_expectations_are_judged(tmp_path: Path) -> None:
    """Seeds 100 and 200 against 150 and 300: 1.5 twice, without spread; the ratio of other pairs would spread."""
    study = make_study({**TREE, "grid": {}})
    value = {("sync", 0): 100.0, ("sync", 1): 200.0}
    value |= {("april over_provision=1.5", 0): 150.0, ("april over_provision=1.5", 1): 300.0}
    value |= {("april over_provision=2.0", 0): 90.0, ("april over_provision=2.0", 1): 180.0}
    results = fake(study, value)
    lines = summarise(study, results)
    assert lines[0].ratio is None and lines[0].figures["consumed_tokens_per_s"].value == 150
    ratios = [value for line in lines[1:] if line.ratio for value in (line.ratio.value, line.ratio.low)]
    assert ratios == pytest.approx([1.5, 1.5, 0.9, 0.9])
    verdict = judge(study, results)[0]
    assert (verdict.arm, verdict.ok, verdict.got.value) == ("april over_provision=1.5", True, pytest.approx(1.5))
    narrow = make_study({**TREE, "grid": {}, "expect": [{**TREE["expect"][0], "low": 1.6}]})
    assert not judge(narrow, fake(narrow, value))[0].ok
    head, rows = table(study, lines)
    assert head[-1] == "x sync" and [row[-1] for row in rows] == ["1", "1.5", "0.9"]
    page = write_study_report(study, results, [verdict], tmp_path / "report.html").read_text()
    assert page.count("<svg") > 6 and "as published" in page and "https://" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": 3}, "did you mean 'seeds'"),
        ({"baseline": "snyc"}, "did you mean 'sync'"),
        ({"arms": {"a": {"schedule": {"type": "sync", "over_provision": 2}}}}, "unknown key"),
        ({"grid": {"workload.sigmma": [1]}}, "did you mean 'sigma'"),
        ({"grid": {"workload.sigma": []}}, "list of values"),
        ({"arms": {}}, "at least one arm"),
        ({"expect": [{"what": "x", "arm": "sync", "low": 0, "high": 1, "where": {"workload.rho": 1}}]}, "not in the grid"),
    ],
)
def test_bad_studies_are_refused_with_the_nearest_name(change: dict[str, Any], message: str) -> None:
    tree = {**TREE, "expect": [], **change}
    with pytest.raises(RecipeError, match=message):
        make_study(tree)


def test_an_unknown_figure_is_refused() -> None:
    study = make_study({**TREE, "grid": {}, "expect": [{"what": "x", "arm": "sync", "figure": "step_z", "low": 0, "high": 1}]})
    with pytest.raises(RecipeError, match="did you mean 'step_s'"):
        judge(study, fake(study, {(arm, seed): 1.0 for arm in study.arms for seed in (0, 1)}))


@pytest.mark.parametrize("name", recipe_names("study"))
def test_every_packaged_study_is_valid(name: str) -> None:
    study = load_study(name)
    assert study.cells and study.config.description and study.baseline in study.arms
    for cell in study.cells:
        assert cell.config.resolved_costs(study.folder).num_replicas >= 1


def test_an_unknown_study_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'schedules'"):
        load_study("schedule")


def test_the_command_prints_a_table_and_one_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(
        'name = "tiny"\nseeds = 1\n[base]\nsteps = 2\nwarmup_steps = 0\ngroups_per_step = 2\ngroup_size = 2\n'
        'workload = { mean_tokens = 300, max_tokens = 600 }\n[arms.sync]\nschedule = { type = "sync" }\n'
        '[[expect]]\nwhat = "never"\narm = "sync"\nlow = 0\nhigh = 0.001\n'
    )
    for arguments, code in (([], 0), (["--check"], 1), (["--json", "base.steps=2"], 0)):
        with pytest.raises(SystemExit) as done:
            main(["simulate", str(file), *arguments, "--out", str(tmp_path / "out")])
        assert done.value.code == code
    out, err = capsys.readouterr()
    payload = json.loads(out.splitlines()[-1])
    assert payload["study"] == "tiny" and payload["expectations"][0]["ok"] is False
    assert "consumed tok/s" in out and "OUTSIDE" in out and "-- 1/1 sync, seed 0" in err
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["lines"][0]["figures"]["consumed_tokens_per_s"]["mean"] > 0 and (tmp_path / "out" / "report.html").is_file()


def test_the_study_of_the_documentation_is_one() -> None:
    page = (Path(__file__).parents[3] / "docs" / "simulator.md").read_text(encoding="utf-8")
    study = make_study(tomllib.loads(page.split("```toml study\n")[1].split("```")[0]))
    assert len(study.cells) == 2 * 5 * 3


def test_cases_change_several_fields_together() -> None:
    cases = [{"label": "small", "groups_per_step": 2}, {"label": "big", "groups_per_step": 8, "workload": {"sigma": 0.2}}]
    study = make_study({**TREE, "grid": {"case": cases}, "expect": [{**TREE["expect"][0], "where": {"case": "big"}}]})
    assert study.points == [(("case", "small"),), (("case", "big"),)]
    assert [(c.config.groups_per_step, c.config.workload.sigma) for c in (study.cells[0], study.cells[-1])] == [
        (2, 0.7),
        (8, 0.2),
    ]
    with pytest.raises(RecipeError, match="a case is a table with a label"):
        make_study({**TREE, "grid": {"case": [{"groups_per_step": 2}]}, "expect": []})
