"""Answers that once got a wrong verdict, found by attacking the grader: edits of value it missed, and ways to write that it could not read."""

import time

import pytest

from reward_models.grading import grade

WRONG = [
    ("185 \\text{USD}", "1.85\\ \\text{USD}"), ("25 cm", "2.5 cm"), ("325\\text{ dollars}", "3.25\\text{ dollars}"), ("3(xy+1)", "3xy+1"), ("2x(y+4)", "2xy+4"),
    ("-ab+ac+bc", "-(ab+ac+bc)"), ("12 and 3", "1, 2 and 3"), ("x,y", "xy"), ("2ab", "2AB"), ("31/2", "3 1/2"), ("12", "1 2"),
    ("\\sqrt{4 \\pi G \\rho_{0} r_{0}^{4}}", "\\sqrt{4 \\pi G \\rho_{0} r_{0}^{2}}"), ("x_1^5", "x_1^2"), ("x_8", "x_2^3"),
    ("-1", "-2\\frac{1}{2}"), ("-2\\frac12", "-1"), ("1", "$1-5051 / 2^{100}$"), ("1", "1-\\frac{1}{2^{50}}"), ("2", "2-\\frac{1}{2^{2004}}"),
    ("0", "$\\lfloor\\frac{2 n-1}{5}\\rfloor$"), ("mn", "$m n-\\lfloor m / 2\\rfloor$"), ("3-x", "|x-3|"), ("x", "\\min(x,5)"), ("x", "\\max(x,0)"), ("n", "n \\bmod 4"),
    ("\\lfloor 2n/3\\rfloor+1", "\\lceil 2n/3\\rceil"), ("x+1", "x+(-1)^b"), ("(-1)^m", "(-1)^n"),
    ("42 \\neq ? = 41", "41"), ("42 @ 1 = 41", "41"), ("0", "The mode is not $x=0$."), ("1", "No. Consider $x+y+z=2$ and $x+y+z=1$."),
    ("5 million dollars", "5"), ("3 dollars", "3 million dollars"), ("5 \\text{ dozen}", "5"), ("5 not", "5"), ("5 \\text{ does not exist}", "5"), ("5 squared", "5"),
    ("5 halves", "5"), ("5 less than x", "5"), ("440\\text{ cm}", "440\\text{ cm}^2"), ("36\\sqrt{7}cm^{5}", "$36\\sqrt{7}cm^{3}$"), ("5 radians", "5^\\circ"),
    ("6x=5", "5"), ("-x=5", "5"), ("x+1=5", "5"), ("1/x=5", "5"), ("8x", "y^2=8x"), ("4", "x^2y=4"),
    ("2^{100000}+1", "2^{100000}"), ("1+e^{-200}", "1"), ("12345678901.0", "12345678902"), ("9999999999.5", "9999999999"), ("3.0000000001", "3"),
    ("x \\equiv 3 \\pmod{11}", "x \\equiv 3 \\pmod{7}"), ("√10", "0"), ("2,1", "x=1, y=2"), ("x=2,y=1", "1,2"), ("n>3", "x>3"), ("\\mathbb{R}", "x>1, x<5"), ("[5,-\\infty)", "[5,\\infty)"),
    ("\\overline{BA}", "\\overline{AB}"), ("\\angle BAC", "\\angle ABC"), ("\\overrightarrow{AB}", "\\overrightarrow{BA}"),
    ("\\text{(C)} \\text{ or } 7", "\\text{(C)}"), ("(A)(B)(C)(D)(E)", "A"), ("(A) is wrong, so (B)", "A"), ("A is wrong", "A"),
    ("42", "52_8"), ("\\sin 30", "\\sin 30^\\circ"), ("f(x)", "f(x)=x"), ("0^{-0.5}", "0"), ("1234", "(1,234)"), ("\\pm1\\pm2", "3,-3"),
]  # fmt: skip

CORRECT = [
    ("(x_0)^2", "x_0^2"), ("r^2_0", "r_0^2"), ("-2\\frac12", "-\\frac52"), ("-2.5", "-2\\frac{1}{2}"), ("-62 1/10", "-\\frac{621}{10}"), ("3\\cdot 2\\frac12", "7.5"),
    ("\\$5 \\text{ million}", "5000000"), ("2 \\text{ dozen}", "24"), ("√10", "\\sqrt{10}"), ("2√15", "2\\sqrt{15}"), ("sqrt10", "\\sqrt{10}"), ("2\\sqrt 13", "2\\sqrt{13}"),
    ("x>1, x<5", "(1,5)"), ("4\\sqrt{2} \\approx 5.66", "4\\sqrt2"), ("\\frac{2}{3} \\approx 0.667", "\\frac{2}{3}"), ("\\pi \\approx 3.14", "\\pi"), ("x \\approx 3.14", "3.14"),
    ("\\textbf{(B)}\\ 5", "5"), ("(B) 5", "5"), ("\\text{Option B}", "B"), ("\\begin{pmatrix}1\\\\[4pt]2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\{x \\in \\mathbb{R} \\mid x \\geq 3\\}", "[3,\\infty)"), ("\\{x : x > \\frac34\\}", "(\\frac34,\\infty)"), ("x", "f(x)=x"), ("z", "$f(z)=z$"),
    ("\\text{Answer: } 5", "5"), ("5 \\text{(units)}", "5"), ("**5**", "5"), ("5\\\\", "5"), ("\\textcolor{red}{5}", "5"), ("€5", "5"),
    ("9.8\\,\\mathrm{m/s^2}", "9.8"), ("4.5 \\times 10^{33}\\,\\mathrm{erg\\,s^{-1}}", "4.5e33"), ("3.83 \\times 10^{35}\\ \\text{J}", "3.83e35"),
    ("2n+1, n \\in \\mathbb{Z}", "2n+1"), ("\\frac{1}{x}, x \\ne 0", "\\frac1x"), ("\\mathbb{R}", "all real numbers"), ("x \\ne 3", "(-\\infty,3)\\cup(3,\\infty)"),
    ("\\text{no solution}", "\\emptyset"), ("\\{\\}", "\\emptyset"), ("\\varnothing", "no solution"), ("x \\in \\{1,2\\}", "1,2"), ("1/2", "\\sin 30^\\circ"), ("90^\\circ", "\\frac{\\pi}{2}"),
    ("x(2)", "2x"), ("{5 \\choose 2}", "10"), ("{1 \\over 2}", "\\frac12"), ("\\lfloor \\pi \\rfloor", "3"), ("\\gcd(a,b)", "\\gcd(b,a)"), ("n!/(n-2)!", "n(n-1)"), ("(101)_2", "101_2"),
    ("-50\\%", "-50"), ("1, 2, \\ldots, 10", "1,2,\\dots,10"), ("\\text{Area} = 12", "12"), ("5 \\star 1 = 9(5)+2 = 47", "47"),
    ("25/13", "so $\\boxed{\\frac{25}{13}} = \\boxed{1\\frac{12}{13}}$"), ("x+11", "so $\\boxed{x+11}$ or $\\boxed{11+x}$"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), WRONG)
def test_what_an_attacker_changed_is_noticed(answer, reference):
    assert grade(f"\\boxed{{{answer}}}", reference).verdict == "wrong"


@pytest.mark.parametrize(("answer", "reference"), CORRECT)
def test_what_models_write_is_read(answer, reference):
    assert grade(f"\\boxed{{{answer}}}", reference).verdict == "correct"


@pytest.mark.parametrize(
    ("text", "reference", "accept", "verdict"),
    [
        ("Final Answer:\n- \\boxed{5}", "5", "boxed", "correct"),
        ("The final answer is $\\$10$. I hope it is correct.", "10", "marked", "correct"),
        ("$\\boxed{2}$ or $\\boxed{3}$", "2,3", "boxed", "correct"),
        ("\\boxed{2}, and \\boxed{3}", "2,3", "boxed", "correct"),
        ("\\boxed{5}\n\n\\boxed{}", "5", "boxed", "correct"),
        ("I will put it in \\boxed{ .\n\nSo \\boxed{7}", "7", "boxed", "correct"),
        ("The answer is $7$ rather than 5", "5", "marked", "wrong"),
        ("The answer is $7$ (and 5 is wrong)", "5", "marked", "wrong"),
        ("The answer is between 5 and 6", "5", "marked", "wrong"),
        ("The answer is at least 5", "5", "marked", "wrong"),
        ("The answer is $7$ for 3 people", "7", "marked", "correct"),
        ("#### Final Answer\nThe answer is 7.", "7", "marked", "correct"),
        ("**Final Answer**\n\n5", "5", "marked", "correct"),
        ("So we have the number 2^5", "5", "bare", "wrong"),
        ("So the total number is 2 - 5", "5", "bare", "wrong"),
        ("I get 3 or 7 or 5", "5", "bare", "wrong"),
        ("So the total number is 10:30", "30", "bare", "wrong"),
    ],
)
def test_whole_completions(text, reference, accept, verdict):
    assert grade(text, reference, accept=accept).verdict == verdict


@pytest.mark.parametrize(
    "answer",
    [
        "+".join(f"1/(3^{{30000}}+{i})" for i in range(60)),
        "1,000+" + "+".join(f"1/(3^{{30000}}+{i})" for i in range(60)),
        "+".join(f"4000!/({i}+3999!)" for i in range(60)),
        "lcm(" + ",".join(f"(3^{{30000}}+{i})" for i in range(90)) + ")",
        "\\begin{pmatrix}a&b\\\\c&d\\end{pmatrix}" * 40,
    ],
)
def test_arithmetic_made_to_be_slow_is_cut_short(answer):
    started = time.process_time()
    assert grade(f"\\boxed{{{answer}}}", "7").verdict == "wrong"
    assert time.process_time() - started < 1.0


def test_a_thousand_unclosed_tags_and_boxes_cost_nothing():
    for text in ("<answer>" * 25_000, "\\boxed{" * 30_000):
        started = time.process_time()
        grade(text, "7", accept="last_number")
        assert time.process_time() - started < 0.5
