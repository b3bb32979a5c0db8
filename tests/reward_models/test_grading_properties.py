"""Ways to write an answer that must not change the verdict, and changes of value that must."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from reward_models.grading import grade

integers = st.integers(-(10**12), 10**12)
small = st.integers(-999, 999)
positive = st.integers(1, 999)
letters = st.sampled_from("xyzabkn")


def same(answer, reference):
    return grade(f"thus \\boxed{{{answer}}}", str(reference)).verdict == "correct"


def grouped(n):
    return f"{n:,}"


def latex_fraction(q):
    sign = "-" if q < 0 else ""
    return f"{sign}\\frac{{{abs(q.numerator)}}}{{{q.denominator}}}"


FORMS = [
    str,
    latex_fraction,
    lambda q: latex_fraction(q).replace("\\frac", "\\dfrac"),
    lambda q: f"{q.numerator * 6}/{q.denominator * 6}",
    lambda q: f"$ {q.numerator} / {q.denominator} $",
    lambda q: f"x = {q}",
    lambda q: f"\\text{{{q}}}",
    lambda q: f"{q} \\text{{ units}}",
    lambda q: f"\\left({q}\\right)",
    lambda q: f"{q.numerator}\\cdot\\frac1{{{q.denominator}}}",
]


@given(small, positive, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_however_a_fraction_is_written_it_is_the_same(numerator, denominator, form, other):
    q = Fraction(numerator, denominator)
    assert same(form(q), other(q))


@given(small, positive, small, positive, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_two_fractions_are_the_same_only_when_they_are_equal(a, b, c, d, form, other):
    assert same(form(Fraction(a, b)), other(Fraction(c, d))) == (Fraction(a, b) == Fraction(c, d))


@given(integers)
def test_thousands_separators_do_not_matter(n):
    for text in (
        grouped(n),
        grouped(n).replace(",", "{,}"),
        grouped(n).replace(",", "\\,"),
        grouped(n).replace(",", ",\\!"),
        f"\\${n}",
    ):
        assert same(text, n)
        assert same(n, text)


@given(integers, st.integers(1, 10**6))
def test_an_integer_off_by_anything_is_wrong(n, off):
    assert not same(n + off, n)
    assert not same(grouped(n + off), grouped(n))


@given(small, st.integers(1, 4))
def test_a_decimal_is_its_fraction(n, places):
    q = Fraction(n, 10**places)
    assert same(f"{float(q):.{places}f}", latex_fraction(q))
    assert not same(f"{float(q + Fraction(1, 10**places)):.{places}f}", latex_fraction(q))


@given(st.lists(small, min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_lists_and_sets_have_no_order_and_tuples_have(items, random):
    shuffled = items[:]
    random.shuffle(shuffled)
    listed, other = ", ".join(map(str, items)), ", ".join(map(str, shuffled))
    assert same(other, listed)
    assert same(f"\\{{{other}\\}}", listed)
    assert same(f"({other})", f"({listed})") == (items == shuffled)
    assert not same(", ".join(map(str, items[:-1])), listed)
    assert not same(f"{listed}, 1000", listed)


@given(small, small, st.sampled_from(["()", "[]", "(]", "[)"]), st.sampled_from(["()", "[]", "(]", "[)"]))
def test_the_ends_of_an_interval_belong_to_its_value(a, b, ends, other):
    written = f"{ends[0]}{a}, {b}{ends[1]}"
    assert same(written, f"\\left{other[0]} {a},\\, {b} \\right{other[1]}") == (ends == other)


@given(small, st.booleans())
def test_an_inequality_is_its_interval(a, closed):
    sign, end = ("\\ge", "[") if closed else (">", "(")
    assert same(f"x {sign} {a}", f"{end}{a}, \\infty)")
    assert same(f"{a} {'<=' if closed else '<'} x", f"{end}{a}, \\infty)")
    assert not same(f"x {sign} {a + 1}", f"{end}{a}, \\infty)")
    assert not same(f"x {'>' if closed else chr(92) + 'ge'} {a}", f"{end}{a}, \\infty)")


@given(st.lists(small, min_size=3, max_size=3), letters, st.permutations(range(3)))
def test_a_polynomial_is_the_same_in_any_order_of_its_terms(coefficients, x, order):
    terms = [f"({c}){x}^{k}" for k, c in enumerate(coefficients)]
    assert same("+".join(terms[i] for i in order), "+".join(terms))
    changed = [f"({c + (k == 1)}){x}^{k}" for k, c in enumerate(coefficients)]
    assert not same("+".join(changed), "+".join(terms))


@given(small, small, letters)
def test_a_product_is_its_expansion(a, b, x):
    expanded = f"{x}^2 + ({a + b}){x} + ({a * b})"
    assert same(f"({x}+({a}))({x}+({b}))", expanded)
    assert not same(f"({x}+({a}))({x}+({b + 1}))", expanded)


@given(st.integers(2, 200), positive)
def test_a_root_is_the_root_however_it_is_reduced(n, factor):
    assert same(f"{factor}\\sqrt{{{n}}}", f"\\sqrt{{{n * factor * factor}}}")
    assert same(f"{factor}*sqrt({n})", f"{factor}\\cdot {n}^{{1/2}}")
    assert not same(f"{factor}\\sqrt{{{n}}}", f"\\sqrt{{{n * factor * factor + 1}}}")


@given(small, small)
def test_a_complex_number_is_not_its_conjugate(a, b):
    assert same(f"{b}i + {a}", f"{a} + ({b})i")
    assert same(f"{a} - {b}i", f"{a} + {b}i") == (b == 0)


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9))
def test_a_number_in_a_base_is_its_digits_and_its_base(n, base, other):
    def digits(radix):
        out, rest = "", n
        while rest:
            out, rest = str(rest % radix) + out, rest // radix
        return out or "0"

    assert same(f"{digits(base)}_{{{base}}}", f"{digits(base)}_{base}")
    assert same(f"{digits(base)}_{base}", str(n))
    assert same(f"{digits(base)}_{other}", f"{digits(base)}_{base}") == (base == other)


@given(small, small)
def test_equality_is_symmetric(a, b):
    for form in ("{}", "({}, 1)", "\\frac{{{}}}{{7}}", "{}\\pi", "\\sqrt{{{}}}+1", "x > {}"):
        assert same(form.format(a), form.format(b)) == same(form.format(b), form.format(a)) == (a == b)


@settings(max_examples=300)
@given(st.text(max_size=200), st.text(max_size=40))
def test_any_text_gets_a_verdict(completion, reference):
    for text in (completion, f"\\boxed{{{completion}}}"):
        judged = grade(text, reference, accept="last_number")
        assert not judged.reason.startswith("crashed")


@given(st.text(alphabet="0123456789+-*/^_(){}[]|,;:=<>!%.\\ xyzieπ√²°", max_size=80))
def test_any_formula_is_itself(formula):
    judged = grade(f"<answer>{formula}</answer>", f"{formula}")
    assert judged.verdict in ("correct", "undecided") or judged.extracted != formula.strip()
