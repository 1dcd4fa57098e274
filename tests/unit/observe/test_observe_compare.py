from __future__ import annotations

from pathlib import Path

import pytest
from observe_fake_run import make_run

from april.observe.compare import comparison_rows, interpolate, mean_curve, reached_s, write_comparison
from april.observe.report_data import RunData


def test_the_comparison_shows_every_kind_of_run(tmp_path: Path) -> None:
    runs = {
        kind: [make_run(tmp_path / f"{kind}{seed}", 12, schedule=kind, seed=seed) for seed in range(3)]
        for kind in ("april", "sync")
    }
    text = write_comparison(runs, tmp_path / "out" / "compare.html").read_text()
    for words in ("april: 3 runs, sync: 3 runs", "april − sync", "Idle share of slot-time", "By wall clock"):
        assert words in text
    head, april, sync, difference = comparison_rows(runs)
    assert [len(row) for row in (april, sync, difference)] == [len(head)] * 3
    assert "±" in april[head.index("wall clock")] and difference[head.index("wall clock")].startswith("-")


def test_empty_folders_and_odd_names_are_shown_not_raised(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    text = write_comparison({"<b>": [tmp_path / "a"], "none": []}, tmp_path / "c.html").read_text()
    assert "&lt;b&gt;" in text and "<b>:" not in text and "Not shown: no run has evaluations" in text


def test_curves_are_averaged_where_all_have_data() -> None:
    first, second = ([0.0, 10.0], [0.0, 10.0]), ([2.0, 4.0], [4.0, 4.0])
    assert mean_curve([first, second]) == ([2.0, 4.0], [3.0, 4.0])
    assert mean_curve([([0.0, 1.0], [0.0, 0.0]), ([2.0, 3.0], [0.0, 0.0])]) == ([], [])
    assert mean_curve([]) == ([], [])
    assert interpolate([0.0, 2.0], [0.0, 4.0], 0.5) == 1.0


def test_the_time_to_an_accuracy_is_interpolated() -> None:
    records = [{"step": i, "time_s": 10.0 * i, "mode": "sampled", "accuracy": a} for i, a in enumerate((0.2, 0.4, 0.3, 0.6))]
    run = RunData(Path("."), "r", evaluations=records, metrics=[{"step": i, "step_s": 8.0} for i in range(3)])
    assert reached_s(run, 0.3) == pytest.approx(4.0), "evaluations take no part in it"
    assert reached_s(run, 0.1) == 0.0
    assert reached_s(run, 0.9) is None
