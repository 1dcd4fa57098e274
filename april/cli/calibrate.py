"""`april calibrate`: measure once, fit, freeze."""

from __future__ import annotations

import sys
from pathlib import Path

from april.cli.output import emit, only_json
from april.observe.words import percent

BUSY = 0.15
"""A quiet machine is fitted better than this, in the median over decode steps."""


def calibrate_command(recipe: str, overlays: list[str], overrides: list[str], out: Path, rounds: int, as_json: bool) -> None:
    """Write the constants of a recipe's engine and trainer to a file that studies and plans take as hardware."""
    with only_json(as_json):
        from april.api import resolve_recipe
        from april.run.calibrate import Effort, measure
        from april.simulate.calibrate import fit_costs

        measured = measure(resolve_recipe(recipe, overlays, overrides), Effort(rounds=rounds), _say)
        costs = fit_costs(measured)
        out.parent.mkdir(parents=True, exist_ok=True)
        costs.save(out)
        points = out.with_suffix(".points.json")
        points.write_text(measured.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if as_json:
        emit({"costs": str(out), "points": str(points), **costs.model_dump(mode="json")})
        return
    engine, train, fit = costs.engine, costs.train, costs.calibration
    table = ", ".join(f"{batch}: {seconds * 1e3:.3g}" for batch, seconds in engine.step_by_batch_s)
    print(f"decode step   {engine.context_token_read_s:.3g} s K + ms by sequences: {table}")
    taken = f"{engine.admission_s:.3g} s + {engine.admit_s:.3g} a sample"
    print(f"taking in     {taken} + {engine.prefill_per_token_s:.3g} L + {engine.prefill_per_token2_s:.3g} L^2")
    print(f"update        {train.fixed_s:.3g} s + {train.per_token_s:.3g} T;  new weights {engine.sync_s:.3g} s")
    if fit is not None:
        for name, error in (("decode", fit.decode), ("prefill", fit.prefill), ("updates", fit.updates)):
            median, largest = percent(error.median_fraction), percent(error.max_fraction)
            print(f"fit of {name:<8} {error.points} points, median error {median}, largest {largest}")
    if fit is not None and fit.decode.median_fraction > BUSY:
        print("the fit is poor: was the machine busy? Measure again when it is not")
    print(f'written to {out}; take it as `costs = "{out}"` in a study, or `april plan --hardware {out}`')


def _say(line: str) -> None:
    print(f"-- {line}", file=sys.stderr, flush=True)
