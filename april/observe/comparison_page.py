"""A comparison as a Markdown page: its command, tables and learning curves in numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Column = tuple[str, str, Callable[[float], str]]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _decimal(value: float) -> str:
    return f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value:.2g}"


COLUMNS: tuple[Column, ...] = (
    ("accuracy before, %", "accuracy_before", _percent),
    ("accuracy after, %", "accuracy_after", _percent),
    ("tokens/s in rollout", "tokens_per_s", _whole),
    ("idle slots, %", "idle_fraction", _percent),
    ("rollout, s", "rollout_s", _decimal),
    ("whole run, s", "wall_s", _decimal),
    ("s to the target", "seconds_to_target", _decimal),
    ("mean lag", "mean_lag_steps", _decimal),
    ("largest lag", "max_lag_steps", _whole),
    ("length bias", "length_bias", _decimal),
)


def comparison_page(data: Mapping[str, Any]) -> str:
    """The page of one comparison.

    Args:
        data: what `april compare` wrote into comparison.json.
    """
    name, jobs = data["name"], data["jobs"]
    arms: Mapping[str, Mapping[str, Any]] = data["arms"]
    runs = sorted({len(arm["wall_s"]["runs"]) for arm in arms.values()})
    columns = (*COLUMNS, *((key.replace("_", " "), key, _short) for key in data["measures"]))
    shared = ", ".join(f"`{item}`" for item in data["overrides"])
    lines = [
        f"# Measured: {name}",
        "",
        f"`april compare {name}{f' --jobs {jobs}' if jobs > 1 else ''}`. All arms: recipe `{data['recipe']}`"
        f"{' with ' + shared if shared else ''}; {' to '.join(map(str, runs))} seeds. Mean and half-width of the 95 % interval "
        f"(Student's t over seeds). The target is {_percent(data['target_accuracy'])} %, the lowest accuracy that any "
        f"run ended with. {data.get('remark', '')}".rstrip(),
        "",
        *table(arms, columns),
        "",
    ]
    if data["speedups"]:
        lines += [
            f"Seconds of `{data['baseline']}` over seconds of the other, paired by seed:",
            "",
            *speedups(data["speedups"]),
            "",
        ]
    return "\n".join([*lines, "Held-out accuracy in %, mean over seeds, by update:", "", *curves(arms), ""])


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


def speedups(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ratios of rollout and of the whole run."""

    def ratio(figure: Mapping[str, Any]) -> str:
        interval = "" if figure["low"] is None else f" ({figure['low']:.2f} to {figure['high']:.2f})"
        return f"{figure['mean']:.2f}{interval}"

    head = ["| | rollout | whole run |", "| --- | --- | --- |"]
    return [*head, *(f"| {name} | {ratio(row['rollout'])} | {ratio(row['wall'])} |" for name, row in rows.items())]


def curves(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Accuracy at each evaluated step."""
    steps = [step for step, _ in next(iter(arms.values()))["curve"]]
    rows = [["", *(f"{step:g}" for step in steps)], ["---"] * (len(steps) + 1)]
    rows += [[name, *(_percent(value) for _, value in arm["curve"])] for name, arm in arms.items()]
    return ["| " + " | ".join(row) + " |" for row in rows]
