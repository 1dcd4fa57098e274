"""The golden numbers of the method sheets, in float64 and in float32."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.golden_helpers import PATH, RUNNERS, Case, deviation

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


def changed(value: Any, left: list[int]) -> Any:
    """The value with one of its leaves another: the one that `left` counts down to, from 0 on."""
    if isinstance(value, dict):
        return {key: changed(one, left) for key, one in value.items()}
    if isinstance(value, list):
        return [changed(one, left) for one in value]
    left[0] -= 1
    if left[0] != -1 or value is None:
        return value
    if isinstance(value, str):
        return value[::-1]
    return type(value)(1 - value if value in (0, 1) else value * 1.5)


def answers(case: Case) -> bool:
    """Whether the runner gives what is expected; one that refuses its inputs does not."""
    try:
        got = RUNNERS[case["name"]](case)
    except Exception:
        return False
    return all(deviation(got[name], value) <= case["tolerance"] for name, value in case["expected"].items())


@pytest.mark.parametrize("case", cases())
def test_what_a_runner_gives_follows_from_its_inputs(case: Case) -> None:
    given = {"inputs": case["inputs"], "params": case["params"]}
    for leaf in itertools.count():
        moved = changed(given, left := [leaf])
        assert left[0] < 0, "no input decides anything"
        if not answers({**case, **moved}):
            break


def test_the_comparison_sees_a_difference_a_shape_and_what_is_no_number() -> None:
    assert deviation([1.0, 2.0], [1.0, 2.5]) == 0.5 and deviation([[1.0]], [[1.0]]) == 0.0
    assert deviation([1.0], [[1.0], [1.0]]) == math.inf and not deviation([math.nan], [1.0]) <= 1e-3


@absent
def test_every_runner_has_its_case() -> None:
    names = {case["name"] for case in json.loads(PATH.read_text())["cases"]}
    assert set(RUNNERS) <= names and len(RUNNERS) >= 22
