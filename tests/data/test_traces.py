"""What becomes of a teacher's completions, one by one."""

import dataclasses

import pytest

from data.traces import Rules, Trace, choose_traces

GOOD = "<think>\n3 + 4 = 7\n</think>\n\\boxed{7}"


def trace(text=GOOD, *, problem="p", num_tokens=9, finish="stop", verdict="correct", score=None):
    return Trace(
        problem=problem, question=f"{problem}?", text=text, num_tokens=num_tokens, finish_reason=finish, verdict=verdict, score=score,
    )  # fmt: skip


def fates(*traces, **rules):
    return choose_traces(traces, Rules(**rules), seed=0)


@pytest.mark.parametrize(
    ("changes", "fate"),
    [
        ({}, "kept"),
        ({"verdict": "undecided"}, "undecided"),
        ({"verdict": "wrong"}, "wrong"),
        ({"finish": "length", "verdict": "wrong"}, "truncated"),
        ({"finish": "length", "verdict": "correct"}, "truncated"),
        ({"text": "\\boxed{7}"}, "malformed"),
        ({"text": "<think>\n7\n\\boxed{7}"}, "malformed"),
        ({"text": "<think>\n<think>7\n</think>\n\\boxed{7}"}, "malformed"),
        ({"text": "<think>\n7\n</think>\nThe answer is \\boxed{7}."}, "kept"),
        ({"text": "<think>\n</think>\n\\boxed{7}"}, "without thoughts"),
    ],
)
def test_a_completion_must_be_right_whole_and_well_formed(changes, fate):
    assert fates(trace(**changes)) == [fate]


def test_a_completion_without_thoughts_may_be_wanted():
    assert fates(trace("<think>\n</think>\n\\boxed{7}"), require_thoughts=False) == ["kept"]


def test_the_process_model_has_a_say_where_there_is_one():
    told = [trace(problem="a", score=0.9), trace(problem="b", score=0.4), trace(problem="c")]
    assert fates(*told, min_score=0.5) == ["kept", "low process score", "low process score"]
    assert fates(*told) == ["kept"] * 3


def test_equal_completions_of_a_problem_count_once_and_of_two_problems_twice():
    assert sorted(fates(trace(), trace(), max_per_problem=9)) == ["exact duplicate", "kept"]
    assert fates(trace(problem="a"), trace(problem="b")) == ["kept", "kept"]


def test_similar_completions_of_a_problem_are_near_duplicates_and_the_shorter_one_stays():
    words = " ".join(f"word{i}" for i in range(200))
    long, short = (f"<think>\n{words}{end}\n</think>\n\\boxed{{7}}" for end in (" and so", ""))
    other = "<think>\nAnother way altogether: seven is three and four\n</think>\n\\boxed{7}"
    told = [trace(long, num_tokens=30), trace(short, num_tokens=20), trace(other, num_tokens=25)]
    assert fates(*told, max_per_problem=9) == ["near duplicate", "kept", "kept"]
    assert fates(*told, max_per_problem=9, near_threshold=None) == ["kept"] * 3
    apart = [dataclasses.replace(told[0], problem="a"), told[1]]
    assert fates(*apart) == ["kept", "kept"]


def test_a_problem_gives_so_many_and_the_shortest_first():
    told = [trace(f"<think>\nway {n}\n</think>\n\\boxed{{7}}", num_tokens=n) for n in (30, 10, 20)]
    later = "beyond max_per_problem"
    assert fates(*told, max_per_problem=1, near_threshold=None) == [later, "kept", later]
    assert fates(*told, max_per_problem=2, near_threshold=None) == [later, "kept", "kept"]
    drawn = {tuple(choose_traces(told, Rules(prefer="random", near_threshold=None), seed=s)) for s in range(20)}
    assert len(drawn) == 3


def test_a_duplicate_does_not_take_the_place_of_another_trace():
    told = [trace(num_tokens=5), trace(num_tokens=5), trace("<think>\nseven\n</think>\n\\boxed{7}", num_tokens=9)]
    assert sorted(fates(*told, max_per_problem=2)) == ["exact duplicate", "kept", "kept"]
