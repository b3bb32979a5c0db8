"""Estimators against their definitions."""

import dataclasses
import json
import math
from itertools import combinations, product

import pytest

from rlhf.evaluation import (
    GradedProblem,
    compare,
    majority_correct,
    paired_difference,
    pass_at_k,
    robustness,
    summarise,
    worst_of,
)


def graded(id, verdicts, answers=None, level=1, **more):
    n = len(verdicts)
    return GradedProblem(
        id=id,
        level=level,
        answers=tuple(answers or ["x"] * n),
        verdicts=tuple(verdicts),
        lengths=(3,) * n,
        truncated=(False,) * n,
        texts=("",) * n,
        **more,
    )


def solved(id, correct, samples, **more):
    return graded(id, ["correct"] * correct + ["wrong"] * (samples - correct), **more)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(n, c, k) for n in range(1, 8) for c in range(n + 1) for k in range(1, n + 1)]
)
def test_pass_at_k_equals_counting_all_subsets(n, c, k):
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_1_does_not_depend_on_the_number_of_samples():
    assert pass_at_k(4, 1, 1) == pytest.approx(pass_at_k(400, 100, 1)) == pytest.approx(0.25)


def test_pass_at_k_refuses_more_than_there_are_samples():
    with pytest.raises(ValueError, match="needs 5 samples"):
        pass_at_k(4, 1, 5)


def test_majority_ignores_missing_answers_and_shares_ties():
    assert majority_correct(["7", "7", "8", None], [True, True, False, False]) == 1.0
    assert majority_correct(["7", "8"], [True, False]) == 0.5
    assert majority_correct(["7", "8", "9"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority_correct([None, None], [False, False]) == 0.0
    assert majority_correct(["8", None, None, None], [True, False, False, False]) == 1.0


def test_a_confident_minority_wins_a_weighted_vote_and_weights_that_tie_in_any_order_tie():
    assert majority_correct(["7", "8", "8"], [True, False, False], [0.9, 0.4, 0.4]) == 1.0
    assert majority_correct(["7", "8", "8"], [True, False, False], [0.9, 0.5, 0.5]) == 0.0
    for weights in ([0.1, 0.2, 0.3, 0.6], [0.3, 0.2, 0.1, 0.6]):  # added from the left they differ in the last digit
        assert majority_correct(["7", "7", "7", "8"], [True, True, True, False], weights) == 0.5
    assert majority_correct(["7"] * 10 + ["8"], [True] * 10 + [False], [0.1] * 10 + [1.0]) == 0.5


def test_the_chance_of_the_worst_variant_is_that_of_enumerating_all_samples():
    # three variants, 2 samples each, p = 1/2: every sample a coin
    least = [min(sum(c[0:2]), sum(c[2:4]), sum(c[4:6])) / 2 for c in product((0, 1), repeat=6)]
    assert worst_of([0.5, 0.5, 0.5], 2) == (0.5, pytest.approx(sum(least) / 64))
    assert worst_of([1.0, 1.0], 4) == (1.0, 1.0)
    assert worst_of([0.0, 1.0], 1) == (0.0, 0.25)


def test_a_paired_difference_is_tighter_than_two_separate_intervals():
    baseline = [i / 300 for i in range(300)]
    estimate = paired_difference(baseline, [x + 0.1 for x in baseline])
    assert (estimate.mean, estimate.low, estimate.high) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))


def test_a_problem_that_could_not_be_judged_is_left_out_and_counted_never_wrong():
    problems = [graded("a", ["correct", "correct"]), graded("b", ["undecided", "wrong"])]
    summary = summarise(problems, pass_at=(1, 2), seed=0)
    assert summary["pass_at_1"]["mean"] == 1.0
    assert summary["pass_at_1"]["n"] == 1
    assert summary["undecided_problems"] == 1
    assert summary["undecided_share"] == 1 / 4


def test_accuracy_is_split_by_level_and_subject():
    problems = [
        solved("a", 2, 2, level=1, subject="Algebra"),
        solved("b", 1, 2, level=5, subject="Algebra"),
        solved("c", 0, 2, level=5, subject="Geometry"),
    ]
    summary = summarise(problems, pass_at=(1,), seed=0)
    assert {k: (v["mean"], v["n"]) for k, v in summary["by_level"].items()} == {"1": (1.0, 1), "5": (0.25, 2)}
    assert {k: v["mean"] for k, v in summary["by_subject"].items()} == {"Algebra": 0.75, "Geometry": 0.0}


def test_a_comparison_uses_only_problems_both_models_have_judged():
    baseline = [graded("a", ["wrong"]), graded("b", ["undecided"])]
    other = [graded("a", ["correct"]), graded("b", ["wrong"])]
    compared = compare(baseline, other, seed=0)
    assert (compared["mean"], compared["n"], compared["better"], compared["worse"]) == (1.0, 1, 1, 0)


def test_a_comparison_says_how_sure_it_is_and_what_it_could_have_seen():
    baseline = [solved(f"{i}", 1, 4) for i in range(8)]
    other = [solved(f"{i}", 2, 4) for i in range(6)] + [solved(f"{i}", 1, 4) for i in range(6, 8)]
    compared = compare(baseline, other, seed=0)
    assert compared["mean"] == pytest.approx(6 / 4 / 8)
    assert compared["p_value"] == 2 / 2**6  # six differences of one sign
    assert compared["p_value_method"] == "exact, dynamic programming"
    # s of 6 x 1/4 and 2 x 0 is 1/4 sqrt(6/8 2/8 8/7); (t_7 + z_0.8) s / sqrt(8)
    assert compared["detectable"] == pytest.approx((2.36462 + 0.84162) * 0.25 * math.sqrt(3 / 14 / 8), rel=1e-4)
    assert json.loads(json.dumps(compared)) == compared


def test_a_comparison_of_other_problems_is_refused():
    with pytest.raises(ValueError, match="2 are only in one of the two, for example 'a'"):
        compare([graded("a", ["wrong"])], [graded("b", ["wrong"])], seed=0)


def test_robustness_pairs_each_variant_with_its_own_originals():
    problems = [
        solved("a", 4, 4),
        solved("b", 2, 4),
        solved("a#typos", 3, 4, variant="typos", origin="a"),
        solved("b#typos", 2, 4, variant="typos", origin="b"),
        solved("a#numbers", 0, 4, variant="numbers", origin="a"),
    ]
    summary = summarise(problems, pass_at=(1,), seed=0)
    assert summary["pass_at_1"]["mean"] == 0.75
    assert summary["pass_at_1"]["n"] == 2
    by_variant = robustness(problems)["variants"]
    assert by_variant["typos"]["accuracy"]["mean"] == 0.625
    assert by_variant["typos"]["change"]["mean"] == -0.125
    assert (by_variant["numbers"]["accuracy"]["n"], by_variant["numbers"]["original"]["mean"]) == (1, 1.0)
    assert summary["robustness"]["worst"]["mean"] == (0.0 + 0.5) / 2
    assert summary["robustness"]["worst_by_chance"] < (7 / 12 + 2 / 4) / 2


def test_a_graded_problem_comes_back_from_its_json_row_and_a_strange_row_names_the_field():
    problem = graded(
        "a", ["correct", "undecided"], weights=(0.5, 0.25), reasons=("equal", "timeout"), subject="Algebra"
    )
    row = json.loads(json.dumps(dataclasses.asdict(problem)))
    assert GradedProblem.from_row(row) == problem
    with pytest.raises(ValueError, match="field 'mood' is unknown"):
        GradedProblem.from_row({**row, "mood": 1})
    with pytest.raises(ValueError, match="field 'texts' is missing"):
        GradedProblem.from_row({k: v for k, v in row.items() if k != "texts"})
    with pytest.raises(ValueError, match="2 verdicts and 1 answers"):
        GradedProblem.from_row({**row, "answers": ["1"]})
