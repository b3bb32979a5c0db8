"""A changed problem still has the answer it is given, or it is not made at all."""

import re
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

from data.benchmarks import read_problems
from data.perturbation import KINDS, calculate, changeable, perturb, read_story
from data.records import Problem
from data.stories import generate_stories, split_of, to_problem

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/test.jsonl"
HATS = Problem(
    id="hats",
    question="Ann buys 7 hats for $8 each and a scarf for $9. How much does she pay in total?",
    answer="65",
    solution="The hats cost 7*8=$<<7*8=56>>56.\nShe pays 56+9=$<<56+9=65>>65.\n#### 65",
)


def stories(n=200):
    return [to_problem(s) for s in islice(generate_stories("test", seed=0, min_level=2, max_level=5), n)]


def only(problem, kind, seed=0):
    return [v.problem for v in perturb([problem], [kind], seed=seed)]


def swap(problem, **changes):
    return Problem(**{f: changes.get(f, getattr(problem, f)) for f in ("id", "question", "answer", "solution")})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7*8", 56),
        ("2+3*4", 14),
        ("(2+3)*4/8", "5/2"),
        ("1,200-.5", "2399/2"),
        ("20%*50", 10),
        ("-3+5", 2),
        ("6/4/3", "1/2"),
    ],
)
def test_arithmetic_is_exact_and_in_the_usual_order(text, value):
    assert calculate(text) == Fraction(value)


@pytest.mark.parametrize("text", ["x+1", "2**3", "__import__('os')", "1/0", "2+", "(1", "", "1e9", "9)("])
def test_what_is_not_plain_arithmetic_is_refused(text):
    with pytest.raises(ValueError):
        calculate(text)


@pytest.mark.parametrize("seed", range(20))
def test_other_numbers_of_an_annotated_problem_lead_to_the_answer_they_are_given(seed):
    (changed,) = only(HATS, "numbers", seed)
    hats, price, scarf = map(int, re.findall(r"\d+", changed.question))
    assert int(changed.answer) == hats * price + scarf != 65


def test_only_numbers_that_cannot_be_mistaken_for_another_are_changed():
    assert changeable(HATS) == [7, 8, 9]
    twice = swap(HATS, question=HATS.question.replace("a scarf", "7 scarves together"))
    assert changeable(twice) == [8, 9]  # 7 is told twice
    assert changeable(swap(HATS, question=HATS.question.replace("Ann", "For seven days Ann"))) == [8, 9]
    assert changeable(swap(HATS, question=HATS.question.replace("$9", "9%"))) == [7, 8]


@pytest.mark.parametrize(
    "solution",
    [
        "7*8=<<7*8=57>>57\n57+9=<<57+9=66>>66\n#### 65",  # wrong arithmetic
        "7*8=<<7*8=56>>56\n56+9=65\n#### 65",  # a step without a mark
        "7*8=<<7*8=56>>56\n#### 56",  # another answer than the reference
        "no marks\n#### 65",
        "x=<<x+1=65>>65",
    ],
)
def test_a_solution_that_does_not_reproduce_its_own_answer_changes_no_numbers(solution):
    assert only(swap(HATS, solution=solution), "numbers") == []


def test_a_result_that_equals_a_told_number_is_ambiguous_and_refused():
    # 56 is told and computed: which of the two the second step means is unknown
    problem = swap(HATS, question="Ann buys 7 hats for $8 each. She has 56 pens and finds 9. How much?")
    for changed in only(problem, "numbers"):
        assert "7 hats" in changed.question
        assert "$8" in changed.question


def test_other_numbers_of_a_story_are_told_and_answered_by_the_story_itself():
    variants = [v.problem for v in perturb(stories(), ["numbers"], seed=0)]
    assert len(variants) > 190
    for problem in variants:
        story = read_story(problem)
        assert story is not None
        assert story.answer == problem.answer
        assert split_of(story.key()) == "test"  # never a training problem


def test_a_reworded_story_is_the_same_plot():
    originals = stories(100)
    for original, variant in zip(originals, perturb(originals, ["reworded"], seed=0), strict=True):
        before, after = read_story(original), read_story(variant.problem)
        assert before is not None
        assert after is not None
        assert (before.key(), original.answer) == (after.key(), variant.problem.answer)
        assert original.question != variant.problem.question


def test_words_change_and_formulas_do_not():
    problem = Problem(
        id="m", question="Find the real number $x$ so that \\[Find^2 = many\\] holds in total.", answer="3"
    )
    (reworded,) = only(problem, "reworded")
    assert "Determine the real number $x$ so that \\[Find^2 = many\\] holds altogether." in reworded.question
    (typos,) = only(problem, "typos")
    assert "$x$" in typos.question
    assert "\\[Find^2 = many\\]" in typos.question


def test_a_distraction_stands_before_the_question_and_changes_nothing_else():
    (changed,) = only(HATS, "distraction")
    start, question = "Ann buys 7 hats for $8 each and a scarf for $9. ", "How much does she pay in total?"
    assert changed.question.startswith(start)
    assert changed.question.endswith(f" {question}")
    assert len(changed.question) > len(HATS.question) + 20


@pytest.mark.parametrize("seed", range(5))
def test_a_typo_swaps_letters_and_leaves_numbers_names_and_answers(seed):
    problem = Problem(
        id="t", question="Three friends meet Evelyn at 7. Who arrives before everybody else?", answer="everybody"
    )
    (changed,) = only(problem, "typos", seed)
    assert sorted(changed.question) == sorted(problem.question)
    assert changed.question != problem.question
    for word in ("Three", "Evelyn", "7", "everybody"):
        assert word in changed.question


def test_variants_are_a_function_of_the_seed_and_name_their_origin():
    first = perturb([HATS, *stories(5)], list(KINDS), seed=1)
    assert first == perturb([HATS, *stories(5)], list(KINDS), seed=1)
    assert first != perturb([HATS, *stories(5)], list(KINDS), seed=2)
    assert {(v.origin, v.problem.id) for v in first if v.kind == "typos"} >= {("hats", "hats~typos")}
    assert len({v.problem.id for v in first}) == len(first)


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs ../shared/data")
def test_more_than_half_of_real_gsm8k_problems_get_other_numbers_through_the_benchmark_reader():
    problems, _ = read_problems("gsm8k", path=str(GSM8K), revision=None)
    changed = perturb(problems, ["numbers"], seed=0)
    assert 700 < len(changed) < 900
    answers = {p.id: p.answer for p in problems}
    assert all(v.problem.answer != answers[v.origin] for v in changed)


def test_an_unknown_perturbation_names_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown perturbation 'sarcasm'; known: reworded, numbers, distraction, typos"
    ):
        perturb([HATS], ["sarcasm"], seed=0)
