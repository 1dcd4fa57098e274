"""Steers how much runs at once, once a step: the ratio and the crowding of KV memory, by measured throughput.

Ratio. What a ratio is worth depends on the tail of the lengths, on how far the engine is from saturation, on the cost of
computing resumed prefixes again and on how often a deadline holds up a cut. Crowding. A sample holds some
E[L^2] / (2 E[L]) response tokens besides its prompt while it runs (`LengthSums`); how far KV memory may be oversubscribed depends
on what a preemption costs. All of that shows in one number, response tokens per second of engine time, since nothing that is
recycled is wasted. So settings are tried where the best one so far has an untried neighbour, for a few steps each, the first of
which is not counted; crowding only where KV memory is scarce. Of settings within half a percent of the best the lowest is kept.

Pass rate. Filters take groups away, so the ratio is of the groups that will be kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from april.rollout.view import View

LADDER = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
CROWDING = (1.0, 1.5, 3.0)
"""Samples in the engine over those that KV memory holds; it admits what fits, so more than 1 is possible."""
FIRST_RATIO, FIRST_CROWDING = 3.0, 1.0
"""Where the search begins, if the bound allows it: more in flight is mostly faster, and the search comes down where it is not."""
SETTLING_STEPS, MEASURED_STEPS = 1, 3
EQUAL = 0.995
"""Throughputs closer than this count as equal, and the lower setting wins: its data is younger."""
ROUNDS_UNTIL_RETRY = 10
"""Measurements of one setting in succession until its neighbours are tried again: lengths drift while a policy learns."""
SCARCE = 1.5
"""KV memory is scarce when all samples in flight would ask for more than it holds divided by this."""
MIN_KEPT_FRACTION = 0.2

State = dict[str, Any]
Arm = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Steering:
    """What a step is filled by.

    Attributes:
        ratio: groups in flight over groups per step.
        max_running: samples in the engine; None where nothing is known yet.
    """

    ratio: float
    max_running: int | None


def ladder(max_lag_steps: int) -> tuple[float, ...]:
    """The ratios worth trying under a bound: admission lets no more than (L + 1) batches be open."""
    return tuple(ratio for ratio in LADDER if ratio <= max_lag_steps + 1)


def steer(state: State | None, view: View, max_lag_steps: int) -> State:
    """The state for the step that begins; JSON, for the memo.

    Args:
        state: that of the step before; None at the start of a run.
    """
    ratios, now = ladder(max_lag_steps), _counters(view)
    if state is None:
        first = max(index for index, ratio in enumerate(ratios) if ratio <= FIRST_RATIO)
        begun = {"arm": [first, CROWDING.index(FIRST_CROWDING)], "rates": {}, "kept": 1.0, "stays": 0}
        return {"step": view.version, "at": now, "steps": 0, "sum": [0, 0.0], **begun}
    new = {name: value - state["at"][name] for name, value in now.items()}
    judged = new["kept"] + new["dropped"]
    kept = state["kept"] if judged <= 0 else (state["kept"] + new["kept"] / judged) / 2
    out = {**state, "step": view.version, "at": now, "kept": kept, "steps": state["steps"] + 1}
    if out["steps"] > SETTLING_STEPS:
        out["sum"] = [state["sum"][0] + new["generated"], state["sum"][1] + new["busy_s"]]
    if out["steps"] == SETTLING_STEPS + MEASURED_STEPS:
        in_flight = ratios[-1] * view.groups_per_step * view.group_size
        scarce = in_flight * view.lengths.resident_tokens * SCARCE > view.caps.kv_tokens
        out |= _measured(out, len(ratios), scarce)
    return out


def steering(state: State, view: View, max_lag_steps: int) -> Steering:
    """What the state asks for."""
    ratio, crowding = state["arm"]
    target = ladder(max_lag_steps)[ratio] / max(MIN_KEPT_FRACTION, state["kept"])
    resident = view.lengths.resident_tokens
    if math.isnan(resident):
        return Steering(target, None)
    return Steering(target, max(1, int(CROWDING[crowding] * view.caps.kv_tokens / resident)))


def _measured(state: State, num_ratios: int, scarce: bool) -> State:
    """The present setting has its throughput: choose the next."""
    present: Arm = (state["arm"][0], state["arm"][1])
    tokens, busy_s = state["sum"]
    rates = {_arm(name): rate for name, rate in state["rates"].items()}
    if busy_s > 0:
        rates[present] = tokens / busy_s
    stays = state["stays"] + 1
    if stays >= ROUNDS_UNTIL_RETRY:
        rates, stays = {arm: rate for arm, rate in rates.items() if arm == present}, 0
    arm = next_arm(rates, num_ratios, present, scarce)
    named = {f"{ratio},{crowding}": rate for (ratio, crowding), rate in rates.items()}
    return {"rates": named, "arm": list(arm), "steps": 0, "sum": [0, 0.0], "stays": stays if arm == present else 0}


def next_arm(rates: Mapping[Arm, float], num_ratios: int, present: Arm, scarce: bool) -> Arm:
    """An untried neighbour of the best setting, or the best one.

    Args:
        rates: throughput of each setting (index of the ratio, index of the crowding) that was tried.
        present: kept when nothing was measured.
        scarce: whether KV memory limits what runs; without it crowding makes no difference.
    """
    if not rates:
        return present
    enough = EQUAL * max(rates.values())
    ratio, crowding = best = min(arm for arm, rate in rates.items() if rate >= enough)
    crowded: list[Arm] = [(ratio, crowding - 1), (ratio, crowding + 1)] if scarce else []
    for neighbour in (*crowded, (ratio + 1, crowding), (ratio - 1, crowding)):
        if 0 <= neighbour[0] < num_ratios and 0 <= neighbour[1] < len(CROWDING) and neighbour not in rates:
            return neighbour
    return best


def _arm(name: str) -> Arm:
    ratio, _, crowding = name.partition(",")
    return int(ratio), int(crowding)


def _counters(view: View) -> dict[str, float]:
    load = view.load
    return {
        "generated": load.generated_tokens,
        "busy_s": load.busy_s,
        "kept": view.num_kept_groups,
        "dropped": view.num_dropped_groups,
    }
