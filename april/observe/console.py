"""The terminal: a live view on a TTY, one plain line a step anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, Literal, TypeGuard

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from april.observe.words import duration, number, percent, sparkline

Mode = Literal["auto", "live", "plain", "silent"]
Record = Mapping[str, Any]

MAX_EVALUATIONS = 6
RECENT_STEPS = 10
"""Steps whose duration says how long the rest will take: lengths drift, and evaluations are no steps."""
MIN_MEASURED_S = 1.0
"""The first units of a batch are the quickest: before this much time nothing is said about the time left."""


class Progress:
    """Progress of anything countable (warm start, evaluation): a bar on a TTY, a line every few seconds elsewhere.

    Args:
        label: what is being done.
        total: how many units make it complete.
        unit: name of a unit, plural.
        mode: "auto" is live on a TTY and plain elsewhere; "silent" prints nothing.
        file: where to print; standard error by default, so that output can be piped.
        every_s: seconds between plain lines; 0 prints each.
        clock: seconds, any origin.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str = "steps",
        mode: Mode = "auto",
        quiet: bool = False,
        file: IO[str] | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._fields: dict[str, str] = {}
        self._clock, self._every_s = clock, every_s
        self._start_s = clock()
        self._printed_s = float("-inf")
        self._screen = Screen(self._render, mode="plain" if quiet and mode != "silent" else mode, file=file)

    def __enter__(self) -> Progress:
        self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.done < self.total or self._printed_s == float("-inf"):
            self._line(force=True)
        self._screen.stop()

    def advance(self, num: int = 1, **fields: object) -> None:
        """`num` units are done; `fields` are shown beside the bar, numbers rounded."""
        self.done += num
        self.show(**fields)
        self._line(force=self.done >= self.total)

    def show(self, **fields: object) -> None:
        """Change what stands beside the bar."""
        # A new dict, because the live view reads this one from its own thread.
        self._fields = self._fields | {name: number(value) for name, value in fields.items()}

    @property
    def left_s(self) -> float | None:
        """Estimated seconds to the end; None before anything is known about it."""
        elapsed_s = self._clock() - self._start_s
        if self.done <= 0 or elapsed_s < MIN_MEASURED_S:
            return None
        return elapsed_s / self.done * max(0, self.total - self.done)

    def _line(self, force: bool = False) -> None:
        now_s = self._clock()
        if force or now_s - self._printed_s >= self._every_s:
            self._printed_s = now_s
            fields = "  ".join(f"{name} {value}" for name, value in self._fields.items())
            self._screen.line(f"{self.label} {self.done}/{self.total} {self.unit}  {fields}  {_left(self.left_s)}".rstrip())

    def _render(self) -> RenderableType:
        fields = "  ".join(f"{name} {value}" for name, value in self._fields.items())
        return Group(_bar(self.label, self.done, self.total, self.left_s), Text("  " + fields, style="dim"))


class RunView:
    """What a training run shows while it runs.

    Call `step` with each record of metrics.jsonl, `evaluation` with each of evaluations.jsonl, `status` for what
    happens within a step, `note` for anything worth a line of its own.

    Args:
        title: name of the recipe.
        num_steps: steps of the whole run.
        first_step: step at which this process begins (a resumed run).
        mode, quiet, file, every_s, clock: as for `Progress`; plain lines come each step by default.
    """

    def __init__(
        self,
        title: str,
        num_steps: int,
        *,
        first_step: int = 0,
        mode: Mode = "auto",
        quiet: bool = False,
        file: IO[str] | None = None,
        every_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.num_steps = title, num_steps
        self._done = self._first = first_step
        self._metrics: Record = {}
        self._accuracies: list[float] = []
        self._steps_s: list[float] = []
        self._evaluations: list[Record] = []
        self._status = ""
        self._clock, self._every_s = clock, every_s
        self._start_s, self._printed_s = clock(), float("-inf")
        self._screen = Screen(self._render, mode="plain" if quiet and mode != "silent" else mode, file=file)

    def __enter__(self) -> RunView:
        self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.stop()

    def step(self, metrics: Record) -> None:
        """A step has ended."""
        self._metrics = metrics
        self._done = int(metrics.get("step", self._done)) + 1
        self._status = ""
        if _finite(metrics.get("step_s")) and metrics["step_s"] > 0:
            self._steps_s.append(float(metrics["step_s"]))
        accuracy = metrics.get("accuracy")
        if _finite(accuracy):
            self._accuracies.append(float(accuracy))
        now_s = self._clock()
        if now_s - self._printed_s >= self._every_s or self._done >= self.num_steps:
            self._printed_s = now_s
            self._screen.line(f"step {self._done}/{self.num_steps}  {summary_line(metrics)}  {_left(self.left_s)}".rstrip())

    def evaluation(self, record: Record) -> None:
        """An evaluation has ended; stays on the screen."""
        self._evaluations.append(record)
        self._screen.line("evaluation  " + evaluation_line(record))

    def status(self, text: str) -> None:
        """What the run is doing now (live view only)."""
        self._status = text

    def note(self, text: str) -> None:
        """A line that stays, above the live view."""
        self._screen.permanent(text)

    @property
    def left_s(self) -> float | None:
        """Estimated seconds to the last step; None before the first one."""
        since = self._done - self._first
        if since <= 0:
            return None
        recent = self._steps_s[-RECENT_STEPS:]
        step_s = sum(recent) / len(recent) if recent else (self._clock() - self._start_s) / since
        return step_s * max(0, self.num_steps - self._done)

    def finish(self, rows: list[tuple[str, str, str]], *, report: str = "") -> None:
        """The table at the end: what, before, after; then where the report is."""
        self._screen.stop()
        self._screen.print(before_after(self.title, rows))
        if report:
            self._screen.print(Text(f"report  {report}"))

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [_bar(self.title, self._done, self.num_steps, self.left_s)]
        if self._metrics:
            parts.append(Text("  " + summary_line(self._metrics)))
        if self._accuracies:
            shown = self._accuracies
            trend = f" {percent(shown[0])} → {percent(shown[-1])}" if len(shown) > 1 else f" {percent(shown[0])}"
            parts.append(Text("  training accuracy ").append(sparkline(shown, 40, 0.0, 1.0), style="green").append(trend))
        for record in self._evaluations[-MAX_EVALUATIONS:]:
            parts.append(Text("  evaluation " + evaluation_line(record), style="cyan"))
        if self._status:
            parts.append(Text("  " + self._status, style="dim"))
        return Group(*parts)


class Screen:
    """Chooses between a live region (drawn four times a second by rich's own thread), plain lines and silence."""

    def __init__(self, render: Callable[[], RenderableType], *, mode: Mode = "auto", file: IO[str] | None = None) -> None:
        self._console = Console(file=file or sys.stderr, highlight=False)
        self.mode: Mode = mode if mode != "auto" else ("live" if self._console.is_terminal else "plain")
        if self.mode == "plain":
            # A log file has no width; rich would wrap at 80.
            self._console = Console(file=file or sys.stderr, highlight=False, width=200, soft_wrap=True)
        self._live: Live | None = None
        self._render = render

    def start(self) -> None:
        if self.mode == "live" and self._live is None:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        """A line of the plain mode."""
        if self.mode == "plain":
            self._console.print(Text(text))

    def permanent(self, text: str) -> None:
        """A line in every mode but silent."""
        if self.mode != "silent":
            self._console.print(Text(text))

    def print(self, what: RenderableType) -> None:
        if self.mode != "silent":
            self._console.print(what)


def summary_line(metrics: Record) -> str:
    """The few numbers of a step that a person watches."""
    parts = [
        ("reward", metrics.get("reward_mean"), "{:.2f}".format),
        ("accuracy", metrics.get("accuracy"), percent),
        ("length", metrics.get("length_mean"), "{:.0f}".format),
        ("tokens/s", metrics.get("tokens_per_s"), "{:.0f}".format),
        ("lag", metrics.get("lag_mean"), "{:.2f}".format),
        ("parked", metrics.get("parked_groups"), "{:.0f}".format),
    ]
    shown = [f"{name} {style(value)}" for name, value, style in parts if _finite(value)]
    p99 = metrics.get("length_p99")
    if _finite(p99):
        shown = [text + f" (p99 {p99:.0f})" if text.startswith("length") else text for text in shown]
    return "  ".join(shown)


def evaluation_line(record: Record) -> str:
    """One evaluation in words."""
    text = f"step {record.get('step', '?')}  {record.get('mode', '')} accuracy {percent(record.get('accuracy'))}"
    low, high = record.get("low"), record.get("high")
    if _finite(low) and _finite(high):
        text += f" [{percent(low)}, {percent(high)}]"
    if record.get("n_problems"):
        text += f"  on {record['n_problems']} problems"
    if _finite(record.get("length_mean")):
        text += f"  length {record['length_mean']:.0f}"
    return text


def before_after(title: str, rows: list[tuple[str, str, str]]) -> Table:
    """A table of what a run changed."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for name, before, after in rows:
        table.add_row(Text(name), Text(before), Text(after))
    return table


def _bar(label: str, done: int, total: int, left_s: float | None) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for _ in range(3):
        grid.add_column(justify="right", no_wrap=True)
    share = percent(done / total) if total else ""
    bar = ProgressBar(total=max(1, total), completed=done)
    grid.add_row(Text(label, style="bold"), bar, Text(f"{done}/{total}"), Text(share), Text(_left(left_s)))
    return grid


def _left(left_s: float | None) -> str:
    return "" if left_s is None else f"{duration(left_s)} left"


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")
