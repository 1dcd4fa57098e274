"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

MISSING = "–"
BLOCKS = "▁▂▃▄▅▆▇█"


def number(value: object, digits: int = 3) -> str:
    """A number with about `digits` significant digits; text stays text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    if not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.{digits - 1}g} M" if size < 1e9 else f"{value:.{digits - 1}e}"
    if size >= 10**digits or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if size >= 1e-3 or value == 0 else f"{value:.{max(0, digits - 2)}e}"


def percent(fraction: object, digits: int = 1) -> str:
    """A fraction as per cent."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not math.isfinite(fraction):
        return MISSING
    return f"{100 * fraction:.{digits}f} %"


def duration(seconds: object) -> str:
    """Seconds as 42 ms, 8.2 s, 3:05 or 2:03:05."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return MISSING
    if seconds < 0:
        return "-" + duration(-seconds)
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: Sequence[float], width: int = 40, low: float | None = None, high: float | None = None) -> str:
    """Values as block characters, averaged into at most `width` columns.

    Args:
        values: finite numbers in order.
        width: characters at most.
        low, high: ends of the scale; the values' own by default.
    """
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * index // columns for index in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    bottom = min(means) if low is None else low
    top = max(means) if high is None else high
    span = (top - bottom) or 1.0
    places = [min(len(BLOCKS) - 1, max(0, int((mean - bottom) / span * len(BLOCKS)))) for mean in means]
    return "".join(BLOCKS[place] for place in places)
