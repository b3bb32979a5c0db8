import itertools
import json
import time
from pathlib import Path

import pytest

from reward_models.grading import grade
from reward_models.grading.extraction import extract_boxed

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{7}", "7"),
        ("\\boxed{7} or \\boxed{8}", "8"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> I give up", None),
        ("\\boxed{7", None),
        ("\\boxed{6} and then \\boxed{7", "6"),
        ("the answer is 7", None),
    ],
)
def test_the_answer_is_the_last_closed_box_after_the_thoughts(text, answer):
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("12", "12", "correct"),
        ("12.0", "12", "correct"),
        (" 1,234 ", "1234", "correct"),
        ("$18", "18", "correct"),
        ("\\frac{1}{2}", "0.5", "correct"),
        ("3/6", "1/2", "correct"),
        ("\\text{Evelyn}", "evelyn", "correct"),
        ("12345678901234567891", "12345678901234567890", "wrong"),
        ("120", "12", "wrong"),
        ("1,2", "12", "wrong"),
        ("5/0", "5", "wrong"),
        ("", "5", "wrong"),
        ("5", "  ", "undecided"),
    ],
)
def test_equal_values_are_correct_and_different_ones_wrong(answer, reference, verdict):
    assert grade(f"\\boxed{{{answer}}}", reference).verdict == verdict


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 30_000,
        "{" * 200_000,
        "\\boxed{" + "9" * 100_000 + "}",
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{" + "1," * 50_000 + "1}",
    ],
)
def test_a_hostile_completion_is_judged_in_a_moment(text):
    started = time.perf_counter()
    assert grade(text, "7").verdict == "wrong"
    assert time.perf_counter() - started < 1.0


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="needs ../shared/data/gsm8k")
def test_every_gsm8k_reference_is_correct_against_itself_and_wrong_against_its_neighbour():
    answers = [
        json.loads(line)["answer"].split("####")[1].strip()
        for line in (SHARED / "gsm8k/test.jsonl").read_text().splitlines()
    ]
    for answer, other in itertools.pairwise(answers):
        assert grade(f"so\n\\boxed{{{answer}}}", answer).verdict == "correct"
        if float(answer.replace(",", "")) != float(other.replace(",", "")):
            assert grade(f"\\boxed{{{other}}}", answer).verdict == "wrong"
