"""Mixes keep to their weights, splits to their shares, and both to the seed."""

import numpy as np
import pytest

from data.selection import assign_splits, draw, quotas, take_smallest


def test_a_mix_takes_as_much_as_the_scarcest_source_allows():
    assert quotas([100, 1000], [1, 1], None) == [100, 100]
    assert quotas([100, 1000], [1, 3], None) == [100, 300]
    assert quotas([100, 1000], [1, 3], 40) == [10, 30]


def test_rows_that_do_not_divide_go_to_the_largest_remainders():
    assert quotas([10, 10, 10], [1, 1, 1], 10) == [4, 3, 3]
    assert sum(quotas([7, 11, 13], [0.3, 0.5, 0.2], 17)) == 17


def test_asking_for_more_rows_than_the_weights_allow_says_how_many_are_possible():
    with pytest.raises(ValueError, match="no more than 400 are possible"):
        quotas([100, 1000], [1, 3], 500)


def test_the_draw_depends_on_key_seed_and_purpose_only():
    keys = np.arange(1000, dtype=np.uint64)
    assert (draw(keys, 0, "a") == draw(keys[::-1], 0, "a")[::-1]).all()
    assert not (draw(keys, 0, "a") == draw(keys, 1, "a")).any()
    assert not (draw(keys, 0, "a") == draw(keys, 0, "b")).any()
    assert take_smallest(np.array([5, 1, 4, 2], np.uint64), np.array([0, 1, 3]), 2).tolist() == [1, 3]


def test_every_stratum_is_split_in_the_same_shares():
    groups = np.arange(1000, dtype=np.uint64)
    strata = np.repeat([0, 1, 2], [500, 300, 200])
    split = assign_splits(groups, strata, {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=0)
    for stratum, size in ((0, 500), (1, 300), (2, 200)):
        assert np.bincount(split[strata == stratum]).tolist() == [size * 8 // 10, size // 10, size // 10]
    again = assign_splits(groups, strata, {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=1)
    assert (split != again).any()


def test_rows_of_one_question_stay_together():
    groups = np.repeat(np.arange(100, dtype=np.uint64), 5)
    split = assign_splits(groups, np.zeros(500, np.int32), {"a": 0.5, "b": 0.5}, seed=3)
    assert all(len(set(split[groups == g])) == 1 for g in range(100))
    assert np.bincount(split).tolist() == [250, 250]
