"""Who was running and who waited: a few steps sample by sample, and the whole run as counts."""

from __future__ import annotations

from html import escape

from april.observe.report_data import Record, RunData, points
from april.observe.report_page import note, plots, section
from april.observe.report_plots import SECONDS, WIDE, Axis, Frame, Line, figure, line_chart
from april.observe.words import duration

MAX_ROWS = 150
WINDOW_STEPS = 4
STATES = {"running": "f c1", "parked": "wait", "scoring": "f c3"}

Boundary = tuple[int, float, float]
"""Step number, start and end in seconds."""


def timeline_section(run: RunData) -> str:
    """The section of the page."""
    window = choose_window(run)
    parts = [_lifetimes(run, window) if window else "", plots(_counts(run), columns=1)]
    return section(
        "Who was running, who waited",
        "Each thin row is one sample. Solid blue: it is generating. Hatched orange: the step was complete, so the sample was "
        "parked with its tokens, and it goes on after the weights have changed. Dashed lines are step boundaries. White space "
        "between blue and the next boundary is time in which its slot had nothing to do.",
        *parts,
        missing="timeline.jsonl has no samples and no counters",
    )


def step_boundaries(run: RunData) -> list[Boundary]:
    """When each step ran: from metrics (time_s is the end of a step), else from the timeline's own step numbers."""
    out: list[Boundary] = []
    times, lengths = points(run.metrics, "time_s", "step_s")
    steps, _ = points([r for r in run.metrics if "time_s" in r and "step_s" in r], "step", "step_s")
    if len(steps) == len(times) and steps:
        return [(int(step), end - length, end) for step, end, length in zip(steps, times, lengths, strict=True)]
    by_step: dict[int, tuple[float, float]] = {}
    for record in run.spans:
        if isinstance(record.get("step"), int):
            start_s, end_s = by_step.get(record["step"], (record["start_s"], record["end_s"]))
            by_step[record["step"]] = (min(start_s, record["start_s"]), max(end_s, record["end_s"]))
    out = [(step, start_s, end_s) for step, (start_s, end_s) in sorted(by_step.items())]
    return out


def choose_window(run: RunData) -> list[Boundary]:
    """A few consecutive steps with the most parked time, fewer when rows would not fit; empty without samples."""
    if not run.samples:
        return []
    steps = step_boundaries(run)
    if not steps:
        end_s = max(record["end_s"] for record in run.samples)
        return [(0, min(record["start_s"] for record in run.samples), end_s)]
    parked = [0.0] * len(steps)
    index = 0
    for record in run.samples:
        while index + 1 < len(steps) and record["start_s"] > steps[index][2]:
            index += 1
        if record.get("state") == "parked":
            parked[index] += 1
    width = min(WINDOW_STEPS, len(steps))
    best = max(range(len(steps) - width + 1), key=lambda start: (sum(parked[start : start + width]), -start))
    while width > 1 and len(_inside(run.samples, steps[best][1], steps[best + width - 1][2])) > 2.5 * MAX_ROWS:
        width -= 1
    return steps[best : best + width]


def _inside(samples: list[Record], start_s: float, end_s: float) -> dict[str, list[Record]]:
    """Records of each sample that touch the window, samples in order of first start in the run."""
    lives: dict[str, list[Record]] = {}
    for record in samples:
        if record["end_s"] > start_s and record["start_s"] < end_s:
            lives.setdefault(str(record.get("name", "")), []).append(record)
    return lives


def _rows(lives: dict[str, list[Record]]) -> list[list[Record]]:
    """At most `MAX_ROWS` lives: all that were parked if they fit, and an even choice of the rest."""
    names = list(lives)
    parked = [name for name in names if any(r.get("state") == "parked" for r in lives[name])]
    others = [name for name in names if name not in set(parked)]
    keep = set(_evenly(parked, max(MAX_ROWS * 2 // 3, MAX_ROWS - len(others))))
    keep |= set(_evenly(others, MAX_ROWS - len(keep)))
    return [lives[name] for name in names if name in keep]


def _evenly(names: list[str], most: int) -> list[str]:
    return names if len(names) <= most else [names[index * len(names) // most] for index in range(most)]


def _lifetimes(run: RunData, window: list[Boundary]) -> str:
    start_s, end_s = window[0][1], window[-1][2]
    lives = _inside(run.samples, start_s, end_s)
    rows = _rows(lives)
    if not rows:
        return ""
    row_height = 4 if len(rows) > 60 else 7
    strip, top = 18, 30
    height = top + row_height * len(rows) + 8 + strip + 42
    frame = Frame((start_s, end_s), (0.0, 1.0), WIDE, height, left=70)
    frame.top = top
    parts = [frame.axes(SECONDS, None)]
    for row, records in enumerate(rows):
        parts += [_bar(record, frame, top + row * row_height, row_height - 1) for record in records]
    below = top + row_height * len(rows) + 8
    parts.append(_busy(run, frame, start_s, end_s, below, strip))
    parts += [_boundary(boundary, frame, below + strip) for boundary in window]
    parts.append(f'<text class="name" x="62" y="{top + 12}" text-anchor="end">samples</text>')
    keys = (
        '<span><i class="c1"></i>generating</span><span><i class="wait"></i>parked</span><span><i class="c3"></i>being '
        "judged</span>"
        '<span><i class="c4"></i>trainer busy</span>'
    )
    title = f"Steps {window[0][0]} to {window[-1][0]}: {len(rows)} of {len(lives)} samples alive in this window"
    return figure(title, "".join(parts), WIDE, height, note=keys)


def _bar(record: Record, frame: Frame, y: float, height: float) -> str:
    x0 = frame.x(max(record["start_s"], frame.x_low))
    x1 = frame.x(min(record["end_s"], frame.x_high))
    state = str(record.get("state", "running"))
    span = f"{record.get('name', '')}: {state} for {duration(record['end_s'] - record['start_s'])}"
    width = max(0.6, x1 - x0)
    kind = STATES.get(state, "f c6")
    return f'<rect class="{kind}" x="{x0}" y="{y}" width="{width:.1f}" height="{height}"><title>{escape(span)}</title></rect>'


def _busy(run: RunData, frame: Frame, start_s: float, end_s: float, y: float, height: float) -> str:
    """The trainer's strip below the samples."""
    parts = [f'<text class="name" x="62" y="{y + 13}" text-anchor="end">trainer</text>']
    for record in run.spans:
        if record["track"] == "trainer" and record["end_s"] > start_s and record["start_s"] < end_s:
            x0, x1 = frame.x(max(record["start_s"], start_s)), frame.x(min(record["end_s"], end_s))
            words = escape(f"{record.get('name', '')}: {duration(record['end_s'] - record['start_s'])}")
            width = max(0.6, x1 - x0)
            parts.append(
                f'<rect class="f c4" x="{x0}" y="{y}" width="{width:.1f}" height="{height}"><title>{words}</title></rect>'
            )
    return "".join(parts)


def _boundary(boundary: Boundary, frame: Frame, bottom: float) -> str:
    step, start_s, end_s = boundary
    x, middle = frame.x(start_s), (frame.x(start_s) + frame.x(end_s)) / 2
    return (
        f'<line class="boundary" x1="{x}" x2="{x}" y1="{frame.top - 8}" y2="{bottom}"/>'
        f'<text class="name" x="{middle:.1f}" y="{frame.top - 12}" text-anchor="middle">step {step}</text>'
    )


def _counts(run: RunData) -> str:
    """Running and parked samples over the whole run."""
    styles = {"running": ("c1", "solid"), "parked": ("c2", "dash"), "ready": ("c3", "dot"), "scoring": ("c4", "dot")}
    lines = []
    for name, (colour, dash) in styles.items():
        xs, ys = points([r for r in run.counters if r["counter"] == name], "time_s", "value")
        xs, ys = _binned(xs, ys)
        lines.append(Line(f"{name} samples", xs, ys, colour, dash, width=1.6, steps=True, fill=name == "running"))
    return line_chart("Samples in each state over the whole run", lines, SECONDS, Axis(low=0.0), width=WIDE, height=230)


def _binned(xs: list[float], ys: list[float], bins: int = 300) -> tuple[list[float], list[float]]:
    """Time-weighted means of a count that holds its value until the next sample."""
    if len(xs) <= bins or xs[-1] <= xs[0]:
        return xs, ys
    width = (xs[-1] - xs[0]) / bins
    areas = [0.0] * bins
    for index in range(len(xs) - 1):
        start, end = xs[index], xs[index + 1]
        first, last = int((start - xs[0]) / width), min(bins - 1, int((end - xs[0]) / width))
        for place in range(min(first, bins - 1), last + 1):
            low, high = xs[0] + place * width, xs[0] + (place + 1) * width
            areas[place] += ys[index] * max(0.0, min(end, high) - max(start, low))
    return [xs[0] + index * width for index in range(bins)], [area / width for area in areas]


def busy_note(run: RunData) -> str:
    """How much of the run the trainer computed, from its spans."""
    spans = [r for r in run.spans if r["track"] == "trainer"]
    last = max((r["end_s"] for r in [*run.spans, *run.samples]), default=0.0)
    busy_s = covered_s(spans)
    return note(f"The trainer was busy for {duration(busy_s)} of {duration(last)}.") if spans and last > 0 else ""


def covered_s(spans: list[Record]) -> float:
    """Seconds covered by spans in order of start; nested and overlapping ones count once."""
    total_s, until_s = 0.0, float("-inf")
    for span in spans:
        total_s += max(0.0, span["end_s"] - max(until_s, span["start_s"]))
        until_s = max(until_s, span["end_s"])
    return total_s
