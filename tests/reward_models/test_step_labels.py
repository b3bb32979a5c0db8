"""Labels for steps from what becomes of completions, with completions whose fate is written down here."""

import pytest

from reward_models.step_labels import (
    SampledSolution,
    StepLabels,
    Tally,
    balanced,
    expected_completion_tokens,
    label_solutions,
)


def solution(num_steps, *, correct, finished=True):
    """Steps of 10 tokens, and 5 more tokens behind the last one where it does not finish."""
    ends = tuple(10 * (i + 1) for i in range(num_steps))
    return SampledSolution(ends=ends, num_tokens=ends[-1] + 5 * (not finished), finished=finished, correct=correct)


class Fate:
    """Right completions, of 4, after each step of each solution; None where the grader judges none."""

    def __init__(self, *right):
        self.right, self.asked = right, []

    def __call__(self, prefixes):
        self.asked.append(list(prefixes))
        found = [self.right[n][i] for n, i in prefixes]
        return [Tally(0, 0, 4) if r is None else Tally(r, 4 - r) for r in found]


def test_a_soft_label_is_the_share_of_right_completions_and_a_step_is_right_while_there_is_one():
    fate = Fate([4, 1, 0])
    found = label_solutions([solution(4, correct=False)], fate, estimate="soft")
    assert found == [StepLabels((True, True, False, False), (1.0, 0.25, 0.0, 0.0))]
    assert fate.asked == [[(0, 0), (0, 1), (0, 2)]]  # what becomes of the whole solution is known


def test_a_policy_that_finds_its_way_back_keeps_its_soft_labels_but_not_its_hard_ones():
    soft, hard = (
        label_solutions([solution(4, correct=False)], Fate([4, 0, 1]), estimate=estimate)[0]
        for estimate in ("soft", "hard")
    )
    assert soft == StepLabels((True, False, True, False), (1.0, 0.0, 0.25, 0.0))
    assert hard == StepLabels((True, False, False, False))


@pytest.mark.parametrize("estimate", ["hard", "binary_search"])
def test_a_right_solution_is_its_own_witness_and_costs_no_completion(estimate):
    fate = Fate([])
    assert label_solutions([solution(3, correct=True)], fate, estimate=estimate) == [StepLabels((True, True, True))]
    assert fate.asked == []


@pytest.mark.parametrize("first_wrong", range(8))
def test_halving_finds_every_first_wrong_step_of_eight_with_three_prefixes(first_wrong):
    fate = Fate([3] * first_wrong + [0] * (7 - first_wrong))
    found = label_solutions([solution(8, correct=False)], fate, estimate="binary_search")
    assert found[0].labels == tuple(i < first_wrong for i in range(8))
    assert found[0].values == ()
    assert [len(prefixes) for prefixes in fate.asked] == [1, 1, 1]


def test_halving_agrees_with_asking_everywhere_and_asks_about_all_solutions_in_one_call_a_round():
    fates = [[4, 4, 0, 0], [0, 0, 0, 0], [4, 3, 2, 1], [1, 0, 0, 0]]
    solutions = [solution(5, correct=False) for _ in fates]
    halving, everywhere = Fate(*fates), Fate(*fates)
    assert label_solutions(solutions, halving, estimate="binary_search") == label_solutions(
        solutions, everywhere, estimate="hard"
    )
    assert sum(map(len, halving.asked)) == 10  # of 16: 2 each, and a third where the error is in the first two steps
    assert halving.asked[0] == [(0, 2), (1, 2), (2, 2), (3, 2)]


def test_a_wrong_solution_that_says_more_after_its_last_step_may_have_no_wrong_step():
    unfinished = solution(2, correct=False, finished=False)
    for estimate in ("soft", "hard", "binary_search"):
        assert label_solutions([unfinished], Fate([4, 2]), estimate=estimate)[0].labels == (True, True)


def test_undecided_completions_are_left_out_of_the_estimate_and_never_wrong():
    assert Tally.of(["correct", "undecided", "wrong", "undecided"]) == Tally(1, 1, 2)
    assert Tally(1, 1, 2).value == 0.5
    assert Tally(0, 0, 4).value is None


@pytest.mark.parametrize("estimate", ["soft", "hard", "binary_search"])
def test_a_solution_with_a_prefix_nobody_could_judge_gets_no_labels_and_the_others_get_theirs(estimate):
    solutions = [solution(3, correct=False), solution(3, correct=False)]
    found = label_solutions(solutions, Fate([4, None], [0, None]), estimate=estimate)
    assert found[0] is None
    # halving asks the second step first, which nobody could judge either
    assert found[1] is None


def test_balancing_keeps_as_many_as_the_share_allows_in_their_order():
    rows = [True, True, False, True, True, False, True]
    assert balanced(rows, 0.5) == [0, 1, 2, 5]
    assert balanced(rows, 0.75) == list(range(7))  # 5 / 0.75 = 6.7 in all, of which 5 and 1.7
    assert balanced(rows, None) == list(range(7))
    assert balanced(rows, 0.0) == [2, 5]
    assert balanced(rows, 1.0) == [0, 1, 3, 4, 6]
    assert balanced([True, True], 0.5) == []


def test_the_expected_cost_is_what_the_solutions_had_left_after_each_prefix_that_is_asked():
    wrong, right = (
        solution(4, correct=False),
        solution(4, correct=True),
    )  # 30 + 20 + 10 tokens left after three prefixes
    assert expected_completion_tokens([wrong, right], estimate="soft", completions_per_prefix=8) == (6, 8 * 2 * 60)
    assert expected_completion_tokens([wrong, right], estimate="hard", completions_per_prefix=8) == (3, 8 * 60)
    # two of the three, of 20 tokens on average
    assert expected_completion_tokens([wrong, right], estimate="binary_search", completions_per_prefix=8) == (2, 8 * 40)


def test_steps_that_end_outside_the_solution_are_refused():
    for ends in ((), (5, 3), (5, 11)):
        with pytest.raises(ValueError, match="a solution of 10 tokens end at"):
            SampledSolution(ends=ends, num_tokens=10, finished=True, correct=True)
