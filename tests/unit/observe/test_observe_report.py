from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from observe_fake_run import EVIL, make_run

from april.observe.report import idle_share, ledger, write_report
from april.observe.report_data import RunData, load_run, smoothed, thinned
from april.observe.report_plots import Line, line_chart, ticks
from april.observe.report_timeline import MAX_ROWS, choose_window, covered_s, step_boundaries
from april.observe.report_transcripts import choose_pairs

SECTIONS = (
    "Learning", "Who was running, who waited", "Lengths, and what early stopping does to them", "How old the data was",
    "Where the time goes", "What the policy says, early and late", "The learner", "Recipe, environment, fate of the samples",
)  # fmt: skip
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Collects tags and checks that they are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.errors: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.errors.append(tag)


def check(path: Path) -> tuple[str, Checker]:
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.errors == [] and checker.stack == []
    return text, checker


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), 40)


def test_a_report_has_every_section_and_its_headlines(run_dir: Path) -> None:
    text, _ = check(write_report(run_dir))
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in text
    assert "Not shown:" not in text and 'class="missing"' not in text
    assert "<h1>quickstart</h1>" in text and "balanced" in text and "schedule april" in text
    assert "paired 95 % interval +21.0 to +38.0" in text
    assert text.count("<figure>") > 20


def test_a_report_needs_nothing_from_outside(run_dir: Path) -> None:
    text, checker = check(write_report(run_dir))
    assert [tag for tag, _ in checker.tags if tag in {"link", "img", "iframe", "object"}] == []
    assert [attrs for _, attrs in checker.tags if {"src", "href"} & set(attrs)] == []
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in text and "default-src 'none'" in text


def test_what_the_policy_wrote_cannot_become_markup(run_dir: Path) -> None:
    text, checker = check(write_report(run_dir))
    assert "alert(" in text and EVIL not in text
    assert sum(tag == "script" for tag, _ in checker.tags) == 1
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text


def test_hostile_names_everywhere_stay_text(tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script>"
    (tmp_path / "recipe.toml").write_text(f"name = {json.dumps(evil)}\n[schedule]\ntype = {json.dumps(evil)}\n")
    records = [{"step": s, "time_s": s, "step_s": 1, "rollout_s": 1, "loss": s, evil: s} for s in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 0, "mode": evil, "accuracy": 0.5}) + "\n")
    sample = {"track": "sample", "name": evil, "start_s": 0, "end_s": 2, "state": evil, "step": 0}
    (tmp_path / "timeline.jsonl").write_text(
        json.dumps(sample) + "\n" + json.dumps({"counter": evil, "time_s": 0, "value": 1}) + "\n"
    )
    transcript = {"step": 0, "prompt_id": evil, "prompt": evil, "responses": [{"text": evil, "stop": evil, "failure": evil}]}
    (tmp_path / "transcripts.jsonl").write_text(json.dumps(transcript) + "\n")
    (tmp_path / "environment.json").write_text(json.dumps({evil: evil}))
    (tmp_path / "summary.json").write_text(json.dumps({"status": evil}))
    text, checker = check(write_report(tmp_path))
    assert sum(tag == "script" for tag, _ in checker.tags) == 1
    assert "<script>alert" not in text


def test_an_empty_folder_gives_a_report_that_says_what_is_missing(tmp_path: Path) -> None:
    text, _ = check(write_report(tmp_path / "."))
    for words in (
        "transcripts.jsonl has no recorded groups",
        "timeline.jsonl has no samples",
        "recipe.toml is missing",
        "not recorded",
    ):
        assert words in text
    assert "This run has not finished" in text
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in text


FILES = (
    "recipe.toml",
    "environment.json",
    "summary.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "transcripts.jsonl",
    "timeline.jsonl",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "empty", "torn", "foreign"])
def test_any_damaged_file_costs_only_its_sections(tmp_path: Path, name: str, fault: str) -> None:
    make_run(tmp_path, 6)
    path = tmp_path / name
    whole = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "torn": whole[: int(len(whole) * 0.7)], "foreign": b'[1, 2\n{"step": "x"}\nnull\n\xff\n'}[fault]
        )
    text, _ = check(write_report(tmp_path))
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in text


def test_absent_null_and_foreign_values_are_gaps(tmp_path: Path) -> None:
    rows = [
        {"step": 0},
        {"step": 1, "loss": None, "reward_mean": 0.5},
        {"step": 2, "loss": "x", "reward_mean": None},
        {"loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 3, "loss": NaN, "lag_max": 1e999}\n'
    )
    run = load_run(tmp_path)
    assert run.series("reward_mean") == ([1.0], [0.5]) and run.series("loss") == ([], [])
    text, _ = check(write_report(tmp_path))
    assert "NaN" not in text.split("<main>")[1].split("<script>")[0] and "nan" not in re.findall(r'points="[^"]*"', text)


def test_of_a_repeated_step_the_last_record_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 0, "loss": 3}\n{"step": 1, "loss": 2}\n')
    assert load_run(tmp_path).series("loss") == ([0.0, 1.0], [3.0, 2.0])


def test_five_hundred_steps_stay_small(tmp_path: Path) -> None:
    make_run(tmp_path, 500)
    # Measured: 0.6 s; a quadratic slip would be felt here as minutes.
    assert 200_000 < write_report(tmp_path).stat().st_size < 3_000_000


def test_idle_share_weighs_steps_by_the_engines_time() -> None:
    run = RunData(Path("."), "r", metrics=[{"idle_fraction": 0.5, "engine_s": 3.0}, {"idle_fraction": 0.1, "engine_s": 1.0}])
    assert idle_share(run) == pytest.approx(0.4)
    assert idle_share(RunData(Path("."), "r")) is None


def test_one_unbalanced_step_shows() -> None:
    steps = [{"ledger_balanced": True}, {"ledger_balanced": False}, {"ledger_balanced": True}]
    assert ledger(RunData(Path("."), "r", metrics=steps)) == (False, "NOT BALANCED")
    assert ledger(RunData(Path("."), "r", metrics=steps[:1])) == (True, "balanced")


def test_the_window_has_parked_samples_and_its_rows_are_bounded(run_dir: Path) -> None:
    run = load_run(run_dir)
    window = choose_window(run)
    assert len(window) == 4 and len(step_boundaries(run)) == 40
    start_s, end_s = window[0][1], window[-1][2]
    assert any(r["state"] == "parked" and start_s < r["start_s"] < end_s for r in run.samples)
    text = write_report(run_dir).read_text()
    found = re.search(r": (\d+) of (\d+) samples alive", text)
    assert found is not None and int(found[1]) <= MAX_ROWS and int(found[1]) <= int(found[2])
    assert 'class="wait"' in text


def test_a_run_that_parks_nothing_draws_no_hatch(tmp_path: Path) -> None:
    make_run(tmp_path, 6, schedule="sync")
    text, _ = check(write_report(tmp_path))
    assert '<rect class="wait"' not in text and '<rect class="f c1"' in text


def test_transcripts_of_one_prompt_are_paired_early_and_late() -> None:
    def record(step: int, prompt: str) -> dict[str, object]:
        return {"step": step, "prompt_id": prompt}

    pairs = choose_pairs([record(0, "a"), record(1, "b"), record(2, "a"), record(9, "b")])
    assert [(early["step"], late["step"], early["prompt_id"]) for early, late in pairs] == [(1, 9, "b"), (0, 2, "a")]
    assert [(early["prompt_id"], late["prompt_id"]) for early, late in choose_pairs([record(0, "a"), record(5, "b")])] == [
        ("a", "b")
    ]
    assert choose_pairs([]) == []


def test_segments_are_tinted_at_the_right_place(run_dir: Path) -> None:
    text = write_report(run_dir).read_text()
    assert re.search(r'title="policy version 38"><sup>v38</sup>12\+30=42, </span>', text)
    assert "versions v38 (20 tokens), v39 (28 tokens)" in text


@pytest.mark.parametrize(
    ("low", "high", "wanted", "seconds", "expected"),
    [
        (0, 1, 5, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 180, 4, True, [0, 60, 120, 180]),
        (0.0, 0.2, 2, True, [0, 0.1, 0.2]),
        (5, 5, 4, False, [5]),
        (-3, 3, 3, False, [-2, 0, 2]),
    ],
)
def test_ticks_are_round(low: float, high: float, wanted: int, seconds: bool, expected: list[float]) -> None:
    assert ticks(low, high, wanted, seconds=seconds) == pytest.approx(expected)


def test_thinning_keeps_peaks_and_smoothing_keeps_means() -> None:
    xs, ys = [float(i) for i in range(10_000)], [0.0] * 10_000
    ys[5_001], ys[7_777] = 9.0, -9.0
    thin_xs, thin_ys = thinned(xs, ys)
    assert len(thin_xs) <= 405 and max(thin_ys) == 9.0 and min(thin_ys) == -9.0 and thin_xs == sorted(thin_xs)
    assert smoothed([0.0, 3.0, 0.0], 3) == [1.5, 1.0, 1.5]


def test_charts_survive_one_point_and_constant_values() -> None:
    assert line_chart("empty", [Line("a", [], [])]) == ""
    assert "<circle" in line_chart("one", [Line("a", [3.0], [2.0])])
    assert "polyline" in line_chart("flat", [Line("a", [0.0, 1.0], [0.0, 0.0])])


def test_nested_spans_of_the_trainer_count_once() -> None:
    spans = [
        {"start_s": 0.0, "end_s": 4.0},
        {"start_s": 1.0, "end_s": 2.0},
        {"start_s": 3.0, "end_s": 5.0},
        {"start_s": 9.0, "end_s": 10.0},
    ]
    assert covered_s(spans) == 6.0
    assert covered_s([]) == 0.0
