"""Charts as inline SVG whose colours follow the page, so that one file reads well in light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from april.observe.report_data import thinned
from april.observe.words import duration, number

Style = Callable[[float], str]

WIDE, HALF, THIRD = 1080, 530, 346
DASHES = {"solid": "", "dash": "6 4", "dot": "2 3"}
TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: in the legend; empty keeps it out.
        xs, ys: points, by x.
        colour: name of a page colour, "c1" to "c6".
        dash: "solid", "dash" or "dot": the second cue beside colour.
        width: of the stroke.
        faint: drawn pale and left out of the read-out.
        low, high: a band around the curve, as long as ys.
        marks: whether each point gets a dot.
        steps: the value holds until the next point.
        fill: whether the area below is tinted.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = "c1"
    dash: str = "solid"
    width: float = 2.0
    faint: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marks: bool = False
    steps: bool = False
    fill: bool = False


@dataclass(frozen=True)
class Axis:
    """Label, number style of ticks and of the read-out, and ends that are forced (otherwise the data's)."""

    label: str = ""
    style: Style = number
    low: float | None = None
    high: float | None = None
    seconds: bool = False
    exact: Style | None = None


STEPS = Axis("training step")
SECONDS = Axis("wall clock", style=duration, low=0.0, seconds=True)


class Frame:
    """Maps data to the pixels of one plot area and draws its axes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], width: int, height: int, left: int = 52) -> None:
        self.x_low, self.x_high = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        self.y_low, self.y_high = y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = left, width - 14, 10, height - 38

    def x(self, value: float) -> float:
        return round(self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        return round(self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top), 1)

    def axes(self, x: Axis, y: Axis | None) -> str:
        parts = []
        if y is not None:
            for tick in ticks(self.y_low, self.y_high, 4 if self.height < 200 else 5):
                at = self.y(tick)
                parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{at}" y2="{at}"/>')
                parts.append(
                    f'<text class="tick" x="{self.left - 7}" y="{at + 4}" text-anchor="end">{escape(y.style(tick))}</text>'
                )
        wanted = max(2, (self.right - self.left) // 90)
        places = ticks(self.x_low, self.x_high, wanted, seconds=x.seconds)
        style = _fine_seconds(places) if x.seconds else x.style
        for tick in places:
            at = self.x(tick)
            parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{self.bottom}" y2="{self.bottom + 4}"/>')
            parts.append(f'<text class="tick" x="{at}" y="{self.bottom + 17}" text-anchor="middle">{escape(style(tick))}</text>')
        parts.append(f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>')
        middle = (self.left + self.right) / 2
        parts.append(f'<text class="name" x="{middle}" y="{self.height - 5}" text-anchor="middle">{escape(x.label)}</text>')
        return "".join(parts)


def line_chart(
    title: str, lines: Sequence[Line], x: Axis = STEPS, y: Axis | None = None, *, width: int = HALF, height: int = 250
) -> str:
    """Curves with axes, a legend, and a read-out under the pointer; empty text when there is nothing to draw."""
    y = y or Axis()
    lines = [_thin(line) for line in lines if len(line.xs)]
    if not lines:
        return ""
    frame = Frame(
        _range(x, [v for line in lines for v in line.xs]), _padded(y, [v for line in lines for v in _extent(line)]), width, height
    )
    body = frame.axes(x, y) + "".join(_draw(line, frame) for line in lines)
    return figure(title, body, width, height, legend=[line for line in lines if line.label], readout=_readout(lines, frame, x, y))


def stacked_chart(
    title: str, xs: Sequence[float], layers: Sequence[Line], x: Axis, y: Axis, *, width: int = HALF, height: int = 250
) -> str:
    """Layers on top of each other over shared xs; each layer's ys are as long as xs."""
    if not xs or not layers:
        return ""
    totals = [sum(layer.ys[i] for layer in layers) for i in range(len(xs))]
    step = (xs[-1] - xs[0]) / max(1, len(xs) - 1) if len(xs) > 1 else 1.0
    frame = Frame((xs[0] - step / 2, xs[-1] + step / 2), (0.0, max([*totals, 1e-9]) * 1.05), width, height)
    bar = max(0.6, frame.x(xs[0] + step) - frame.x(xs[0]) - (1.0 if len(xs) < 150 else 0.0))
    parts = [frame.axes(x, y)]
    base = [0.0] * len(xs)
    for layer in layers:
        for index, value in enumerate(layer.ys):
            top, bottom = frame.y(base[index] + value), frame.y(base[index])
            if value > 0:
                left = round(frame.x(xs[index]) - bar / 2, 1)
                parts.append(
                    f'<rect class="f {layer.colour}" x="{left}" y="{top}" width="{bar:.1f}" height="{bottom - top:.1f}"/>'
                )
            base[index] += value
    return figure(title, "".join(parts), width, height, legend=list(layers), readout=_readout(layers, frame, x, y))


def bar_chart(title: str, bars: Sequence[tuple[str, float, Sequence[float], str]], style: Style, *, width: int = HALF) -> str:
    """Horizontal bars (label, mean, single values as dots, colour), for shares and times of a few runs."""
    if not bars:
        return ""
    height = 16 + 40 * len(bars)
    high = max([1e-9, *(max([mean, *values]) for _, mean, values, _ in bars)]) * 1.18
    left = 12 + 8 * max(len(label) for label, *_ in bars)
    frame = Frame((0.0, high), (0.0, 1.0), width, height + 10, left=min(left, width // 3))
    parts = []
    for row, (label, mean, values, colour) in enumerate(bars):
        y = 12 + 40 * row
        parts.append(f'<text class="name" x="{frame.left - 8}" y="{y + 18}" text-anchor="end">{escape(label)}</text>')
        parts.append(
            f'<rect class="f {colour} soft" x="{frame.left}" y="{y}" width="{frame.x(mean) - frame.left:.1f}" height="26" '
            f'rx="3"/>'
        )
        parts += [f'<circle class="f {colour}" cx="{frame.x(value)}" cy="{y + 13}" r="3.5"/>' for value in values]
        at = frame.x(max([mean, *values])) + 9
        parts.append(f'<text class="name" x="{at}" y="{y + 18}">{escape(style(mean))}</text>')
    return figure(title, "".join(parts), width, height)


def figure(
    title: str, body: str, width: int, height: int, *, legend: Sequence[Line] = (), readout: str = "", note: str = ""
) -> str:
    """An SVG with its title, legend and optional read-out data."""
    keys = "".join(_key(line) for line in legend) if len(legend) > 1 else ""
    data = f' data-readout="{escape(readout, quote=True)}"' if readout else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="legend">{keys}{note}</div>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}"{data}>{body}</svg></figure>'
    )


def ticks(low: float, high: float, wanted: int, *, seconds: bool = False) -> list[float]:
    """About `wanted` round numbers from `low` to `high`."""
    rough = (high - low) / max(1, wanted)
    if rough <= 0 or not math.isfinite(rough):
        return [low]
    if seconds and rough > 0.5:
        step = float(next((s for s in TIME_STEPS_S if s >= rough), 86400 * math.ceil(rough / 86400)))
    else:
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _fine_seconds(places: Sequence[float]) -> Style:
    """Seconds with the digits that tell neighbouring ticks apart."""
    step = places[1] - places[0] if len(places) > 1 else 1.0
    if step >= 1 or places[-1] >= 600:
        return duration
    digits = math.ceil(-math.log10(step) - 1e-9)
    return lambda value: f"{value:.{digits}f} s"


def _draw(line: Line, frame: Frame) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    parts = []
    if line.low is not None and line.high is not None:
        upper = [f"{frame.x(x)},{frame.y(y)}" for x, y in zip(line.xs, line.high, strict=True)]
        lower = [f"{frame.x(x)},{frame.y(y)}" for x, y in zip(line.xs, line.low, strict=True)]
        parts.append(f'<polygon class="band {line.colour}" points="{" ".join(upper + lower[::-1])}"/>')
    if line.steps:
        held = [places[0]]
        for (_, y_before), (x, y) in pairwise(places):
            held += [(x, y_before), (x, y)]
        drawn = held
    else:
        drawn = places
    path = " ".join(f"{x},{y}" for x, y in drawn)
    if line.fill:
        ends = f"{drawn[0][0]},{frame.bottom} {path} {drawn[-1][0]},{frame.bottom}"
        parts.append(f'<polygon class="band {line.colour}" points="{ends}"/>')
    dash = f' stroke-dasharray="{DASHES[line.dash]}"' if DASHES[line.dash] else ""
    faint = " faint" if line.faint else ""
    parts.append(f'<polyline class="s {line.colour}{faint}" stroke-width="{line.width}"{dash} points="{path}"/>')
    if line.marks or len(places) == 1:
        parts += [f'<circle class="f {line.colour}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places]
    return "".join(parts)


def _key(line: Line) -> str:
    dash = f' stroke-dasharray="{DASHES[line.dash]}"' if DASHES[line.dash] else ""
    stroke = f'<line class="s {line.colour}" stroke-width="3" x1="1" x2="21" y1="5" y2="5"{dash}/>'
    sign = f'<svg viewBox="0 0 22 10" class="key">{stroke}</svg>'
    return f"<span>{sign}{escape(line.label)}</span>"


def _readout(lines: Sequence[Line], frame: Frame, x: Axis, y: Axis) -> str:
    """What the page's script shows under the pointer: pixel x, x text, and each curve's label and value text."""
    shown = [line for line in lines if line.label and not line.faint][:6]
    rows: dict[float, list[str]] = {}
    for line in shown:
        for at, value in zip(line.xs, line.ys, strict=True):
            rows.setdefault(at, []).append(f"{line.label}: {(y.exact or y.style)(value)}")
    table = [[frame.x(at), f"{x.label} {x.style(at)}", *texts] for at, texts in sorted(rows.items())]
    return json.dumps({"top": frame.top, "bottom": frame.bottom, "rows": table}, ensure_ascii=False, separators=(",", ":"))


def _thin(line: Line) -> Line:
    if line.low is not None or len(line.xs) <= 400:
        return line
    xs, ys = thinned(list(line.xs), list(line.ys))
    return Line(line.label, xs, ys, line.colour, line.dash, line.width, line.faint, None, None, line.marks, line.steps, line.fill)


def _extent(line: Line) -> list[float]:
    return [*line.ys, *(line.low or ()), *(line.high or ())]


def _range(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low = min(values) if axis.low is None else min(axis.low, *values, axis.low)
    high = max(values) if axis.high is None else axis.high
    return low, high


def _padded(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low, high = _range(axis, values)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    return (low if axis.low is not None else low - pad), (high if axis.high is not None else high + pad)
