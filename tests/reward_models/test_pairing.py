"""Which completions become a pair, by hand."""

import random

import pytest

from reward_models.pairing import Candidate, best_worst, correct_wrong


def candidates(*told):
    """`right`, `wrong` or `undecided`, with a letter that tells texts apart and `cut` for one that was cut off; then a score."""
    found = []
    for text in told:
        verdict, letter, *rest = text.split()
        numbers = [float(x) for x in rest if x != "cut"]
        found.append(
            Candidate(
                text=letter,
                num_tokens=3,
                finish_reason="length" if "cut" in rest else "stop",
                verdict={"right": "correct"}.get(verdict, verdict),
                score=numbers[0] if numbers else None,
            )
        )
    return found


def pair(told, *, num_pairs=9, truncated="reject", seed=0):
    return correct_wrong(candidates(*told), num_pairs=num_pairs, truncated=truncated, rng=random.Random(seed))


def test_a_right_completion_stands_against_a_wrong_one_and_none_is_used_twice():
    found = pair(["right a", "wrong b", "right c", "wrong d", "wrong e"])
    assert len(found.pairs) == 2
    assert {chosen for chosen, _ in found.pairs} == {0, 2}
    assert len({rejected for _, rejected in found.pairs} & {1, 3, 4}) == 2
    assert len(pair(["right a", "wrong b", "right c", "wrong d"], num_pairs=1).pairs) == 1


def test_over_many_draws_every_combination_is_as_likely():
    drawn = [pair(["right a", "wrong b", "right c", "wrong d"], num_pairs=1, seed=seed).pairs[0] for seed in range(400)]
    counts = [drawn.count(p) for p in ((0, 1), (0, 3), (2, 1), (2, 3))]
    assert sum(counts) == 400
    assert all(70 < count < 130 for count in counts)  # 100 ± 3.5 standard deviations


def test_the_same_text_twice_is_one_candidate():
    assert len(pair(["right a", "right a", "wrong b", "wrong c"]).pairs) == 1


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (["right a", "right b"], "all correct"),
        (["wrong a", "wrong b"], "all wrong"),
        (["undecided a", "undecided b"], "all undecided"),
        (["right a", "undecided b"], "all correct"),
    ],
)
def test_a_problem_without_a_pair_says_why(told, reason):
    found = pair(told)
    assert (found.pairs, found.reason) == ((), reason)


def test_a_completion_that_was_cut_off_is_rejected_or_left_out_as_the_recipe_says_and_never_chosen():
    told = ["right a", "wrong b cut"]
    assert pair(told).pairs == ((0, 1),)
    assert pair(told, truncated="leave_out").reason == "all correct"
    assert pair(["wrong a cut", "undecided b"], truncated="leave_out").reason == "all truncated or undecided"
    highest_is_cut = candidates("wrong a 9 cut", "right b 2", "wrong c 1")
    assert best_worst(highest_is_cut, min_margin=0, truncated="reject").pairs == ((1, 2),)
    lowest_is_cut = candidates("right a 2", "wrong b 1", "wrong c -5 cut")
    assert best_worst(lowest_is_cut, min_margin=0, truncated="reject").pairs == ((0, 2),)
    assert best_worst(lowest_is_cut, min_margin=0, truncated="leave_out").pairs == ((0, 1),)
    assert best_worst(candidates("wrong a 1 cut", "wrong b 2 cut"), min_margin=0, truncated="reject").reason == (
        "all truncated"
    )


def test_the_best_stands_against_the_worst_when_they_are_far_enough_apart():
    told = candidates("right a 0.5", "right b 2", "undecided c", "wrong d -1", "right e 2")
    assert best_worst(told, min_margin=0, truncated="reject").pairs == ((1, 3),)
    assert best_worst(told, min_margin=3.0, truncated="reject").pairs == ((1, 3),)
    assert best_worst(told, min_margin=3.1, truncated="reject").reason == "below min_margin"
    assert best_worst(candidates("right a 1", "right b 1"), min_margin=0, truncated="reject").reason == (
        "all scored alike"
    )
    assert best_worst(candidates("undecided a", "undecided b"), min_margin=0, truncated="reject").reason == (
        "none scored"
    )
