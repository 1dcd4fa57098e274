"""`april evaluate`."""

from __future__ import annotations

import sys
from typing import Any

from april.cli.output import emit, only_json
from april.observe.words import percent


def evaluate_command(recipe: str, overlays: list[str], overrides: list[str], model: str | None, as_json: bool) -> None:
    """Evaluate and print one line a mode."""
    from april.api import evaluate
    from april.observe.console import Progress

    bars: dict[str, Any] = {}

    def show(mode: str, done: int, total: int) -> None:
        bar = bars.get(mode)
        if bar is None:
            bar = bars[mode] = Progress(f"evaluating, {mode}", total, unit="samples", file=sys.stderr)
            bar.__enter__()
        bar.advance(done - bar.done)
        if done == total:
            bar.__exit__(None, None, None)

    with only_json(as_json):
        results = evaluate(recipe, model=model, overrides=overrides, overlays=overlays, progress=show)
    records = {result.mode: result.to_record(0, 0.0) for result in results}
    if as_json:
        keep = (
            "accuracy",
            "failed",
            "low",
            "high",
            "n_problems",
            "num_samples",
            "pass_at",
            "length_mean",
            "length_p50",
            "length_p99",
        )
        emit({mode: {key: record[key] for key in keep} for mode, record in records.items()})
        return
    for result in results:
        record = records[result.mode]
        interval = f"95 % interval {percent(record['low'])} to {percent(record['high'])}"
        lengths = f"length {record['length_mean']:.0f}, p99 {record['length_p99']:.0f}"
        print(
            f"{result.mode:<8} accuracy {percent(record['accuracy'])}, {interval}, on {record['n_problems']} problems; {lengths}"
        )
        if record["num_samples"] > 1:
            print(" " * 9 + "  ".join(f"pass@{k} {percent(value)}" for k, value in record["pass_at"].items()))
        for reason, count in result.failures.most_common(1):
            print(" " * 9 + f"{record['failed']} of {len(result.outcomes)} judgements failed; most often: {reason} ({count})")
