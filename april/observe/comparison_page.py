"""A comparison as a Markdown page: its command, tables and learning curves in numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Column = tuple[str, str, Callable[[float], str]]
MIN_WAITING_FRACTION = 0.1
"""Of its whole run: an arm that waits less for rollouts has no ratio of waiting, which would divide by almost nothing."""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def _decimal(value: float) -> str:
    return f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value:.2g}"


COLUMNS: tuple[Column, ...] = (
    ("accuracy before, %", "accuracy_before", _percent),
    ("accuracy after, %", "accuracy_after", _percent),
    ("tokens generated", "tokens_generated", _thousands),
    ("tokens/s", "tokens_per_s", _whole),
    ("idle slots, %", "idle_fraction", _percent),
    ("waiting for rollouts, s", "rollout_s", _decimal),
    ("all steps, s", "steps_s", _decimal),
    ("whole run, s", "wall_s", _decimal),
    ("s to the target", "seconds_to_target", _decimal),
    ("mean lag", "mean_lag_steps", _decimal),
    ("largest lag", "max_lag_steps", _whole),
    ("length bias", "length_bias", _decimal),
)
TIMES = frozenset({"tokens_per_s", "idle_fraction", "rollout_s", "steps_s", "wall_s", "seconds_to_target"})
"""Columns of the clock, left out where a comparison says so."""


def comparison_page(data: Mapping[str, Any]) -> str:
    """The page of one comparison.

    Args:
        data: what `april compare` wrote into comparison.json.
    """
    name, jobs = data["name"], data["jobs"]
    arms: Mapping[str, Mapping[str, Any]] = data["arms"]
    timed = data.get("times", True)
    clock = _clock(data["target_accuracy"]) if timed else ""
    runs = sorted({len(arm["wall_s"]["runs"]) for arm in arms.values()})
    shown = (column for column in COLUMNS if timed or column[1] not in TIMES)
    columns = (*shown, *((key.replace("_", " "), key, _short) for key in data["measures"]))
    shared = ", ".join(f"`{item}`" for item in data["overrides"])
    lines = [
        f"# Measured: {name}",
        "",
        f"`april compare {name}{f' --jobs {jobs}' if jobs > 1 else ''}`. All arms: recipe `{data['recipe']}`"
        f"{' with ' + shared if shared else ''}; {' to '.join(map(str, runs))} seeds. Mean and half-width of the 95 % interval "
        "(Student's t over seeds). Tokens generated are all that were sampled in training, of filtered and unfinished groups "
        f"too: arms make equally many updates, not equally many tokens. {clock}{data.get('remark', '')}".rstrip(),
        "",
        *table(arms, columns),
        "",
    ]
    if timed and data["speedups"]:
        lines += [
            f"Seconds of `{data['baseline']}` over seconds of the other, paired by seed. Waiting is compared where the other "
            f"waits for {100 * MIN_WAITING_FRACTION:.0f} % of its whole run or more:",
            "",
            *speedups(data["speedups"], arms),
            "",
        ]
    return "\n".join([*lines, "Held-out accuracy in %, mean over seeds, by update:", "", *curves(arms), ""])


def _clock(target: float) -> str:
    return (
        "Tokens/s and seconds to the target count the steps alone, without evaluations. The target is "
        f"{_percent(target)} %, the lowest accuracy that any run ended with. "
    )


def table(arms: Mapping[str, Mapping[str, Any]], columns: tuple[Column, ...]) -> list[str]:
    """A row for each arm."""
    columns = tuple(column for column in columns if any(column[1] in arm for arm in arms.values()))
    rows = [["", *(head for head, _, _ in columns)], ["---"] * (len(columns) + 1)]
    rows += [[name, *(cell(arm.get(key), style) for _, key, style in columns)] for name, arm in arms.items()]
    return ["| " + " | ".join(row) + " |" for row in rows]


def cell(figure: Mapping[str, Any] | None, style: Callable[[float], str]) -> str:
    """Mean, and plus or minus what the interval's half-width is."""
    if not figure:
        return "-"
    mean, high = figure["mean"], figure["high"]
    return style(mean) if high is None or high == mean else f"{style(mean)} ± {style(high - mean)}"


def speedups(rows: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ratios of the waiting for rollouts, of all steps and of the whole run."""

    def ratio(figure: Mapping[str, Any]) -> str:
        interval = "" if figure["low"] is None else f" ({figure['low']:.2f} to {figure['high']:.2f})"
        return f"{figure['mean']:.2f}{interval}"

    head = ["| | waiting for rollouts | all steps | whole run |", "| --- | --- | --- | --- |"]
    waits = {name: ratio(row["rollout"]) if _waits(arms[name]) else "-" for name, row in rows.items()}
    return [*head, *(f"| {name} | {waits[name]} | {ratio(row['steps'])} | {ratio(row['wall'])} |" for name, row in rows.items())]


def _waits(arm: Mapping[str, Any]) -> bool:
    """Whether waiting for rollouts is a share of an arm's run that can be divided by."""
    return bool(arm["rollout_s"]["mean"] >= MIN_WAITING_FRACTION * arm["wall_s"]["mean"])


def curves(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Accuracy at each evaluated step."""
    steps = [step for step, _ in next(iter(arms.values()))["curve"]]
    rows = [["", *(f"{step:g}" for step in steps)], ["---"] * (len(steps) + 1)]
    rows += [[name, *(_percent(value) for _, value in arm["curve"])] for name, arm in arms.items()]
    return ["| " + " | ".join(row) + " |" for row in rows]
