"""Recipes for data: what is contradictory is one sentence, before a file is read."""

from pathlib import Path

import pytest

from rlhf.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split.shares.train=0.9", "shares add up to 0.95, not 1"),
        ("sources=[{name: math, weight: 2.0}]", "a source has a weight, but there is no mix"),
        ("filters.max_tokens=512", "but tokenizer is not set"),
        ("filters={tokenizer: t, min_tokens: 9, max_tokens: 5}", "max_tokens is 5 and min_tokens is 9; swap them"),
        ("duplicates.near_treshold=0.7", "unknown key 'duplicates.near_treshold'; did you mean 'near_threshold'?"),
        ("duplicates.near_threshold=1.5", "key 'duplicates.near_threshold' has the value 1.5"),
        ("sources=[]", "sources"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_sentence(override, message):
    with pytest.raises(ValueError) as error:
        load_config(ROOT / "recipes/data/math.yaml", [override])
    assert message in str(error.value)


def test_every_benchmark_of_the_base_recipe_is_known_and_none_is_missing():
    from data.catalog import BENCHMARKS

    against = load_config(ROOT / "recipes/data/math.yaml").decontamination.against
    assert set(against) == set(BENCHMARKS) - {"math", "jsonl"}  # all of MATH's test set is no benchmark here
