"""The golden numbers of the method sheets, in float64 and in float32."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.golden_helpers import PATH, RUNNERS, Case, deviation, numbers

for found in sorted(Path(__file__).parent.glob("runners_*.py")):
    importlib.import_module(f"tests.golden.{found.stem}")

absent = pytest.mark.skipif(not PATH.exists(), reason="../shared/methods/golden_objectives.json is not on this machine")


def cases() -> list[Any]:
    loaded = json.loads(PATH.read_text())["cases"] if PATH.exists() else []
    return [pytest.param(case, id=case["name"]) for case in loaded if case["name"] in RUNNERS] or [
        pytest.param(None, marks=absent)
    ]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", cases())
def test_golden(case: Case, dtype: torch.dtype) -> None:
    got = RUNNERS[case["name"]](case)
    for name, expected in case["expected"].items():
        assert deviation(got[name], expected) <= case["tolerance"], name
    first = next(iter(case["expected"]))
    moved = torch.tensor(numbers(case["expected"][first]), dtype=torch.float64) + 0.5
    assert deviation(got[first], moved.tolist()) > case["tolerance"], "the comparison could not fail"


@absent
def test_every_runner_has_its_case() -> None:
    names = {case["name"] for case in json.loads(PATH.read_text())["cases"]}
    assert set(RUNNERS) <= names and len(RUNNERS) >= 22
