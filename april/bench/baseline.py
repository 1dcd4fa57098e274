"""Ratios that must not get worse. Times are never compared: they belong to a machine, ratios to the code.

A baseline holds what was measured, with a tolerance against noise, and floors: ratios that April promises, whatever was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from april.bench.case import APRIL
from april.core.errors import DataError

Json = Mapping[str, Any]
FORMAT = 1
DEFAULT_TOLERANCE = 0.25
ROOFLINE = "of the bound"
"""Name of the ratio between April's decoding and the bound measured in the same run; it needs no peer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One ratio of a baseline against a result.

    Attributes:
        case, against: which ratio.
        expected: of the baseline; None where there is only a floor.
        lowest: that is accepted: the larger of expected (1 - tolerance) and the floor.
        got: of the result; None where it was not measured.
        reason: why it was not measured.
    """

    case: str
    against: str
    expected: float | None
    lowest: float
    got: float | None
    reason: str = ""

    @property
    def verdict(self) -> Literal["ok", "regression", "not measured"]:
        """A ratio that is exactly at the limit is accepted."""
        if self.got is None:
            return "not measured"
        return "ok" if self.got >= self.lowest else "regression"

    def __str__(self) -> str:
        got = self.reason if self.got is None else f"{self.got:.3f}"
        before = "" if self.expected is None else f"baseline {self.expected:.3f}, "
        limit = f"{before}lowest {self.lowest:.3f}"
        return f"{self.verdict:<12} {self.case} against {self.against}: {got} ({limit})"


def ratios_of(case: Json) -> dict[str, float]:
    """Median ratios of one case: April against each peer, and against the bound."""
    ratios = {name: float(value["median"]) for name, value in case["ratios"].items()}
    return ratios | {ROOFLINE: float(case["engines"][APRIL]["roofline_fraction"]["median"])}


def make_baseline(
    results: Sequence[Json], tolerance: float = DEFAULT_TOLERANCE, floors: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """The ratios of some runs as a baseline.

    Args:
        tolerance: share of a ratio that may be lost before it counts as a regression.
        floors: case -> engine -> ratio that April promises.

    Raises:
        DataError: for a tolerance outside [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise DataError("a tolerance is out of range", where="--tolerance", got=tolerance, expected="0 or more, below 1")
    cases = {
        case["name"]: {name: {"ratio": round(value, 4), "tolerance": tolerance} for name, value in ratios_of(case).items()}
        for case in cases_of(results)
    }
    return {
        "format": FORMAT,
        "commands": [item["command"] for item in results],
        "machine": results[0]["machine"],
        "floors": floors or {},
        "cases": cases,
    }


def cases_of(results: Sequence[Json]) -> list[Json]:
    """The cases of all runs."""
    return [case for item in results for case in item["cases"]]


def check_results(baseline: Json, results: Sequence[Json]) -> list[Finding]:
    """Compare every ratio of the baseline, and every floor, with some runs.

    Raises:
        DataError: when not one of them was measured, so that an empty comparison cannot pass.
    """
    measured = {case["name"]: ratios_of(case) for case in cases_of(results)}
    findings = []
    for case, against, limit, floor in _limits(baseline):
        got = measured.get(case, {}).get(against)
        reason = "" if got is not None else _why_missing(results, case, against)
        expected = limit.get("ratio")
        lowest = max(floor, 0.0 if expected is None else expected * (1 - limit["tolerance"]))
        findings.append(Finding(case, against, expected, lowest, got, reason))
    if all(finding.got is None for finding in findings):
        expected_cases = sorted({finding.case for finding in findings})
        raise DataError("the results have no ratio of the baseline", got=sorted(measured), expected=f"some of {expected_cases}")
    return findings


def _limits(baseline: Json) -> Iterator[tuple[str, str, Json, float]]:
    """(case, engine, measured ratio with tolerance or nothing, floor or 0) of each ratio that has one of them."""
    cases, floors = baseline["cases"], baseline.get("floors", {})
    for case in dict.fromkeys([*cases, *floors]):
        limits, promised = cases.get(case, {}), floors.get(case, {})
        for against in dict.fromkeys([*limits, *promised]):
            yield case, against, limits.get(against, {}), promised.get(against, 0.0)


def _why_missing(results: Sequence[Json], case: str, against: str) -> str:
    found = next(((run, item) for run in results for item in run["cases"] if item["name"] == case), None)
    if found is None:
        return "the case was not run"
    run, item = found
    opened = run["engines"].get(against)
    if opened is None:
        return "the engine was not asked for"
    if "skipped" in opened:
        return str(opened["skipped"])
    return str(item["engines"].get(against, {}).get("failed") or "no round has both")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A file of this format.

    Raises:
        DataError: when it is not there, or is something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{what} cannot be read", where=str(path), got=error) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "cases" not in content:
        raise DataError(f"{what} has another format", where=str(path), expected=f"format {FORMAT} with cases")
    return content
