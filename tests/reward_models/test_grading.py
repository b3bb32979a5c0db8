"""What counts as an answer, and which answers are the same."""

import itertools
import json
import time
from pathlib import Path

import pytest

from reward_models.grading import canonical, grade
from reward_models.grading.extraction import extract, reference_answer

SHARED = Path(__file__).parents[3] / "shared" / "data"


def verdict(answer, reference):
    return grade(f"so \\boxed{{{answer}}}.", reference).verdict


# ---------------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{7}", "7"),
        ("\\boxed{7} or \\boxed{8}", "7, 8"),
        ("\\boxed{2} and \\boxed{3}", "2, 3"),
        ("$\\boxed{2}, \\boxed{3}$", "2, 3"),
        ("\\boxed{42}, or else \\boxed{43}", "43"),
        ("\\boxed{9} " * 3000 + "\\boxed{42}", "42"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox{958}", "958"),
        ("$x = -\\boxed{256}$", "-256"),
        ("$8 - \\boxed{3}$", "3"),
        ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> I give up", None),
        ("<think>\\boxed{1} and still thinking", None),
        ("\\boxed{7", None),
        ("\\boxed{6} and then \\boxed{7", "6"),
        ("<answer>84</answer>", "84"),
        ("<answer>The result is \\boxed{84}</answer>", "84"),
        ("the answer is 7", None),
        ("3 + 4 = 7", None),
    ],
)
def test_by_default_only_a_closed_box_or_an_answer_tag_after_the_thoughts_is_an_answer(text, answer):
    assert extract(text).answer == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("...\n#### 1,250", "1,250"),
        ("Final Answer: The final answer is $72$. I hope it is correct.", "72"),
        ("The answer is 42 because geometry proves it", "42"),
        ("So the answer to this question is the coefficient of $x^2$ is 15.", "15"),
        ("The answer is: it takes 9 minutes to blink 459 times.", "9"),
        ("The answer is every 72 months, which is 6 years.", "6"),
        ("I am sure that the answer is neither 41 nor 42", None),
        ("I am sure that the answer is not 42", None),
        ("First compute 3 + 4 = 7 and then we still have to multiply by", None),
    ],
)
def test_a_marked_answer_counts_when_that_is_declared(text, answer):
    assert extract(text, "marked").answer == answer
    assert extract(text, "boxed").answer is None


def test_a_bare_answer_and_the_last_number_count_only_when_declared():
    assert extract("\\frac12", "marked").answer is None
    assert extract("\\frac12", "bare").answer == "\\frac12"
    assert extract("Thus $x <= 2$ is what we wanted.", "bare").answer == "x <= 2"
    cut = "We add 3 and 4, which makes 7\n\nand then\n\nwe still have to"
    assert extract(cut, "bare").answer is None
    assert extract(cut, "last_number").answer == "7"


def test_a_reference_may_be_a_solution_that_boxes_or_marks_its_answer():
    assert reference_answer("Adding both, $x = \\boxed{\\frac{1}{2}}$.") == "\\frac{1}{2}"
    assert reference_answer("$\\boxed{2}$, $\\boxed{3}$ and thus also $\\boxed{5}$") == "2, 3, 5"
    assert reference_answer("He sells 2 * 9 = <<2*9=18>>18 eggs every day\n#### 18") == "18"
    assert reference_answer("\\frac{1}{2}") == "\\frac{1}{2}"


# --------------------------------------------------------------------------------------------------------------- equivalence

SAME = [
    ("12", "12.0"), ("1,234", "1234"), ("1 234", "1234"), ("12 000", "12000"), ("$18", "18"), ("50,\\!625", "50625"), ("14{,}916", "14916"),
    ("\\frac{1}{2}", "0.5"), ("3/6", "1/2"), ("\\frac34", "3/4"), ("\\dfrac{3}4", "0.75"), ("918\\frac{1}{2}", "918.5"), ("1 1/2", "1.5"),
    ("0.\\overline{36}", "4/11"), ("1.5 \\times 10^3", "1500"), ("2**(1/4)", "\\sqrt{\\sqrt{2}}"), ("10\\cdot 2^{1/2}", "10\\sqrt2"),
    ("7pi", "7\\pi"), ("12π", "12\\pi"), ("sqrt(53)", "\\sqrt{53}"), ("45°", "45^\\circ"), ("45", "45^\\circ"), ("x²+1", "1+x^2"),
    ("25\\%", "0.25"), ("25", "25\\%"), ("28 percent", "28\\%"), ("\\$36", "36"), ("36 dollars", "\\$36"), ("5.4cents", "5.4 \\text{ cents}"),
    ("64", "64 \\text{ square feet}"), ("15", "15\\mbox{ cm}^2"), ("1000 meters", "1 km"), ("49 fourth-grade boys", "49"), ("12^{\\mathrm{th}} grade", "12"), ("7th", "7"), ("{a}", "\\text{A}"),
    ("x = 5", "5"), ("5", "x=5"), ("xy = 20", "20"), ("f(8) = 1", "1"), ("\\sqrt{4} = 2", "2"), ("\\frac{1}{\\sqrt6}", "$\\frac{NO}{BO}=\\frac{1}{\\sqrt{6}}$"),
    ("(x+1)^2", "x^2+2x+1"), ("\\frac{9a+11}{20}", "\\frac{11+9a}{20}"), ("5i + 3", "3+5i"), ("-\\tan(4\\pi/9)+4\\cos(\\pi/18)", "-\\sqrt{3}"),
    ("\\frac{6\\sqrt{1789-240\\sqrt{21}}+8\\sqrt{1236-240\\sqrt{21}}}{5}", "96-10\\sqrt{21}"), ("\\sin^2 x", "1-\\cos^2 x"), ("\\binom{5}{2}", "10"),
    ("\\log_2 8", "3"), ("5!", "120"), ("17 \\bmod 5", "2"), ("\\lfloor 3.7 \\rfloor", "3"), ("|{-3}|", "3"), ("2^{2025}", "2 \\cdot 2^{2024}"),
    ("-3, 24", "24,-3"), ("\\{7, 9\\}", "7,9"), ("6 \\text{ and } 8", "8, 6"), ("1 \\pm \\sqrt{2}", "1+\\sqrt2, 1-\\sqrt2"), ("(3/2,-13)", "\\left(\\frac{3}{2}, -13\\right)"),
    ("a_{37} = 19, a_3 = 2", "a_3 = 2, a_{37} = 19"), ("4, 5", "AB=4,CD=5"), ("\\{(1,2),(3,4)\\}", "(3,4),(1,2)"),
    ("[3, \\infty)", "x \\ge 3"), ("x>3", "(3,\\infty)"), ("-x > -1", "x < 1"), ("5 \\geq x", "x \\leq 5"), ("-2 \\le x \\le 7", "x \\in [-2,7]"),
    ("x < 1 \\text{ or } x > 2", "(-\\infty,1) \\cup (2,\\infty)"), ("(0, 36) \\setminus \\{9\\}", "(0,9) \\cup (9,36)"), ("\\{x | x > 2\\}", "(2,\\infty)"),
    ("\\begin{bmatrix}4&2\\\\-1&1\\end{bmatrix}", "\\begin{pmatrix} 4 & 2 \\\\ -1 & 1 \\end{pmatrix}"), ("\\begin{pmatrix}1/2\\\\2\\end{pmatrix}", "\\begin{pmatrix}0.5\\\\2\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}+\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}", "\\begin{pmatrix}2&2\\\\3&5\\end{pmatrix}"), ("\\begin{vmatrix}2&1\\\\1&2\\end{vmatrix}", "3"),
    ("2y = 2x + 2", "y = x + 1"), ("2516_8", "2516_{8}"), ("2514_8", "1356"), ("2:4", "1:2"),
    ("\\text{Evelyn}", "evelyn"), ("(E)", "\\text{(E)}"), ("E", "(E)"), ("(B) 42 apples", "B"), ("4:30 \\text{ p.m.}", "\\text{4:30 p.m.}"), ("east", "\\text{east}"),
    ("0.0833333333333333", "1/12"), ("918.4999999999999", "918.5"),
]  # fmt: skip

DIFFERENT = [
    ("120", "12"), ("1,2", "12"), ("12345678901234567891", "12345678901234567890"), ("5/0", "5"), ("", "5"), ("0.3333", "\\frac13"), ("0.785", "\\frac{\\pi}{4}"),
    ("1000001", "1000000"), ("0", "12 000"), ("1", "1,-2"), ("24", "24,-3"), ("3, 11, 33, 99", "3, 11, 33"), ("(4, 2)", "(2,4)"), ("(1,2)", "\\{1,2\\}"), ("(1,2)", "12"), ("[1,2]", "(1,2)"),
    ("(0,1)", "[0,1)"), ("(3,\\infty)", "[3,\\infty)"), ("(-\\infty,0)", "(-\\infty,0]"), ("[0,100]", "42"), ("42 \\pm 1", "42"), ("2021", "\\pm 2021"), ("42=41", "42"), ("1=42", "42"),
    ("52_9", "52_8"), ("8_{10}", "8_9"), ("9\\pi", "10\\pi"), ("90", "90\\pi"), ("4\\sqrt3", "4\\sqrt2"), ("3-5i", "3+5i"), ("\\frac{1}{2006!}", "\\frac{1}{2004!}"), ("2^{-98}", "2^{-99}"),
    ("1+\\frac{1}{\\mathrm{e}}", "1-\\frac{1}{\\mathrm{e}}"), ("3^{2025}", "2^{2025}"), ("x^3-1", "x^2-1"), ("x", "|x|"), ("1", "2x+z=1"), ("x < 5", "x > 5"), ("y = x + 2", "y = x + 1"),
    ("\\begin{pmatrix}1&2\\\\3\\end{pmatrix}", "1"), ("\\begin{pmatrix}3\\\\-11\\end{pmatrix}", "\\begin{pmatrix}2\\\\-11\\end{pmatrix}"), ("A", "B"), ("C^2+D", "D"), ("\\text{oddd}", "odd"), ("5 m", "5 cm"),
    ("\\text{the correct answer}", "42"), ("\\frac{}{}", "2"), ("nan", "1"), ("\\frac00", "0"), ("0.33", "34\\%"), ("2", "200"), ("0.02", "200\\%"), ("1:00", "12:00"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same_answer_written_differently_is_correct(answer, reference):
    assert verdict(answer, reference) == "correct"


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_another_answer_is_wrong(answer, reference):
    assert verdict(answer, reference) == "wrong"


def test_a_reference_that_holds_nothing_leaves_the_completion_undecided():
    for reference in ("", "  ", "$$", None):
        assert grade("\\boxed{5}", reference).verdict == "undecided"
        assert grade("\\boxed{5}", reference).reason == "unreadable_reference"


def test_votes_for_the_same_number_are_counted_together():
    assert canonical("0.5") == canonical("\\frac{1}{2}") == canonical(" 1/2 ") == "1/2"
    assert canonical("1,000") == "1000"
    assert canonical("Evelyn") == canonical("\\text{Evelyn}") or canonical("\\text{Evelyn}") == "Evelyn"
    assert canonical("x+1") != canonical("x+2")


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 30_000,
        "{" * 200_000,
        "\\" * 200_000,
        "\\frac" * 40_000,
        "the final answer is " * 20_000,
        "1 000 " * 30_000,
        " is the answer" * 20_000,
        "\\boxed{" + "9" * 100_000 + "}",
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{((((9!)!)!)!)!}",
        "\\boxed{\\binom{1000000}{500000}}",
        "\\boxed{\\sin(10^{10^{10}})}",
        "\\boxed{(2+\\sqrt3)^{1000000}}",
        "\\boxed{7^{-7^{7^{7^7}}}}",
        "\\boxed{" + "1," * 50_000 + "1}",
        "\\boxed{" + "\\sqrt{" * 300 + "2" + "}" * 301,
        "\\boxed{" + "|" * 400 + "y" + "|" * 400 + "}",
        "\\boxed{" + "-" * 1500 + "1}",
        "\\boxed{" + "2^" * 400 + "2}",
        "\\boxed{__import__('os').system('true')}",
        "\\boxed{4\x002}",
        "\\boxed{(55)_8.5}",
        "\\boxed{\ud800}",
    ],
)
def test_a_hostile_completion_is_judged_in_a_moment(text):
    for accept in ("boxed", "last_number"):
        started = time.process_time()
        assert grade(text, "7", accept=accept).verdict == "wrong"
        assert time.process_time() - started < 1.0


# ------------------------------------------------------------------------------------------------------------------ real data


def rows(path):
    text = (SHARED / path).read_text()
    return json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def references():
    yield "math", [r["solution"] for r in rows("math/test.jsonl")]
    yield "math train", [r["answer"] for r in rows("math/train_problem_answer.json") if (r["answer"] or "").strip()]
    yield "math500", [r["answer"] for r in rows("math/math500_test.jsonl")]
    yield (
        "aime",
        [str(r.get("answer", r.get("expected_answer"))) for f in ("24", "25") for r in rows(f"aime/aime{f}.jsonl")],
    )
    yield "amc", [str(r["answer"]) for r in rows("bench/amc23.jsonl")]
    yield "olympiadbench", [a for r in rows("bench/olympiadbench_oe_maths_en.jsonl") for a in r["final_answer"]]
    yield "minerva", [r["solution"] for r in rows("bench/minerva_math.jsonl")]


@pytest.mark.skipif(not (SHARED / "math").is_dir(), reason="needs ../shared/data")
def test_every_reference_of_every_benchmark_is_correct_against_itself():
    for name, answers in references():
        for reference in answers:
            judged = grade(f"so \\boxed{{{reference_answer(reference)}}}.", reference)
            assert judged.verdict == "correct", f"{name}: {reference_answer(reference)!r} is {judged}"


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="needs ../shared/data")
def test_published_gsm8k_verdicts_of_four_models_are_reproduced_to_the_last():
    for row in rows("gsm8k/example_model_solutions.jsonl"):
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            judged = grade(row[model]["solution"], row["ground_truth"], accept="marked")
            assert (judged.verdict == "correct") == row[model]["is_correct"], row[model]["solution"]


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="needs ../shared/data")
def test_every_gsm8k_reference_is_wrong_for_its_neighbour():
    answers = [r["answer"].split("####")[1].strip() for r in rows("gsm8k/test.jsonl")]
    for answer, other in itertools.pairwise(answers):
        same = float(answer.replace(",", "")) == float(other.replace(",", ""))
        assert (verdict(other, answer) == "correct") == same


@pytest.mark.skipif(not (SHARED / "grading_dev.jsonl").is_file(), reason="needs ../shared/data")
def test_agreement_with_labelled_cases_is_at_least_985_in_a_thousand_and_false_positives_one_in_400():
    cases = [r for r in rows("grading_dev.jsonl") if not r.get("ambiguous")]
    given = [grade(r["completion"], r["gold"], accept="bare").verdict == "correct" for r in cases]
    agreed = sum(g == r["expected"] for g, r in zip(given, cases, strict=True))
    false_positives = sum(g and not r["expected"] for g, r in zip(given, cases, strict=True))
    assert agreed / len(cases) >= 0.985
    assert false_positives / len(cases) <= 0.0025


@pytest.mark.skipif(not (SHARED / "hostile_cases.jsonl").is_file(), reason="needs ../shared/data")
def test_hostile_cases_are_judged_within_a_second_and_execute_nothing():
    for row in rows("hostile_cases.jsonl"):
        completion, reference = (
            row[k] if row[k] is not None else "".join(piece * n for piece, n in row[f"{k}_parts"])
            for k in ("completion", "gold")
        )
        started = time.process_time()  # a busy machine is no fault of the grader
        judged = grade(completion, reference, accept="bare")
        assert time.process_time() - started < 1.0, row["id"]
        assert row["expected"] is None or (judged.verdict == "correct") == row["expected"], row["id"]
    assert not list(Path("/tmp").glob("grader_injected_*"))  # noqa: S108 - where the cases would leave their mark
