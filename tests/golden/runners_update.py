"""Golden cases of what makes optimiser steps out of a batch."""

from __future__ import annotations

import torch

from april.algorithms.update import Work, entropy_z, slow_fast
from tests.golden.golden_helpers import Case, Values, runs


@runs("sfpo_quadratic_step")
def _slow_fast(case: Case) -> Values:
    theta = torch.tensor(case["inputs"]["theta0"])
    seen: list[float] = []

    def step(part: int) -> bool:
        seen.append(float(theta))
        theta.sub_(case["params"]["eta"] * case["inputs"]["h"] * theta)
        return True

    steps = case["params"]["K"]
    ends: list[float] = []
    work = Work(lambda part: (step(part), ends.append(float(theta)))[0], parameters=[theta])
    slow_fast(work, fast_steps=steps, alpha=case["params"]["alpha"])
    return {"fast": [*seen[:steps], ends[steps - 1]], "repositioned": seen[steps], "theta_next": float(theta)}


@runs("sfpo_entropy_trigger")
def _trigger(case: Case) -> Values:
    history, params = case["inputs"]["entropy_history"], case["params"]
    work = Work(lambda part: True, entropy=case["inputs"]["entropy_now"], state={"entropies": list(history)})
    slow_fast(work, window_steps=params["window"], threshold=params["tau"])
    z = entropy_z([*history, case["inputs"]["entropy_now"]])
    return {"z": z, "disable_alpha_next_step": float(work.state["off"])}
