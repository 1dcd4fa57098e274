"""Measuring the packaged policy: points of every kind, at the sizes that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from april.cli.main import main
from april.config.resolve import resolve
from april.run.calibrate import Effort, measure
from april.simulate.calibrate import Measurements, fit_costs
from april.simulate.cost import Costs

SMALL = [
    "engine.max_running=4",
    "engine.kv_tokens=4096",
    "batch.groups_per_step=2",
    "batch.group_size=2",
    "sampling.max_new_tokens=16",
    "task.size=40",
    "training.skip_zero_advantage=false",
    "training.process=child",
]


def test_every_kind_of_point_is_measured() -> None:
    measured = measure(resolve("quickstart", (), SMALL), Effort(rounds=1, polls=1, batches=1))
    assert {point.batch for point in measured.decode} == {1, 2, 4} and measured.max_running == 4
    assert all(0 < point.step_s < 5 and point.context_tokens > 0 for point in measured.decode)
    assert {(point.samples, point.tokens) for point in measured.prefill} == {(n, t) for n in (1, 4) for t in (16, 128, 512)}
    assert len(measured.updates) == 2
    assert measured.updates[0].tokens < measured.updates[-1].tokens and measured.sample_s >= 0
    costs = fit_costs(measured)
    assert costs.engine.kv_tokens == 4096 and costs.train.update_s(1000) > 0
    assert costs.engine.step_s(4, 400) > 0 and costs.source.startswith("measured: embedded engine, packaged")


def test_the_command_freezes_what_it_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "costs.json"
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "quickstart", *SMALL, "--rounds", "1", "--out", str(out), "--json"])
    told = json.loads(capsys.readouterr().out)
    points = Measurements.model_validate_json(Path(told["points"]).read_text())
    assert ended.value.code == 0 and fit_costs(points) == Costs.load(out)
    assert told["calibration"]["decode"]["points"] == len(points.decode)
