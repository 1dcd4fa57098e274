"""Data of a known age."""

from __future__ import annotations

import pytest
from test_all_schedules import drive, members


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_batch_k_is_min_k_delay_updates_old(delay: int) -> None:
    driver, batches = drive({"type": "delayed", "delay_steps": delay}, train_s=5.0)
    lags = [
        {batch.version - version for group in batch.groups for sample in group.samples for version in sample.versions}
        for batch in batches
    ]
    assert lags == [{min(step, delay)} for step in range(len(batches))]
    assert driver.pool.ledger.balanced and max(delay, 1) < len(batches)


def test_no_delay_is_the_synchronous_schedule() -> None:
    _, delayed = drive({"type": "delayed", "delay_steps": 0})
    _, sync = drive({"type": "sync"})
    _, late = drive({"type": "delayed", "delay_steps": 2})
    assert [sorted(step) for step in members(delayed)] == [sorted(step) for step in members(sync)]
    assert [batch.version for batch in late] == list(range(len(late)))
