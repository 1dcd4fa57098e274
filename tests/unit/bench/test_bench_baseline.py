"""The guard against regressions: ratios with tolerances, and what was not measured is said by name."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from april.bench.baseline import ROOFLINE, check_results, make_baseline, read_json
from april.cli.main import main
from april.core.errors import DataError


def results_with(static: float = 4.0, roofline: float = 0.5) -> dict[str, Any]:
    engine = {"roofline_fraction": {"median": roofline}}
    ratios = {"transformers-static": {"median": static, "low": 3.0, "high": 5.0, "num": 3}}
    return {
        "format": 1,
        "command": "april bench engine",
        "machine": {"cores": 2},
        "engines": {"april": {"version": "0"}, "transformers-static": {"version": "5"}},
        "cases": [
            {
                "name": "3m/lognormal/256",
                "ratios": ratios,
                "engines": {"april": engine, "transformers-static": engine},
            }
        ],
    }


def test_a_baseline_holds_ratios_and_no_times():
    baseline = make_baseline([results_with()], tolerance=0.2)
    assert baseline["cases"] == {
        "3m/lognormal/256": {
            "transformers-static": {"ratio": 4.0, "tolerance": 0.2},
            ROOFLINE: {"ratio": 0.5, "tolerance": 0.2},
        }
    }
    with pytest.raises(DataError, match="tolerance"):
        make_baseline([results_with()], tolerance=1.0)


def test_within_the_tolerance_passes_and_below_it_fails_by_name():
    baseline = make_baseline([results_with(static=4.0)], tolerance=0.25)
    verdicts = [finding.verdict for finding in check_results(baseline, [results_with(static=3.0)])]
    assert verdicts == ["ok", "ok"]  # 3.0 is exactly 4.0 (1 - 0.25)
    worse = check_results(baseline, [results_with(static=2.99)])
    assert [(finding.verdict, finding.against) for finding in worse] == [("regression", "transformers-static"), ("ok", ROOFLINE)]
    assert "3m/lognormal/256 against transformers-static: 2.990" in str(worse[0])
    assert [f.verdict for f in check_results(baseline, [results_with(roofline=0.3)])] == ["ok", "regression"]


def test_a_ratio_below_its_floor_fails_within_the_tolerance():
    floors = {"3m/lognormal/256": {"transformers-static": 3.5, "vllm": 1.5}, "25m/fixed/256": {"vllm": 1.0}}
    baseline = make_baseline([results_with(static=4.0)], tolerance=0.25, floors=floors)
    static, roofline, vllm, other = check_results(baseline, [results_with(static=3.4)])
    assert (static.verdict, static.lowest) == ("regression", 3.5), "4.0 with its tolerance alone accepts 3.0"
    assert "3.400 (baseline 4.000, lowest 3.500)" in str(static)
    assert (roofline.verdict, roofline.lowest) == ("ok", 0.375)
    assert (vllm.verdict, vllm.expected, vllm.reason) == ("not measured", None, "the engine was not asked for")
    assert (other.verdict, other.reason) == ("not measured", "the case was not run")
    assert check_results(baseline, [results_with(static=3.5)])[0].verdict == "ok"


def test_a_floor_alone_is_checked():
    baseline = {"format": 1, "floors": {"3m/lognormal/256": {"transformers-static": 3.5}}, "cases": {}}
    assert [str(finding) for finding in check_results(baseline, [results_with(static=3.0)])] == [
        "regression   3m/lognormal/256 against transformers-static: 3.000 (lowest 3.500)"
    ]


def test_several_runs_make_one_baseline():
    other = deepcopy(results_with(static=2.0))
    other["cases"][0]["name"], other["command"] = "25m/fixed/256", "april bench engine --model 25m"
    baseline = make_baseline([results_with(), other])
    assert {name: case["transformers-static"]["ratio"] for name, case in baseline["cases"].items()} == {
        "3m/lognormal/256": 4.0,
        "25m/fixed/256": 2.0,
    }
    assert baseline["commands"] == ["april bench engine", "april bench engine --model 25m"]
    assert [finding.verdict for finding in check_results(baseline, [other, results_with()])] == ["ok"] * 4


def test_the_kept_results_reach_the_floors_of_the_packaged_baseline():
    root = Path(__file__).parents[3]
    baseline = read_json(root / "benchmarks" / "baselines" / "cpu.json", "the baseline")
    assert baseline["floors"]["3m/fixed/256"]["transformers-static"] == 1.5
    kept = [json.loads(path.read_text()) for path in sorted((root / "docs" / "results" / "speed").glob("engine*.json"))]
    if not kept:
        pytest.skip("no results are kept")
    assert [str(finding) for finding in check_results(baseline, kept) if finding.verdict == "regression"] == []


def test_a_missing_peer_is_named_with_its_reason_and_does_not_fail():
    baseline, results = make_baseline([results_with()]), results_with()
    results["engines"]["transformers-static"] = {"skipped": "not installed (ImportError)"}
    results["cases"][0]["ratios"] = {}
    missing, roofline = check_results(baseline, [results])
    assert (missing.verdict, missing.reason, roofline.verdict) == ("not measured", "not installed (ImportError)", "ok")
    del results["engines"]["transformers-static"]
    assert check_results(baseline, [results])[0].reason == "the engine was not asked for"


def test_results_without_any_ratio_of_the_baseline_are_refused():
    baseline, other = make_baseline([results_with()]), deepcopy(results_with())
    other["cases"][0]["name"] = "1m/fixed/16"
    with pytest.raises(DataError, match="no ratio of the baseline"):
        check_results(baseline, [other])


def written(folder: Path, name: str, content: dict[str, Any]) -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "check", *arguments])
    return int(stop.value.code or 0)


def test_the_command_exits_with_1_on_a_regression_and_names_it(tmp_path, capsys):
    good, bad = written(tmp_path, "good.json", results_with()), written(tmp_path, "bad.json", results_with(static=1.0))
    baseline = str(tmp_path / "baselines" / "cpu.json")
    assert run_command(good, "--baseline", baseline, "--write", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"baseline": baseline}
    assert run_command(good, "--baseline", baseline) == 0
    assert "regression" not in capsys.readouterr().out
    content = json.loads(Path(baseline).read_text())
    content["floors"] = {"3m/lognormal/256": {"transformers-static": 4.5}}
    Path(baseline).write_text(json.dumps(content))
    assert run_command(good, "--baseline", baseline, "--write") == 0
    assert run_command(good, "--baseline", baseline) == 1, "the floor stays when the baseline is written again"
    assert "4.000 (baseline 4.000, lowest 4.500)" in capsys.readouterr().out
    assert run_command(bad, "--baseline", baseline) == 1
    assert "regression   3m/lognormal/256 against transformers-static: 1.000" in capsys.readouterr().out
    assert run_command(bad, "--baseline", baseline, "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"ok": False, "regressions": ["3m/lognormal/256 against transformers-static"]}


def test_a_file_that_is_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for content in ("{", "[]", '{"format": 2, "cases": []}'):
        path.write_text(content)
        with pytest.raises(DataError, match="results"):
            read_json(path, "the results")
    assert read_json(Path(written(tmp_path, "y.json", {"format": 1, "cases": []})), "the results")["cases"] == []
