"""Writes docs/results/NAME.json: the figures of studies that the pages quote.

python docs/record_studies.py                    every study of docs/simulator.md, one after another, in one process
python docs/record_studies.py token_budget ...   these

Cells that are in the folder `studies` are not run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from april.observe.sinks import plain
from april.simulate.execute import CellResult, run_study
from april.simulate.study import load_study
from april.simulate.summary import as_json, judge, summarise

RESULTS = Path(__file__).parent / "results"
PUBLISHED = ("token_budget", "one_step", "interruptible", "areal", "roll_flash", "dora", "over_capacity", "scale")
FIGURES = (
    "consumed_tokens_per_s",
    "generated_tokens_per_s",
    "rollout_tokens_per_s",
    "step_s",
    "rollout_s",
    "idle_fraction",
    "lag_mean",
    "lag_max",
    "length_bias",
    "waste_fraction",
    "preemptions_per_step",
)


def main(names: list[str]) -> int:
    """Run the studies, and write a file for each; the exit code is 1 when a figure is outside its range."""
    return max(record(name) for name in names or PUBLISHED)


def record(name: str) -> int:
    """Run one study."""
    study = load_study(name)
    results = run_study(study, Path("studies") / name, on_cell=_say)
    verdicts = judge(study, results)
    content = compact(plain(as_json(study, results, summarise(study, results), verdicts)))
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def compact(content: Mapping[str, Any]) -> dict[str, Any]:
    """Results with the means of what pages quote; ratios and expectations keep their intervals."""
    lines = []
    for line in content["lines"]:
        means = {figure: _short(line["figures"][figure]["mean"]) for figure in FIGURES}
        ratio = line["ratio"] and {key: _short(value) for key, value in line["ratio"].items()}
        lines.append(
            {"arm": line["arm"], "point": line["point"], "ratio": ratio, "cpu_s": _short(line["cpu_s"]), "figures": means}
        )
    head = {key: content[key] for key in ("study", "seeds", "baseline")}
    return {**head, "cpu_s": _short(content["cpu_s"]), "lines": lines, "expectations": content["expectations"]}


def _short(value: float | None) -> float | None:
    """Five digits."""
    return None if value is None else float(f"{value:.5g}")


def _say(result: CellResult, new: bool) -> None:
    how = f"{result.cpu_s:.1f} s of processor time" if new else "known"
    print(f"-- {result.cell.label}, seed {result.cell.seed}: {how}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
