"""Intervals and tests against SciPy, against brute force, and against what they promise when drawn many times."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from rlhf import uncertainty
from rlhf.uncertainty import (
    Spread,
    bootstrap,
    detectable_difference,
    difference,
    half_width,
    share,
    sign_flip_test,
    standard_error,
    student_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 29, 39, 100, 1318])
@pytest.mark.parametrize("probability", [0.75, 0.975, 0.999])
def test_students_quantile_is_scipys(degrees, probability):
    assert student_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


def test_the_standard_error_counts_problems_not_samples():
    # accuracies 0, 1/2, 1: s = 1/2, se = 1/2 / sqrt(3)
    assert standard_error([0.0, 0.5, 1.0]) == pytest.approx(0.5 / math.sqrt(3))


def test_wilsons_interval_of_independent_answers_is_scipys_up_to_the_t_quantile():
    values = [1.0] * 30 + [0.0] * 970
    theirs = stats.binomtest(30, 1000).proportion_ci(method="wilson")
    ours = share(values)
    assert (ours.mean, ours.n) == (0.03, 1000)
    assert ours.low == pytest.approx(theirs.low, abs=1e-4)
    assert ours.high == pytest.approx(theirs.high, abs=1e-4)


def test_thirty_problems_all_solved_do_not_prove_a_perfect_model():
    # n' = 30, t = 2.0452: low = (1 + t²/60 - t²/60) / (1 + t²/30) = 1 / 1.13943
    estimate = share([1.0] * 30, samples=64)
    assert (estimate.mean, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(0.87763, abs=1e-5)
    assert share([0.0] * 30).high == pytest.approx(1 - 0.87763, abs=1e-5)


def test_equal_problems_leave_the_noise_of_their_samples():
    assert share([0.5] * 10, samples=4).low == pytest.approx(share([0.0, 1.0] * 20).low, abs=0.02)


def test_one_problem_says_nothing_about_the_others():
    assert (share([1.0]).low, share([1.0]).high) == (0.0, 1.0)
    assert (difference([0.5]).low, difference([0.5]).high) == (-1.0, 1.0)


def test_no_judged_problem_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="every completion was undecided"):
        share([])


def draw_accuracies(rng, runs, n, k, a, b):
    return rng.binomial(k, rng.beta(a, b, (runs, n))) / k


@pytest.mark.parametrize(("n", "k", "a", "b"), [(30, 64, 1, 1), (40, 4, 5, 5), (200, 1, 1, 1), (500, 4, 0.5, 0.5)])
def test_the_shown_interval_covers_the_truth_95_percent_of_the_time(n, k, a, b):
    drawn = draw_accuracies(np.random.default_rng(n), 8000, n, k, a, b)
    covered = np.mean([(e := share(row, samples=k)).low <= a / (a + b) <= e.high for row in drawn])
    assert covered == pytest.approx(0.95, abs=0.01)


def test_the_bootstrap_interval_covers_too_and_unwidened_percentiles_do_less_on_30_problems(monkeypatch):
    monkeypatch.setattr(uncertainty, "RESAMPLES", 1000)
    drawn = draw_accuracies(np.random.default_rng(1), 3000, 30, 64, 1, 1)
    ours = np.mean([(e := bootstrap(row)).low <= 0.5 <= e.high for row in drawn])
    monkeypatch.setattr(uncertainty, "student_quantile", lambda p, df: math.sqrt(29 / 30) * stats.norm.ppf(p))
    plain = np.mean([(e := bootstrap(row)).low <= 0.5 <= e.high for row in drawn])
    assert ours == pytest.approx(0.95, abs=0.01)
    assert plain < ours - 0.005


@pytest.mark.parametrize(("n", "k"), [(30, 64), (30, 8), (500, 4)])
def test_the_interval_of_a_paired_difference_covers_the_truth_95_percent_of_the_time(n, k):
    rng = np.random.default_rng(n + k)
    hard = rng.beta(1, 1, (8000, n))
    better = hard + 0.5 * hard * (1 - hard)  # the second model is better by E[p(1-p)]/2 = 1/12
    drawn = (rng.binomial(k, better) - rng.binomial(k, hard)) / k
    covered = np.mean([(e := difference(row)).low <= 1 / 12 <= e.high for row in drawn])
    assert covered == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_the_permutation_test_is_scipys_exact_one(seed):
    rng = np.random.default_rng(seed)
    n = 4 + seed
    a, b = rng.integers(0, 5, n) / 4, rng.integers(0, 5, n) / 4
    theirs = stats.permutation_test(
        (b, a), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    ours = sign_flip_test(list(b - a))
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=1e-12)
    assert ours.method == "exact, dynamic programming"
    without_a_unit = sign_flip_test(list((b - a) * math.pi))
    assert without_a_unit.p_value == pytest.approx(theirs.pvalue, abs=1e-12)
    assert without_a_unit.method == "exact, enumeration"


def test_the_permutation_test_worked_by_hand():
    # 4 problems, all better by 1: of 16 sign patterns only all-plus and all-minus are as far: 2/16
    assert sign_flip_test([1, 1, 1, 1]).p_value == 2 / 16
    # 1/2, 1/2 and -1/4: |sum| 3/4; sums are ±5/4, ±3/4, ±1/4, ±1/4: 4 of 8
    assert sign_flip_test([0.5, 0.5, -0.25]).p_value == 4 / 8
    assert sign_flip_test([0.0, 0.0]).p_value == 1.0


def test_counting_sums_equals_trying_every_sign():
    differences = [3, -1, 2, 2, -4, 1, 5, 0, 1, -2]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=10)]
    expected = sum(abs(s) >= abs(sum(differences)) for s in sums) / len(sums)
    assert sign_flip_test([d / 64 for d in differences]).p_value == pytest.approx(expected, abs=1e-15)


def test_signs_are_drawn_where_they_cannot_be_counted_and_the_result_says_so():
    differences = [math.sqrt(i) * (-1) ** (i % 3) / 10 for i in range(2, 42)]
    ours = sign_flip_test(differences)
    theirs = stats.permutation_test(
        (differences, [0.0] * 40),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=100_000,
        rng=np.random.default_rng(0),
    )
    assert ours.method == "Monte-Carlo"
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.01)


def test_a_p_value_is_never_zero_even_when_signs_are_drawn():
    assert sign_flip_test([math.sqrt(i) for i in range(2, 60)]).p_value == 1 / 100_001


def test_two_equal_models_look_different_5_percent_of_the_time():
    rng = np.random.default_rng(0)
    p = rng.beta(1, 1, (2000, 60))
    differences = (rng.binomial(8, p) - rng.binomial(8, p)) / 8
    rejected = np.mean([sign_flip_test(list(row)).p_value <= 0.05 for row in differences])
    assert rejected == pytest.approx(0.05, abs=0.015)


def test_the_spread_of_uniformly_hard_problems():
    assert Spread.assumed(0.5, 2) == Spread(between=pytest.approx(1 / 12), within=pytest.approx(1 / 6))


def test_the_spread_is_found_again_from_samples():
    drawn = draw_accuracies(np.random.default_rng(0), 1, 20_000, 8, 1, 1)[0]
    measured = Spread.measured(drawn, 8)
    assert measured.between == pytest.approx(1 / 12, rel=0.03)
    assert measured.within == pytest.approx(1 / 6, rel=0.03)


def test_969_problems_show_three_points():
    # Miller's example: ω² = 1/9 and no sampling noise; (1.96 + 0.84)² / 9 / 0.03² = 969 problems
    assert detectable_difference(math.sqrt(1 / 9), 969) == pytest.approx(0.03, abs=1e-4)


@pytest.mark.parametrize(("n", "k"), [(30, 64), (500, 4)])
def test_a_difference_of_the_detectable_size_is_seen_80_percent_of_the_time(n, k):
    rng = np.random.default_rng(k)
    spread = Spread.assumed(0.5, 2)
    deviation = spread.of_a_difference(k, correlation=1.0)  # equal difficulty for both, so only sampling noise is left
    size = detectable_difference(deviation, n)
    p = rng.beta(1, 1, (4000, n)) * (1 - size)  # room for the difference
    first, second = rng.binomial(k, p) / k, rng.binomial(k, p + size) / k
    seen = [e.low > 0 or e.high < 0 for e in map(difference, second - first)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.03)


def test_more_samples_do_not_help_against_the_number_of_problems():
    spread = Spread.assumed(0.5, 2)
    assert half_width(spread.of_a_score(1), 30) == pytest.approx(2.0452 * math.sqrt(1 / 4 / 30), rel=1e-4)
    assert half_width(spread.of_a_score(10_000), 30) == pytest.approx(2.0452 * math.sqrt(1 / 12 / 30), rel=1e-3)
