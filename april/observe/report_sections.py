"""The sections of a report that are made of curves."""

from __future__ import annotations

from collections.abc import Sequence

from april.observe.report_data import RunData, finite, points, smoothed
from april.observe.report_page import missing, note, plots, section
from april.observe.report_plots import HALF, SECONDS, STEPS, THIRD, Axis, Line, line_chart, stacked_chart
from april.observe.report_timeline import busy_note
from april.observe.words import number, percent

FRACTION = Axis(style=lambda value: percent(value, 0), low=0.0, exact=percent)
COUNT = Axis(low=0.0)
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
DASHES = ("solid", "dash", "dot")
PHASES = {"rollout_s": ("rollout", "c1"), "train_s": ("training", "c4"), "publish_s": ("publishing weights", "c2")}
MAX_BARS = 120
MAX_EXTRAS = 30

LEARNER_KEYS = {
    "loss": "Loss",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "clip_fraction": "Share of tokens clipped",
    "entropy": "Entropy (nats)",
    "mismatch_mean_abs": "Trainer and engine log-prob: mean |difference|",
    "tis_mean": "Mean correction weight",
}
SHOWN_ELSEWHERE = {
    "step", "version", "time_s", "rollout_s", "train_s", "publish_s", "step_s", "reward_mean", "accuracy",
    "length_mean", "length_p50", "length_p99", "length_max", "delivered_mean_tokens", "issued_mean_tokens",
    "length_bias", "lag_mean", "lag_p95", "lag_max", "stale_token_fraction", "tokens_per_s", "idle_fraction",
    "tokens_generated", "parked_groups", "ready_groups", "segments_mean",
}  # fmt: skip


def learning_section(run: RunData) -> str:
    """Held-out accuracy and reward against steps and wall clock."""
    charts = []
    for x_key, axis in (("step", STEPS), ("time_s", SECONDS)):
        against = "by step" if x_key == "step" else "by wall clock"
        charts.append(line_chart(f"Held-out accuracy {against}", _evaluation_lines(run, x_key), axis, FRACTION))
    for x_key, axis in (("step", STEPS), ("time_s", SECONDS)):
        against = "by step" if x_key == "step" else "by wall clock"
        charts.append(line_chart(f"Training reward and accuracy {against}", _reward_lines(run, x_key), axis, Axis()))
    absent = [] if run.evaluations else [missing("Held-out accuracy is not shown: evaluations.jsonl has no records yet.")]
    return section(
        "Learning",
        "Above: share of problems solved that training never sees; the tinted band is the 95 % interval, and bands that do not "
        "overlap show a real rise. Below: what the policy earned on the batches that it trained on; pale is each step, solid a "
        "running mean.",
        *absent,
        plots(*charts),
        missing="neither metrics.jsonl nor evaluations.jsonl has records",
    )


def _evaluation_lines(run: RunData, x_key: str) -> list[Line]:
    lines = []
    for index, mode in enumerate(run.modes()):
        records = [r for r in run.evaluated(mode) if finite(r.get(x_key))]
        xs, ys = points(records, x_key, "accuracy")
        banded = bool(records) and all(finite(r.get("low")) and finite(r.get("high")) for r in records)
        low, high = (([float(r[key]) for r in records]) if banded else None for key in ("low", "high"))
        label = {"sampled": "sampled (temperature 1)", "": "evaluation"}.get(mode, mode)
        if mode == "sampled" and records and finite(records[0].get("temperature")):
            label = f"sampled (temperature {number(records[0]['temperature'])})"
        lines.append(Line(label, xs, ys, COLOURS[index % 6], DASHES[index % 3], low=low, high=high, marks=True))
    return lines


def _reward_lines(run: RunData, x_key: str) -> list[Line]:
    out = []
    for key, label, colour, dash in (
        ("reward_mean", "mean reward", "c1", "solid"),
        ("accuracy", "accuracy of the batch", "c3", "dash"),
    ):
        out += _smooth(*run.series(key, x_key), label, colour, dash)
    return out


def _smooth(xs: list[float], ys: list[float], label: str, colour: str, dash: str = "solid") -> list[Line]:
    """The raw curve, pale, and its running mean; only the raw one when it is short."""
    if len(xs) < 12:
        return [Line(label, xs, ys, colour, dash)]
    return [Line("", xs, ys, colour, width=1.2, faint=True), Line(label, xs, smoothed(ys, max(3, len(ys) // 20)), colour, dash)]


def lengths_section(run: RunData) -> str:
    """Response lengths and the length bias of early stopping."""
    tokens = Axis(low=0.0)
    spread = [
        Line("longest", *run.series("length_max"), "c6", "dot", width=1.4),
        Line("99th percentile", *run.series("length_p99"), "c2", "dash"),
        Line("mean", *run.series("length_mean"), "c1"),
        Line("median", *run.series("length_p50"), "c3", "dash"),
    ]
    middle = [line for line in spread if line.label in ("mean", "median")]
    means = [
        Line("delivered to the trainer", *run.series("delivered_mean_tokens"), "c1"),
        Line("of everything issued", *run.series("issued_mean_tokens"), "c2", "dash"),
    ]
    xs, ys = run.series("length_bias")
    even = [Line("", [xs[0], xs[-1]], [1.0, 1.0], "c6", "dot", width=1.2)] if xs else []
    return section(
        "Lengths, and what early stopping does to them",
        "The gap between the 99th percentile and the median is the tail that a synchronous run waits for. A schedule that "
        "stops early could train on short answers only: the length bias is mean delivered over mean issued length since the "
        "start, 1 is fair, and below 1 means that long answers are still under way or were dropped.",
        plots(
            line_chart("Response length in tokens", spread, STEPS, tokens),
            line_chart("Mean and median alone", middle, STEPS, tokens),
            line_chart("Mean length: delivered and issued (tokens)", means, STEPS, tokens),
            line_chart("Length bias (1 = fair)", [*even, Line("length bias", xs, ys, "c1")], STEPS),
        ),
        missing="metrics.jsonl has no lengths",
    )


def lag_section(run: RunData) -> str:
    """How old the trained tokens were."""
    lag = [
        Line("largest", *run.series("lag_max"), "c6", "dot", width=1.4, steps=True),
        Line("95th percentile", *run.series("lag_p95"), "c2", "dash"),
        Line("mean", *run.series("lag_mean"), "c1"),
    ]
    stale = [Line("stale tokens", *run.series("stale_token_fraction"), "c1", fill=True)]
    parked = [
        Line("groups parked at the end of the step", *run.series("parked_groups"), "c2"),
        Line("finished groups kept for later", *run.series("ready_groups"), "c3", "dash"),
    ]
    segments = [Line("segments a sample", *run.series("segments_mean"), "c4")]
    return section(
        "How old the data was",
        "Lag counts the updates between the weights that wrote a token and the weights that train on it: 0 is perfectly fresh, "
        "and samples that were parked make it larger. Tokens with a lag above 0 are those that the loss has to correct.",
        plots(
            line_chart("Lag of trained tokens (updates)", lag, STEPS, COUNT),
            line_chart("Share of trained tokens with lag > 0", stale, STEPS, FRACTION),
            line_chart("Groups carried over", parked, STEPS, COUNT),
            line_chart("Policy versions in one sample (mean)", segments, STEPS),
        ),
        missing="metrics.jsonl has no lag",
    )


def time_section(run: RunData) -> str:
    """Where the seconds of a step go."""
    idle = _smooth(*run.series("idle_fraction"), "idle slots", "c2")
    speed = _smooth(*run.series("tokens_per_s"), "tokens per second", "c1")
    return section(
        "Where the time goes",
        "Each bar is the wall clock of one step (or the mean of a few). Idle is the share of slot-time in rollout in which a "
        "slot had no sample to run: the price of waiting for the longest answer, and what partial rollouts are there to avoid.",
        plots(
            _phases(run),
            line_chart("Idle share of slots during rollout", idle, STEPS, FRACTION),
            line_chart("Generation speed (tokens per second)", speed, STEPS, COUNT),
            line_chart(
                "Tokens generated so far", [Line("tokens", *run.series("tokens_generated", "time_s"), "c1")], SECONDS, COUNT
            ),
        ),
        busy_note(run),
        missing="metrics.jsonl has no times",
    )


def _phases(run: RunData) -> str:
    records = [r for r in run.metrics if finite(r.get("step")) and any(finite(r.get(key)) for key in PHASES)]
    if not records:
        return ""
    size = -(-len(records) // MAX_BARS)
    blocks = [records[i : i + size] for i in range(0, len(records), size)]
    xs = [float(block[0]["step"]) for block in blocks]
    layers = []
    rest = [_mean([float(r["step_s"]) for r in block if finite(r.get("step_s"))]) for block in blocks]
    for key, (label, colour) in PHASES.items():
        ys = [_mean([float(r[key]) for r in block if finite(r.get(key))]) for block in blocks]
        layers.append(Line(label, xs, ys, colour))
        rest = [max(0.0, left - y) for left, y in zip(rest, ys, strict=True)]
    layers.append(Line("other", xs, rest, "c6"))
    return stacked_chart("Seconds of a step", xs, layers, STEPS, Axis(low=0.0), width=HALF)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def learner_section(run: RunData) -> str:
    """The health of the optimisation, and every other number that the run recorded."""
    main = [
        line_chart(title, [Line(key, *run.series(key), "c1")], STEPS, width=THIRD, height=190)
        for key, title in LEARNER_KEYS.items()
    ]
    others = sorted(
        {key for record in run.metrics for key, value in record.items() if finite(value)} - SHOWN_ELSEWHERE - set(LEARNER_KEYS)
    )
    extra = [line_chart(key, [Line(key, *run.series(key), "c6")], STEPS, width=THIRD, height=170) for key in others[:MAX_EXTRAS]]
    hidden = len(others) - MAX_EXTRAS
    more = plots(*extra, columns=3)
    if more:
        left_out = note(f"{hidden} more are in metrics.jsonl") if hidden > 0 else ""
        more = f"<details><summary>{len(others)} other numbers of this run</summary>{more}{left_out}</details>"
    return section(
        "The learner",
        "Signs of health: the gradient norm stays bounded, entropy falls slowly rather than at once, few tokens are clipped, "
        "and the log-probs of the trainer and the engine agree (their difference is numerical noise unless something is wrong).",
        plots(*main, columns=3),
        more,
        missing="metrics.jsonl has no values of the learner",
    )
