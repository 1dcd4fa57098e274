"""Addressed random numbers: a draw belongs to a place."""

from __future__ import annotations

import numpy as np

from april.core.ids import SampleId
from april.core.random import permutation, sample_key, stream_key, uniforms

ID = SampleId(3, 1, "p0", 2)
KEY = 2741121073682964638
UNIFORMS = [0.6370420934476659, 0.3079808977870315, 0.6672343020462702]


def test_keys_and_uniforms_are_these_numbers_on_every_machine() -> None:
    """Invariant 34: the address alone decides; a change of the recipe for numbers would show here."""
    assert stream_key(0, "order", 0) == KEY
    np.testing.assert_array_equal(uniforms([KEY], [0, 1, 2]), UNIFORMS)


def test_the_order_and_the_company_of_draws_do_not_matter() -> None:
    """Invariant 34: one by one, together, backwards or beside other samples: the same number at each position."""
    key, other = sample_key(7, ID), sample_key(7, ID._replace(member=0))
    together = uniforms([key], np.arange(50))
    singly = [uniforms([key], position)[0] for position in range(50)]
    beside = uniforms([key, other] * 25, np.repeat(np.arange(25), 2))[::2]
    np.testing.assert_array_equal(together, singly)
    np.testing.assert_array_equal(together[::-1], uniforms([key], np.arange(50)[::-1]))
    np.testing.assert_array_equal(together[:25], beside)


def test_every_part_of_the_address_matters() -> None:
    ids = [ID, ID._replace(serial=4), ID._replace(epoch=0), ID._replace(prompt="p1"), ID._replace(member=1)]
    ids.append(ID._replace(branch="0"))
    keys = {sample_key(seed, sample) for seed in (0, 1) for sample in ids}
    assert len(keys) == 12
    assert stream_key(1, "23") != stream_key(12, "3")


def test_uniforms_are_uniform_and_in_range() -> None:
    draws = uniforms([stream_key(0)], np.arange(100_000))
    assert 0 <= draws.min() <= draws.max() < 1
    counts, _ = np.histogram(draws, 50, (0, 1))
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 85.4  # 99.9 % quantile for 49 degrees of freedom
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01


def test_streams_of_neighbours_are_not_correlated() -> None:
    first, second = (uniforms([sample_key(0, ID._replace(member=m))], np.arange(20_000)) for m in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_a_permutation_belongs_to_its_seed_and_epoch() -> None:
    first = permutation(0, 0, 20)
    assert sorted(first) == list(range(20))
    np.testing.assert_array_equal(first, permutation(0, 0, 20))
    assert first.tolist() != permutation(0, 1, 20).tolist()
    assert first.tolist() != permutation(1, 0, 20).tolist()
