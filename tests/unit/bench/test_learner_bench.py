"""The learner against a padded loop: both compute the same, and a loop that does not is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from april.bench import learner_bench
from april.bench.learner_bench import CASES, LearnerOptions, make_batch, response_lengths, run_learner_bench, value_differences
from april.bench.padded_loop import PaddedLoop
from april.bench.worker import random_model
from april.cli.bench import app
from april.core.errors import DataError, ModelError

SMALL = LearnerOptions("tiny", samples=8, group_size=4, micro_batch_tokens=1024, rounds=1, threads=1)


@pytest.mark.parametrize("name", CASES)
def test_both_sides_compute_the_same(name: str) -> None:
    found = value_differences(random_model("tiny"), make_batch(CASES[name], SMALL), SMALL.training)
    assert 0 < found["logprob"] < 1e-5 and 0 < found["gradient"] < 1e-5


def test_a_loop_with_other_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("april.bench.padded_loop._advantages", lambda rewards: learner_bench.torch.tensor(rewards))
    with pytest.raises(ModelError, match="other values"):
        run_learner_bench(SMALL, lambda _line: None)


def test_batches_have_the_lengths_and_shared_prompts_of_their_case() -> None:
    batch = make_batch(CASES["shared-prompt"], SMALL)
    first, second = batch.groups
    assert {len(sample) for group in batch.groups for sample in group.samples} == {128}
    assert len({sample.prompt.token_ids.tobytes() for sample in first.samples}) == 1
    assert first.samples[0].prompt.token_ids.tobytes() != second.samples[0].prompt.token_ids.tobytes()
    assert [reward.value for _, reward in first.rewarded] == [0, 1, 0, 1]
    assert len(make_batch(CASES["equal"], SMALL).groups[0].samples[0].prompt.token_ids) == 8
    tail = response_lengths(CASES["long-tailed"], 64)
    assert (int(tail.min()), float(sorted(tail)[32]), int(tail.max())) == (2, 31.0, 512)


def test_padding_counts_against_the_tokens_of_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    inner = PaddedLoop._logprobs
    monkeypatch.setattr(PaddedLoop, "_logprobs", lambda loop, samples: rows.append(len(samples)) or inner(loop, samples))
    PaddedLoop(random_model("tiny"), SMALL.training).update(make_batch(CASES["equal"], SMALL))
    assert rows == [7, 1]  # rows of 8 + 128 tokens within 1024


def test_groups_that_are_not_whole_are_refused() -> None:
    for changed in ({"samples": 10, "group_size": 4}, {"samples": 4, "group_size": 1}):
        with pytest.raises(DataError, match="groups are not whole"):
            LearnerOptions(**changed)  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path: Path) -> None:
    sizes = ["--samples", "4", "--group-size", "2", "--rounds", "2", "--threads", "1"]
    done = CliRunner().invoke(app, ["learner", "--model", "tiny", *sizes, "--json", "--keep", str(tmp_path / "learner.json")])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout.splitlines()[-1])
    cases = results["models"][0]["cases"]
    assert [case["name"] for case in cases] == ["equal", "shared-prompt", "long-tailed"]
    for case in cases:
        assert case["ratio"]["num"] == 2 and case["ratio"]["low"] <= case["ratio"]["median"] <= case["ratio"]["high"]
        assert case["tokens_per_s"]["april"]["low"] > 0
    assert json.loads((tmp_path / "learner.json").read_text()) == {"benchmark": "learner", **results}
