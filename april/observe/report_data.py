"""What a run folder holds, read tolerantly: any file or key may be missing, torn or empty."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from april.observe.sinks import read_jsonl, read_lines
from april.observe.trace import is_number

Record = dict[str, Any]
Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class RunData:
    """The parts of a run folder that a report shows.

    Attributes:
        folder: where they lie.
        name: of the recipe.
        metrics: one record a step, by step; of a repeated step the last counts.
        evaluations, transcripts: in order of step.
        spans, samples, counters: the timeline, in order of time.
        recipe_text: the resolved recipe; empty when missing.
        environment, summary: parsed; empty when missing.
    """

    folder: Path
    name: str
    metrics: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    transcripts: list[Record] = field(default_factory=list)
    spans: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    counters: list[Record] = field(default_factory=list)
    recipe_text: str = ""
    environment: Record = field(default_factory=dict)
    summary: Record = field(default_factory=dict)

    def series(self, y: str, x: str = "step") -> Points:
        """Points of the steps that have both keys as finite numbers."""
        return points(self.metrics, x, y)

    def last(self, key: str) -> float | None:
        """The newest number of this key."""
        return next((float(record[key]) for record in reversed(self.metrics) if finite(record.get(key))), None)

    def modes(self) -> list[str]:
        """Evaluation modes, "sampled" first."""
        found = {str(record.get("mode", "")) for record in self.evaluations}
        return sorted(found, key=lambda mode: (mode != "sampled", mode))

    def evaluated(self, mode: str) -> list[Record]:
        """Evaluations of one mode that have an accuracy."""
        return [record for record in self.evaluations if str(record.get("mode", "")) == mode and finite(record.get("accuracy"))]


def load_run(folder: Path) -> RunData:
    """Read a run folder; see `RunData`."""
    folder = Path(folder)
    recipe_text = _text(folder / "recipe.toml")
    summary = _json(folder / "summary.json")
    timeline = list(read_lines(folder / "timeline.jsonl"))
    spans = [r for r in timeline if "track" in r and finite(r.get("start_s")) and finite(r.get("end_s"))]
    counters = [r for r in timeline if "counter" in r and finite(r.get("time_s")) and finite(r.get("value"))]
    return RunData(
        folder=folder,
        name=_name(recipe_text, summary, folder),
        metrics=_by_step(read_jsonl(folder / "metrics.jsonl")),
        evaluations=_sorted(read_jsonl(folder / "evaluations.jsonl"), "step"),
        transcripts=_sorted(read_jsonl(folder / "transcripts.jsonl"), "step"),
        spans=_sorted([r for r in spans if r["track"] != "sample"], "start_s"),
        samples=_sorted([r for r in spans if r["track"] == "sample"], "start_s"),
        counters=_sorted(counters, "time_s"),
        recipe_text=recipe_text,
        environment=_json(folder / "environment.json"),
        summary=summary,
    )


def points(records: Iterable[Record], x: str, y: str) -> Points:
    """The two columns, where both are finite numbers."""
    pairs = [(float(r[x]), float(r[y])) for r in records if finite(r.get(x)) and finite(r.get(y))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def finite(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a number that can be drawn."""
    return is_number(value) and math.isfinite(value)


def smoothed(values: list[float], window: int) -> list[float]:
    """Centred running mean; the window shrinks at the ends."""
    half = window // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for index in range(len(values)):
        start, end = max(0, index - half), min(len(values), index + half + 1)
        out.append((sums[end] - sums[start]) / (end - start))
    return out


def thinned(xs: list[float], ys: list[float], most: int = 400) -> Points:
    """At most about `most` points that keep the smallest and largest of each stretch, so that no peak is lost."""
    if len(xs) <= most:
        return xs, ys
    stretch = math.ceil(len(xs) / (most // 2))
    kept: list[int] = []
    for start in range(0, len(xs), stretch):
        block = range(start, min(start + stretch, len(xs)))
        kept += sorted({min(block, key=ys.__getitem__), max(block, key=ys.__getitem__)})
    kept = sorted({0, *kept, len(xs) - 1})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def _by_step(records: list[Record]) -> list[Record]:
    by_step = {record["step"]: record for record in records if finite(record.get("step"))}
    return [by_step[step] for step in sorted(by_step)]


def _sorted(records: list[Record], key: str) -> list[Record]:
    return sorted((r for r in records if finite(r.get(key))), key=lambda r: float(r[key]))


def _name(recipe_text: str, summary: Record, folder: Path) -> str:
    try:
        recipe = tomllib.loads(recipe_text)
    except tomllib.TOMLDecodeError:
        recipe = {}
    for value in (recipe.get("name"), summary.get("recipe"), summary.get("name")):
        if isinstance(value, str) and value:
            return value
    return folder.resolve().name


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> Record:
    try:
        value = json.loads(_text(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
