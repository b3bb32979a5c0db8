"""Choosing among samples: expectations against counting every subset, and what follows from their definitions."""

from itertools import combinations

import pytest

from rlhf.evaluation import GradedProblem, majority_correct, pass_at_k
from rlhf.selection import (
    MOST_SUBSETS,
    best_of_n,
    choices,
    draw_selection,
    majority_of_n,
    ordered_pairs,
    selection_table,
    summarise_selection,
)

SCORES, CORRECT = [0.9, 0.5, 0.5, 0.1], [False, True, False, True]


def problem(id, correct, answers=None, variant="original", **scores):
    n = len(correct)
    return GradedProblem(
        id=id, level=1, answers=tuple(answers or ["7" if c else f"{i}" for i, c in enumerate(correct)]),
        verdicts=tuple("undecided" if c is None else "correct" if c else "wrong" for c in correct), lengths=(3,) * n,
        truncated=(False,) * n, texts=("",) * n, variant=variant, scores={k.replace("_", " "): v for k, v in scores.items()},
    )  # fmt: skip


def test_the_best_of_n_worked_by_hand_with_a_tie_between_the_second_and_third():
    # n = 1: any of four, two are right. n = 2: of 6 pairs 3 hold the wrong best; {2,3} is a coin, {2,4} right, {3,4} wrong.
    # n = 3: of 4 triples 3 hold the wrong best, the other one is a coin. n = 4: the wrong best.
    assert [best_of_n(SCORES, CORRECT, n) for n in (1, 2, 3, 4)] == [0.5, pytest.approx(1.5 / 6), 0.125, 0.0]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_best_of_n_equals_counting_all_subsets(n):
    scores, correct = [3.0, -1.0, 3.0, 0.0, 3.0, -1.0], [True, False, False, True, False, True]

    def of(subset):
        tied = [correct[i] for i in subset if scores[i] == max(scores[j] for j in subset)]
        return sum(tied) / len(tied)

    subsets = list(combinations(range(6), n))
    assert best_of_n(scores, correct, n) == pytest.approx(sum(map(of, subsets)) / len(subsets))


def test_a_scorer_that_knows_is_as_good_as_pass_at_n_and_one_that_knows_nothing_as_pass_at_1():
    for n in (1, 2, 4):
        assert best_of_n([float(c) for c in CORRECT], CORRECT, n) == pytest.approx(pass_at_k(4, 2, n))
        assert best_of_n([0.3] * 4, CORRECT, n) == pytest.approx(0.5)


def test_only_the_order_of_scores_matters_and_not_that_of_samples():
    assert best_of_n([s**3 - 7 for s in SCORES], CORRECT, 2) == best_of_n(SCORES, CORRECT, 2)
    assert best_of_n(SCORES[::-1], CORRECT[::-1], 2) == best_of_n(SCORES, CORRECT, 2)


def test_pairs_of_a_correct_and_a_wrong_sample_are_ordered_as_their_scores_and_a_tie_is_half():
    # right ones 0.5 and 0.1, wrong ones 0.9 and 0.5: one tie and three the wrong way round
    assert ordered_pairs(SCORES, CORRECT) == 0.5 / 4
    assert ordered_pairs([1.0, 0.0], [True, False]) == 1.0
    assert ordered_pairs([1.0, 0.0], [True, True]) is None


def test_a_vote_among_all_samples_is_the_vote_of_evaluation_and_a_vote_of_one_is_its_sample():
    answers, correct = ["7", "7", "8", None, "8"], [True, True, False, False, False]
    weights = [0.1, 0.2, 0.3, 0.9, 0.05]
    assert majority_of_n(answers, correct, 5) == majority_correct(answers, correct) == 0.5
    assert majority_of_n(answers, correct, 5, weights) == majority_correct(answers, correct, weights) == 0.0
    assert majority_of_n(answers, correct, 1) == pytest.approx(2 / 5)
    assert majority_of_n([None, None], [False, False], 2) == 0.0


@pytest.mark.parametrize("weights", [None, [0.6, 0.3, 0.3, 0.9, 0.1, 0.6]])
def test_a_vote_among_n_is_the_mean_over_all_subsets(weights):
    answers, correct = ["7", "8", "7", None, "9", "8"], [True, False, True, False, False, False]
    for n in (2, 3, 5):
        subsets = list(combinations(range(6), n))
        expected = [
            majority_correct([answers[i] for i in s], [correct[i] for i in s], weights and [weights[i] for i in s])
            for s in subsets
        ]
        assert majority_of_n(answers, correct, n, weights) == pytest.approx(sum(expected) / len(subsets))


def test_equal_weights_are_no_weights_and_a_weight_of_0_is_no_vote():
    answers, correct = ["7", "8", "8"], [True, False, False]
    assert majority_of_n(answers, correct, 2, [0.1] * 3) == majority_of_n(answers, correct, 2) == pytest.approx(1 / 3)
    assert majority_of_n(answers, correct, 3, [0.2, 0.0, 0.1]) == 1.0
    assert majority_of_n(answers, correct, 3, [0.0] * 3) == 0.0


def test_too_many_subsets_are_drawn_the_same_way_each_time_and_without_repeating_a_sample():
    drawn = choices(24, 8, seed=3)
    assert drawn.shape == (MOST_SUBSETS, 8)
    assert all(len(set(row)) == 8 for row in drawn.tolist())
    assert (drawn == choices(24, 8, seed=3)).all()
    assert (drawn != choices(24, 8, seed=4)).any()
    answers = ["7"] * 10 + ["8"] * 14
    correct = [a == "7" for a in answers]
    # hypergeometric: P(X > 4) + P(X = 4) / 2 for X of 8 from 10 right and 14 wrong ones
    assert majority_of_n(answers, correct, 8) == pytest.approx(0.29596, abs=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_n([1.0], [True], 2), "choosing among 2 samples of a problem needs as many and there are 1"),
        (lambda: best_of_n([1.0, float("nan")], [True, False], 1), "a score is nan"),
        (lambda: majority_of_n(["7"], [True], 1, [-0.5]), "must be 0 or more"),
        (lambda: majority_of_n(["7"], [True], 0), "among 0 samples"),
    ],
)
def test_what_cannot_be_chosen_from_is_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def selection():
    good = (0.9, 0.1, 0.2, 0.1)
    problems = [
        problem("a", [True, False, False, False], outcome_model=good),
        problem("b", [True, False, True, False], outcome_model=good),
        problem("c", [None, False, True, False], outcome_model=good),
        problem("d", [False] * 4, variant="typos", outcome_model=good),
    ]
    return summarise_selection(problems, ns=(1, 2, 4), seed=0)


def test_every_method_starts_at_pass_at_1_and_undecided_and_perturbed_problems_are_left_out(selection):
    assert set(selection["accuracy"]) == {
        "pass", "majority", "best by outcome model", "weighted by outcome model"
    }  # fmt: skip
    for by_n in selection["accuracy"].values():
        assert (by_n["1"]["mean"], by_n["1"]["n"]) == (pytest.approx((1 / 4 + 2 / 4) / 2), 2)


def test_methods_are_compared_on_the_same_problems_at_the_largest_n(selection):
    assert selection["accuracy"]["best by outcome model"]["4"]["mean"] == 1.0
    assert selection["accuracy"]["majority"]["4"]["mean"] == pytest.approx(
        (1 / 4 + 1) / 2
    )  # four answers tie in the first
    found = {(d["method"], d["than"]): d for d in selection["differences"]}
    best = found["best by outcome model", "majority"]
    assert (best["mean"], best["n"]) == (pytest.approx(3 / 8), 2)
    assert found["best by outcome model", "pass@1"]["mean"] == pytest.approx(1 - 3 / 8)


def test_the_order_of_samples_is_told_of_problems_that_have_both_kinds(selection):
    ordered = selection["ordered_pairs"]["outcome model"]
    assert (ordered["mean"], ordered["n"]) == (1.0, 2)


def test_the_table_and_the_picture_show_every_method(selection, tmp_path):
    table = selection_table("sft", selection)
    assert "best by outcome model" in table
    assert "best by outcome model - majority, n = 4: +0.375" in table
    draw_selection({"sft": selection, "a$b\x1b": selection}, tmp_path / "selection.png")
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
