from __future__ import annotations

import io

from rich.console import Console

from april.observe.console import Progress, RunView, evaluation_line, summary_line
from april.observe.words import duration, number, percent, sparkline

METRICS = {
    "step": 0, "reward_mean": 0.25, "accuracy": 0.5, "length_mean": 34.2, "length_p99": 301.0, "tokens_per_s": 812.3,
    "lag_mean": 0.5, "parked_groups": 3,
}  # fmt: skip
EVALUATION = {"step": 2, "mode": "sampled", "accuracy": 0.225, "low": 0.19, "high": 0.26, "n_problems": 512, "length_mean": 40.0}


class Ticks:
    def __init__(self, step_s: float = 1.0) -> None:
        self.now_s, self.step_s = -step_s, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def test_away_from_a_terminal_each_step_is_one_line() -> None:
    out = io.StringIO()
    with RunView("quick", 2, file=out, clock=lambda: 0.0) as view:
        view.step(METRICS)
        view.status("not shown in plain mode")
        view.evaluation(EVALUATION)
        view.step({**METRICS, "step": 1, "reward_mean": float("nan"), "lag_mean": None})
    assert out.getvalue().splitlines() == [
        "step 1/2  reward 0.25  accuracy 50.0 %  length 34 (p99 301)  tokens/s 812  lag 0.50  parked 3  0 s left",
        "evaluation  step 2  sampled accuracy 22.5 % [19.0 %, 26.0 %]  on 512 problems  length 40",
        "step 2/2  accuracy 50.0 %  length 34 (p99 301)  tokens/s 812  parked 3  0 s left",
    ]


def test_plain_lines_can_be_rare_but_the_last_step_always_comes() -> None:
    out = io.StringIO()
    with RunView("quick", 10, quiet=True, file=out, every_s=1000.0, clock=Ticks()) as view:
        for step in range(10):
            view.step({"step": step})
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/10", "10/10"]


def test_silence_is_silent_even_when_quiet() -> None:
    out = io.StringIO()
    with RunView("quick", 1, mode="silent", quiet=True, file=out) as view:
        view.step(METRICS)
        view.note("x")
        view.finish([("accuracy", "1", "2")])
    with Progress("warm start", 1, mode="silent", file=out) as progress:
        progress.advance()
    assert out.getvalue() == ""


def test_the_live_view_shows_bar_trend_and_evaluations() -> None:
    out = io.StringIO()
    view = RunView("quick [bold]run", 4, file=out, mode="live", clock=Ticks())
    view.evaluation(EVALUATION)
    for step, accuracy in enumerate((0.0, 0.5, 1.0)):
        view.step({**METRICS, "step": step, "accuracy": accuracy})
    view.status("rollout: 12 of 16 ready")
    Console(file=out, width=120).print(view._render())
    shown = out.getvalue()
    for text in ("quick [bold]run", "3/4", "75.0 %", "▁▅█ 0.0 % → 100.0 %", "22.5 % [19.0 %, 26.0 %]", "12 of 16 ready", "left"):
        assert text in shown


def test_a_live_terminal_is_restored_and_notes_stay() -> None:
    out = io.StringIO()
    with RunView("quick", 1, mode="live", file=out) as view:
        view.note("checkpoint written")
        view.step(METRICS)
        view.finish([("accuracy", "20 %", "60 %")], report="runs/x/report.html")
    assert view._screen._live is None
    for text in ("checkpoint written", "20 %", "60 %", "runs/x/report.html"):
        assert text in out.getvalue()


def test_time_left_counts_only_this_process() -> None:
    view = RunView("quick", 10, first_step=6, mode="silent", clock=Ticks(0.0))
    assert view.left_s is None
    view._start_s = -4.0
    view.step({"step": 7})
    assert view.left_s == 4.0


def test_progress_prints_seldom_and_at_the_end() -> None:
    out = io.StringIO()
    with Progress("warm start", 8, file=out, every_s=5.0, clock=Ticks(1.0)) as progress:
        for _ in range(8):
            progress.advance(loss=0.12345)
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) < 8
    assert lines[0].startswith("warm start 1/8 steps  loss 0.123  ") and lines[-1].startswith("warm start 8/8")


def test_an_interrupted_progress_says_how_far_it_came() -> None:
    out = io.StringIO()
    with Progress("evaluate", 8, unit="problems", file=out, every_s=1e9, clock=lambda: 0.0) as progress:
        progress.advance(5)
        progress.advance(1)
    assert out.getvalue().splitlines()[-1].startswith("evaluate 6/8 problems")


def test_lines_of_nothing_are_short() -> None:
    assert summary_line({}) == ""
    assert evaluation_line({"step": 0, "mode": "greedy"}) == "step 0  greedy accuracy –"


def test_numbers_as_people_read_them() -> None:
    assert [number(x) for x in (3, 3.0, 0.12345, 12345.6, 1.5e6, 0.00001, float("nan"), None, "x")] == [
        "3", "3", "0.123", "12,346", "1.5 M", "1.0e-05", "–", "–", "x",
    ]  # fmt: skip
    assert [percent(0.5), percent(None), percent(0.123, 0)] == ["50.0 %", "–", "12 %"]
    assert [duration(x) for x in (0, 0.0421, 8.24, 42, 185, 7385, -3.5, None)] == [
        "0 s",
        "42 ms",
        "8.2 s",
        "42 s",
        "3:05",
        "2:03:05",
        "-3.5 s",
        "–",
    ]


def test_a_sparkline_averages_into_its_width() -> None:
    assert sparkline([0, 1]) == "▁█"
    assert sparkline([0, 0, 1, 1], width=2) == "▁█"
    assert sparkline([0.5], low=0.0, high=1.0) == "▅"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=30)) == 30
