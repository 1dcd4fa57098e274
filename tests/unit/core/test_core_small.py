"""Clocks, metrics, errors, patterns."""

from __future__ import annotations

import math
import pickle

import pytest

from april.core.clock import VirtualClock, WallClock
from april.core.errors import AprilError, CheckpointError, DataError, LedgerError, RolloutError, StallError, nearest
from april.core.metric import Max, Mean, Sum, merge, values
from april.core.pattern import checked_pattern, last_match


def test_a_virtual_clock_jumps_forwards_only() -> None:
    clock = VirtualClock(1.0)
    clock.wait_until(5.0)
    clock.wait_until(2.0)
    assert clock.now() == 5.0


def test_a_wall_clock_starts_at_zero_and_returns_at_once_from_the_past() -> None:
    clock = WallClock()
    clock.wait_until(-1.0)
    first = clock.now()
    assert 0 <= first <= clock.now()


def test_a_mean_of_parts_is_the_mean_of_the_whole() -> None:
    parts = [{"a": Mean(6.0, 3), "n": Sum(2), "m": Max(1.0)}, {"a": Mean(10.0, 1), "n": Sum(3), "m": Max(0.5)}]
    assert values(merge(parts)) == {"a": 4.0, "n": 5.0, "m": 1.0}
    assert values(merge(parts))["a"] != (2.0 + 10.0) / 2  # the mean of means


def test_merging_is_associative_and_empty_parts_are_neutral() -> None:
    a, b, c = Mean(1.0, 2), Mean(0.5, 1), Mean(0.0, 0)
    assert a.merged(b).merged(c) == a.merged(b.merged(c)) == Mean(1.5, 3)
    assert math.isnan(Mean().value)
    assert math.isnan(Max().value)
    assert Max().merged(Max(2.0)) == Max(2.0) == Max(2.0).merged(Max())


def test_an_error_says_where_got_expected_next() -> None:
    error = DataError("it is wrong", where="a.b", got=3, expected="4", hint="try 4")
    assert str(error).splitlines() == [
        "it is wrong",
        "  where:    a.b",
        "  got:      3",
        "  expected: 4",
        "  next:     try 4",
    ]
    assert str(DataError("short", got=0)) == "short\n  got:      0"


def test_errors_survive_pickling_and_are_one_tree() -> None:
    """Workers hand them to their parent process."""
    error = StallError("stuck", where="here", got=(1, 2))
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.got) == (StallError, str(error), (1, 2))
    assert issubclass(StallError, RolloutError)
    assert issubclass(LedgerError, RolloutError)
    assert issubclass(CheckpointError, AprilError)
    assert not issubclass(DataError, RolloutError)


def test_nearest_names_the_close_word_or_lists_all() -> None:
    assert nearest("schedul", ["schedule", "engine"]) == "did you mean 'schedule'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", []) == "known: none"


def test_the_last_match_counts() -> None:
    assert last_match("#### 3 then #### 4 ", r"####\s*(\d+)") == "4"
    assert last_match("x 12 y 34", r"\d+") == "34"
    assert last_match("  all ", None) == "all"
    assert last_match("none", r"\d+") is None
    assert checked_pattern(None) is None
    with pytest.raises(ValueError, match="not a regular expression"):
        checked_pattern("(")
