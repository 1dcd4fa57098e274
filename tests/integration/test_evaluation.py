"""Evaluation stands apart from training (invariant 37): its own samples, one version, an idle engine."""

from __future__ import annotations

import numpy as np
import pytest

from april.core.errors import EngineError
from april.rollout.snapshot import pool_state
from april.run.build import Parts, build
from april.run.loop import evaluate_parts
from tests.integration.crash_helpers import recipe_for


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    return build(recipe_for(folder, "evaluation.num_samples=4", "schedule.over_provision=2", "schedule.max_lag_steps=2"))


def test_an_evaluation_leaves_the_pool_and_the_cursor_alone(parts: Parts) -> None:
    batch = parts.driver.next_batch()
    assert batch.groups and parts.driver.pool.groups, "without parked groups nothing could be disturbed"
    before = (repr(pool_state(parts.pool)), parts.prompts.state_dict(), parts.pool.ledger.to_dict())
    result = evaluate_parts(parts, "sampled")
    assert (repr(pool_state(parts.pool)), parts.prompts.state_dict(), parts.pool.ledger.to_dict()) == before
    assert result.correct.shape == (8, 4) and {v for s in result.samples for v in s.versions} == {0}
    held_out = {prompt.id for prompt in parts.data.held_out}
    assert {sample.prompt.id for sample in result.samples} == held_out
    assert not held_out & {prompt.id for prompt in parts.data.train}


def test_the_same_weights_get_the_same_answers(parts: Parts) -> None:
    first, second = evaluate_parts(parts, "sampled"), evaluate_parts(parts, "sampled")
    assert np.array_equal(first.correct, second.correct)
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(first.samples, second.samples, strict=True))
    members = first.samples[:4]
    assert len({tuple(sample.token_ids.tolist()) for sample in members}) > 1, "samples of one problem must differ"


def test_pass_at_k_and_intervals_come_with_several_samples(parts: Parts) -> None:
    record = evaluate_parts(parts, "sampled").to_record(3, 1.0)
    assert set(record["pass_at"]) == {"1", "2", "4"} and record["pass_at"]["1"] == pytest.approx(record["accuracy"])
    assert record["pass_at"]["1"] <= record["pass_at"]["2"] <= record["pass_at"]["4"]
    assert 0 <= record["low"] <= record["accuracy"] <= record["high"] <= 1


def test_a_busy_engine_is_not_evaluated(parts: Parts) -> None:
    waiting = parts.pool.waiting_groups(1)[0]
    parts.engine.submit([parts.pool[sample] for sample in parts.pool.waiting_samples(waiting)])
    with pytest.raises(EngineError, match="cannot evaluate"):
        evaluate_parts(parts, "greedy")
    parts.engine.abort()
    while parts.engine.ready_at() is not None:
        parts.engine.poll()
    assert evaluate_parts(parts, "greedy").correct.shape == (8, 1)
