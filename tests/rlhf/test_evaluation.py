"""Estimators against their definitions."""

from itertools import combinations

import numpy as np
import pytest

from rlhf.evaluation import GradedProblem, bootstrap, compare, majority_correct, paired_difference, pass_at_k, summarise


def graded(id, verdicts, answers=None, level=1):
    n = len(verdicts)
    return GradedProblem(
        id=id,
        level=level,
        answers=tuple(answers or ["x"] * n),
        verdicts=tuple(verdicts),
        lengths=(3,) * n,
        truncated=(False,) * n,
        texts=("",) * n,
    )


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 1), (4, 1, 2), (4, 2, 3), (5, 0, 2), (5, 5, 5), (6, 2, 4)])
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
    assert majority_correct([None, None], [False, False]) == 0.0
    assert majority_correct(["8", None, None, None], [True, False, False, False]) == 1.0


def test_the_bootstrap_interval_covers_the_truth_about_95_percent_of_the_time():
    generator = np.random.default_rng(0)
    covered = sum(
        e.low <= 0.3 <= e.high
        for e in (bootstrap((generator.random(200) < 0.3).astype(float), seed=i) for i in range(200))
    )
    assert 0.90 <= covered / 200 <= 0.99


def test_a_paired_difference_is_tighter_than_two_separate_intervals():
    generator = np.random.default_rng(0)
    baseline = generator.random(300)
    estimate = paired_difference(baseline, baseline + 0.1)
    assert (estimate.mean, estimate.low, estimate.high) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))


def test_a_problem_that_could_not_be_judged_is_left_out_and_counted_never_wrong():
    problems = [graded("a", ["correct", "correct"]), graded("b", ["undecided", "wrong"])]
    summary = summarise(problems, pass_at=(1, 2), seed=0)
    assert summary["pass_at_1"]["mean"] == 1.0
    assert summary["pass_at_1"]["n"] == 1
    assert summary["undecided_problems"] == 1


def test_a_comparison_uses_only_problems_both_models_have_judged():
    baseline = [graded("a", ["wrong"]), graded("b", ["undecided"])]
    other = [graded("a", ["correct"]), graded("b", ["wrong"])]
    assert compare(baseline, other, seed=0) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1}
