"""Published figures: what the page says is what the kept results of the studies say, within the ranges of the studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from april.simulate.study import load_study

DOCS = Path(__file__).parents[3] / "docs"
QUOTED = ("token_budget", "one_step", "interruptible", "areal", "roll_flash", "dora", "over_capacity")


def kept(study: str) -> dict[str, Any]:
    return json.loads((DOCS / "results" / f"{study}.json").read_text(encoding="utf-8"))


def rows() -> list[list[str]]:
    """The table of published figures: study, claim, published, accepted, here."""
    section = (DOCS / "simulator.md").read_text(encoding="utf-8").split("## Published figures")[1].split("\n## ")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")]
    return [row for row in table if row[0].strip("`") in QUOTED]


@pytest.mark.parametrize("study", [*QUOTED, "april_table", "adaptive"])
def test_kept_results_are_of_the_study_as_it_is(study: str) -> None:
    config, content = load_study(study).config, kept(study)
    assert [(e["what"], e["low"], e["high"]) for e in content["expectations"]] == [(e.what, e.low, e.high) for e in config.expect]
    assert content["seeds"] == config.seeds


@pytest.mark.parametrize("study", QUOTED)
def test_kept_results_are_within_their_ranges(study: str) -> None:
    for expectation in kept(study)["expectations"]:
        assert expectation["low"] <= expectation["got"]["mean"] <= expectation["high"], expectation["what"]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]} {row[1][:30]}")
def test_the_page_says_what_was_kept(row: list[str]) -> None:
    study, _, _, accepted, here = row
    known = {(e["low"], e["high"], f"{e['got']['mean']:.2f}") for e in kept(study.strip("`"))["expectations"]}
    for wanted, got in zip(accepted.split(", "), here.split(", "), strict=True):
        low, high = map(float, wanted.split(" to "))
        assert (low, high, got) in known


def test_every_study_is_on_the_page() -> None:
    assert {row[0].strip("`") for row in rows()} == set(QUOTED)


def test_nothing_but_the_change_of_weights_limits_the_ablation_of_interruption() -> None:
    """Samples in flight fit into the KV memory, and an update takes less time than a step."""
    times = {(line["arm"], line["point"]["cluster.model"]): line["figures"]["step_s"] for line in kept("interruptible")["lines"]}
    for cell in load_study("interruptible").cells:
        config, costs = cell.config, cell.config.resolved_costs()
        mean_tokens = config.workload.mean_tokens
        assert config.schedule.max_running * mean_tokens <= costs.num_replicas * costs.engine.kv_tokens
        update_s = costs.train.update_s(config.groups_per_step * config.group_size * round(mean_tokens))
        assert update_s < times[cell.arm, dict(cell.point)["cluster.model"]]


def test_the_page_says_how_long_the_largest_step_took() -> None:
    text = (DOCS / "simulator.md").read_text(encoding="utf-8")
    seconds = {line["arm"]: line["cpu_s"] for line in kept("scale")["lines"]}
    assert max(seconds.values()) < 60
    assert all(f"{round(cpu_s)} s (`{arm}`" in text.replace("\n", " ") for arm, cpu_s in seconds.items())
