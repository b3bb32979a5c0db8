"""The first wrong step, and the score of ProcessBench, with numbers worked out by hand."""

import numpy as np
import pytest

from reward_models.processbench import (
    benchmark_score,
    choose_threshold,
    first_error,
    first_wrong,
    harmonic_mean,
    require_both_kinds,
)


@pytest.mark.parametrize(
    ("probabilities", "threshold", "index"),
    [([0.9, 0.4, 0.2], 0.5, 1), ([0.9, 0.5], 0.5, -1), ([0.1], 0.5, 0), ([0.9, 0.4], 0.3, -1), ([0.9, 0.4], 1.0, 0)],
)
def test_the_first_step_below_the_threshold_is_called_wrong(probabilities, threshold, index):
    assert first_error(probabilities, threshold) == index


def test_the_truth_is_the_first_false_label():
    assert [first_wrong(labels) for labels in ([True, False, False], [True, True], [False])] == [1, -1, 0]


def test_f1_is_the_harmonic_mean_of_the_accuracies_on_erroneous_and_correct_solutions():
    # erroneous: 2 of 4 named exactly; correct: 3 of 4 left alone; 2 * 1/2 * 3/4 / (5/4) = 3/5
    score = benchmark_score([0, 2, 1, -1, -1, -1, -1, 3], [0, 2, 2, 1, -1, -1, -1, -1])
    assert (score.erroneous.mean, score.correct.mean) == (0.5, 0.75)
    assert score.f1.mean == pytest.approx(0.6)
    assert score.f1.low < 0.6 < score.f1.high
    assert (score.f1.n, score.erroneous.n, score.correct.n) == (8, 4, 4)


@pytest.mark.parametrize("predicted", [[-1] * 4, [0] * 4])
def test_a_model_that_calls_everything_or_nothing_wrong_has_no_f1(predicted):
    assert benchmark_score(predicted, [0, 0, -1, -1]).f1.mean == 0


def test_the_interval_of_f1_covers_what_a_model_is_worth_in_19_of_20_samples():
    generator = np.random.default_rng(0)
    erroneous, correct, covered = 0.7, 0.9, 0
    for _ in range(100):
        truth = [0] * 150 + [-1] * 150
        right = [*(generator.random(150) < erroneous), *(generator.random(150) < correct)]
        score = benchmark_score([t if ok else 5 for t, ok in zip(truth, right, strict=True)], truth)
        covered += score.f1.low <= harmonic_mean(erroneous, correct) <= score.f1.high
    assert 89 <= covered <= 100


def test_f1_needs_both_kinds_of_solutions():
    with pytest.raises(ValueError, match="steps.jsonl holds no correct solution among 2; F1 needs both kinds"):
        require_both_kinds([0, 1], "steps.jsonl")
    with pytest.raises(ValueError, match="no erroneous solution"):
        benchmark_score([-1], [-1])


def test_the_chosen_threshold_lies_in_the_middle_of_those_with_the_highest_f1():
    # below 0.2 nothing is wrong; between 0.2 and 0.8 all four are right; above 0.8 the second one's step 0 is called wrong
    probabilities, truth = [[0.9, 0.2], [0.8, 0.2, 0.1], [0.9, 0.95], [1.0, 0.9]], [1, 1, -1, -1]
    threshold = choose_threshold(probabilities, truth)
    assert threshold == pytest.approx(0.525, abs=0.03)  # not where most of the probabilities lie
    assert [first_error(p, threshold) for p in probabilities] == truth


def test_a_threshold_is_found_where_no_probability_is_near_one_half():
    probabilities = [[0.020, 0.011], [0.021, 0.019]]
    assert [first_error(p, choose_threshold(probabilities, [1, -1])) for p in probabilities] == [1, -1]
