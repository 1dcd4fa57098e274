"""report.html: a run on one page that needs no network, no server and no other file."""

from __future__ import annotations

import json
import os
import tomllib
from html import escape
from pathlib import Path
from typing import Any

from april.observe.report_data import Record, RunData, finite, load_run
from april.observe.report_page import folded, missing, page, section, table, tile
from april.observe.report_sections import lag_section, learner_section, learning_section, lengths_section, time_section
from april.observe.report_timeline import timeline_section
from april.observe.report_transcripts import transcripts_section
from april.observe.words import MISSING, duration, number, percent


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder, finished or not; whatever is missing is named in its place.

    Args:
        run_dir: the run folder.
        out: the file to write; `report.html` in the run folder by default.

    Returns:
        The path of the file.
    """
    run = load_run(Path(run_dir))
    target = Path(out) if out is not None else Path(run_dir) / "report.html"
    return write_page(target, page(f"{run.name}: April report", render(run)))


def write_page(target: Path, text: str) -> Path:
    """Write a page so that a reader who reloads never sees half of it."""
    aside = target.with_suffix(target.suffix + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, target)
    return target


def render(run: RunData) -> str:
    """The body of the page."""
    return "".join(
        (
            _header(run),
            _tiles(run),
            learning_section(run),
            timeline_section(run),
            lengths_section(run),
            lag_section(run),
            time_section(run),
            transcripts_section(run),
            learner_section(run),
            _facts(run),
        )
    )


def _header(run: RunData) -> str:
    steps = len(run.metrics)
    status = run.summary.get("status")
    state = f"Status: {status}. " if isinstance(status, str) else ("" if run.summary else "This run has not finished. ")
    schedule = _schedule(run)
    words = f"{state}{steps} training steps" + (f", schedule {schedule}" if schedule else "") + "."
    return f'<h1>{escape(run.name)}</h1><p class="lead">{escape(words)}</p>'


def _schedule(run: RunData) -> str:
    try:
        value = tomllib.loads(run.recipe_text).get("schedule", {})
    except tomllib.TOMLDecodeError:
        return ""
    return str(value.get("type", "")) if isinstance(value, dict) else ""


def _tiles(run: RunData) -> str:
    rows = ("".join(_accuracy_tiles(run)), "".join(_rollout_tiles(run)))
    return "".join(f'<div class="tiles">{row}</div>' for row in rows)


def _accuracy_tiles(run: RunData) -> list[str]:
    tiles = []
    for mode in run.modes():
        records = run.evaluated(mode)
        if not records:
            continue
        first, last = records[0], records[-1]
        label = f"held-out accuracy, {mode}" if mode else "held-out accuracy"
        if first is last:
            tiles.append(tile(label, percent(first["accuracy"]), _interval(first)))
            continue
        value = f"{percent(first['accuracy'])} → {percent(last['accuracy'])}"
        rise = last["accuracy"] - first["accuracy"]
        now = f"; now: {_interval(last)}" if _interval(last) else ""
        detail = f"{100 * rise:+.1f} points{_gain(run, mode)}{now}"
        tiles.append(tile(label, value, detail, "good" if _above(first, last) else ""))
    return tiles or [tile("held-out accuracy", MISSING, "no evaluation yet")]


def _gain(run: RunData, mode: str) -> str:
    """The paired interval of the rise, when the run computed one: summary.json, gains.<mode>.{low, high}."""
    gains = run.summary.get("gains")
    gain = gains.get(mode) if isinstance(gains, dict) else None
    if isinstance(gain, dict) and finite(gain.get("low")) and finite(gain.get("high")):
        return f" (paired 95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
    return ""


def _interval(record: Record) -> str:
    if finite(record.get("low")) and finite(record.get("high")):
        text = f"95 % interval {percent(record['low'])} to {percent(record['high'])}"
        return text + (f", {number(record['n_problems'])} problems" if finite(record.get("n_problems")) else "")
    return ""


def _above(first: Record, last: Record) -> bool:
    """Whether the last interval lies above the first."""
    return finite(first.get("high")) and finite(last.get("low")) and float(last["low"]) > float(first["high"])


def _rollout_tiles(run: RunData) -> list[str]:
    wall_s = run.summary.get("wall_s")
    wall_s = wall_s if finite(wall_s) else run.last("time_s")
    idle = idle_share(run)
    lag = max((r["lag_max"] for r in run.metrics if finite(r.get("lag_max"))), default=None)
    balanced, words = ledger(run)
    tokens = run.last("tokens_generated")
    return [
        tile("wall clock", duration(wall_s), f"{number(tokens)} tokens generated" if tokens is not None else ""),
        tile("idle slot-time", percent(idle), "of the engine's capacity"),
        tile(
            "parked / resumed", f"{number(run.last('parked_total'))} / {number(run.last('resumed_total'))}", "samples, whole run"
        ),
        tile("largest lag", number(lag), "updates between sampling and training"),
        tile("ledger", words, "issued = accounted for, at each step", {True: "good", False: "bad", None: ""}[balanced]),
    ]


def idle_share(run: RunData) -> float | None:
    """Unused share of slot-time over the whole run: steps weighted by the time in which the engine could work."""
    pairs = [
        (float(r["idle_fraction"]), float(r["engine_s"]) if finite(r.get("engine_s")) else 1.0)
        for r in run.metrics
        if finite(r.get("idle_fraction"))
    ]
    weight = sum(w for _, w in pairs)
    return sum(x * w for x, w in pairs) / weight if weight > 0 else None


def ledger(run: RunData) -> tuple[bool | None, str]:
    """Whether the conservation ledger balanced at every step, if the run says so (`ledger_balanced`)."""
    said = [r["ledger_balanced"] for r in [*run.metrics, run.summary] if r.get("ledger_balanced") is not None]
    if not said:
        return None, "not recorded"
    return (True, "balanced") if all(said) else (False, "NOT BALANCED")


def _facts(run: RunData) -> str:
    recipe = folded("Resolved recipe", run.recipe_text) if run.recipe_text else missing("recipe.toml is missing.")
    environment = (
        folded("Environment", json.dumps(run.environment, indent=2, ensure_ascii=False))
        if run.environment
        else missing("environment.json is missing.")
    )
    summary = (
        folded("Summary", json.dumps(run.summary, indent=2, ensure_ascii=False))
        if run.summary
        else missing("summary.json is missing.")
    )
    return section(
        "Recipe, environment, fate of the samples",
        "All that is needed to run this again.",
        _fates(run),
        recipe,
        environment,
        summary,
    )


def _fates(run: RunData) -> str:
    """What became of the samples, from the cumulative counters of the last step."""
    names = {
        "issued_total": "issued",
        "trained_total": "trained",
        "parked_total": "parked (times)",
        "resumed_total": "resumed (times)",
        "filtered_total": "filtered",
        "evicted_total": "evicted",
        "failed_total": "failed",
    }
    rows: list[list[Any]] = [[label, number(run.last(key))] for key, label in names.items() if run.last(key) is not None]
    return table(["samples", "whole run"], rows) if rows else ""
