"""Whether two answers say the same.

    1  the same text, once styling, spaces and dollar signs are gone          same_text
    2  the same rational number                                              same_number
    3  the same structure (tuple, set, interval, matrix, equation ...) of equal parts, where parts are equal when
       their values at fixed points agree exactly, or to 50 and to 80 digits     same_value

Nothing is simplified, so the cost is that of reading and evaluating, which notation, syntax and values bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from reward_models.grading.notation import Unreadable, clean, unstyle
from reward_models.grading.syntax import Node, parse
from reward_models.grading.values import INTEGER_POINTS, KNOWN_FUNCTIONS, WIDE_POINTS, Evaluator, Value

DIGITS = (50, 80)
POINTS = (0, 1)
SIGNED_POINTS = (2, 3)
"""Elsewhere unknowns count as positive, as in sqrt(x^2) = x."""
MAX_ITEMS = 60
"""Items of a set or list that is matched without order."""
FLOAT_DIGITS = 10
"""A decimal with this many significant digits may be an exact number as a computer wrote it."""

_CHOICE = re.compile(r"(?:[Oo]ption|[Cc]hoice)?\s*[(\[{]?\s*([A-Z])\s*[)\]}]?\s*[.:]?")
_CHOSEN = re.compile(
    r"(?:option|choice|answer:?)?\s*[(\[{]?\s*([A-Z])\s*(?:[)\]}][.:]?|[.:])\s*(?!.*(?:\(?\b[A-Z]\)|\b(?:not|or|wrong|incorrect|neither)\b))\S.*",
    re.DOTALL,
)
_NUMERIC = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_COUNTED = re.compile(r"\s*(\$?\d[\d,]*(?:\.\d+)?)\s+[a-z]{2,}[-a-z ]*\s[a-z]{2,}[-a-z ]*\.?\s*", re.IGNORECASE)
_COUNTS = frozenset(
    "not no less more below above squared cubed halves thirds than wrong or and million billion thousand hundred dozen times".split()
)
"""Words after a number that make it another number, or none."""
_CHAIN = re.compile(
    # a name in words, `Area = 12`; or an unknown operation whose result is then computed, `5 \\star 1 = 45 + 2 = 47`
    r"(?:(?:[A-Za-z\s{}().\"'_]|\\(?:text|mathrm|triangle|angle)\b)+(?<!not)(?<!neq)(?<!ne)=(?P<name>)|[^=<>≠]*(?<!\\ne)(?<![!<>])=(?=[^=]*=))(?P<rest>.*)",
    re.DOTALL,
)
_LABEL = re.compile(
    r"^\s*\$?\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?(?:\([A-E]\)|(?:option|choice)\s+[A-E]\b)[}:.\s\\]+(?=[\d$(-]|\\[a-z])",
    re.IGNORECASE,
)
_SYNONYMS = {
    "dne": "doesnotexist",
    "nosolutions": "nosolution",
    "noanswer": "nosolution",
    "noneoftheabove": "none",
    "emptyset": "nosolution",
    "varnothing": "nosolution",
    "norealsolution": "nosolution",
    "norealsolutions": "nosolution",
    "allreals": "allrealnumbers",
    "therealnumbers": "allrealnumbers",
    "thesetofrealnumbers": "allrealnumbers",
    "yes": "true",
    "no": "false",
}


@dataclass(frozen=True, slots=True)
class Equivalence:
    """The outcome and the rule that decided it."""

    equal: bool
    rule: str


def plain(text: str) -> str:
    """Text without what carries no meaning, for comparing words and identical formulas."""
    text = unstyle(clean(text)).replace('"', "")
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|:|\s|q?quad|\(|\)|\[|\])", " ", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:[lc]dots|dots[bc]?)(?![a-z])", "...", text).replace("$", " ")
    # A space between two letters or digits keeps them apart: 3 1/2 is not 31/2.
    text = re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", text)
    return text.rstrip(".,;").removesuffix("\\")


def words(text: str) -> str:
    """Lower-case letters and digits of an answer in words."""
    lowered = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[^\w:+/.,-]", "", plain(text).replace("\\", "").casefold())
    return _SYNONYMS.get(lowered, lowered)


def canonical(answer: str) -> str:
    """One spelling for answers that are plainly the same, for counting votes: a number as a fraction, words in lower case."""
    try:
        node = normal(parse(answer))
        if node.op in ("number", "negate", "divide", "percent", "add") and isinstance(
            value := Evaluator(DIGITS[0])(node), Fraction
        ):
            return str(value)
    except Unreadable:
        return words(answer) if re.search(r"[A-Za-z]{2}", answer) and "\\" not in answer else plain(answer)
    return plain(answer)


def compare(answer: str, reference: str) -> Equivalence:
    """Decide whether an answer is the reference.

    Raises:
        Unreadable: when the reference holds nothing to compare with.
    """
    mine, theirs = plain(answer), plain(reference)
    if not theirs:
        raise Unreadable("the reference is empty")
    if mine == theirs:
        return Equivalence(True, "same_text")
    if not mine:
        return Equivalence(False, "empty_answer")
    if _NUMERIC.fullmatch(mine) and _NUMERIC.fullmatch(theirs) and len(mine) < 1_000 > len(theirs):
        one, other = Fraction(mine.replace(",", "")), Fraction(theirs.replace(",", ""))
        if one == other:
            return Equivalence(True, "same_number")
        if "," not in mine + theirs and "." not in mine + theirs:
            return Equivalence(False, "different_number")
    if (choice := _CHOICE.fullmatch(theirs)) is not None:
        chosen = _CHOICE.fullmatch(mine) or _CHOSEN.fullmatch(unstyle(clean(answer)).replace('"', "").strip(" $"))
        if chosen is not None:
            return Equivalence(chosen.group(1) == choice.group(1), "choice")
        if mine.strip("{}").upper() == choice.group(1):
            return Equivalence(True, "choice")
    readings = _readings(reference)
    if not readings or not _NOTHING.isdisjoint((words(theirs), words(mine))):
        lettered = re.search(r"[^\W\d_]", theirs) is not None
        if (lettered and words(mine) == words(theirs) != "") or (words(mine), words(theirs)) in (
            ("", "nosolution"),
            ("nosolution", ""),
        ):
            return Equivalence(True, "same_words")
        if words(theirs) == "allrealnumbers" and mine in ("R", "\\mathbb{R}", "(-\\infty,\\infty)"):
            return Equivalence(True, "same_words")
        if not readings:
            return Equivalence(False, "different_words")
    if words(mine) == "allrealnumbers":
        answer = "(-\\infty, \\infty)"
    unread = True
    for theirs_tree in readings:
        for mine_tree in _readings(_without_label(answer), is_answer=True):
            unread = False
            with suppress(Unreadable):
                if equivalent(mine_tree, theirs_tree):
                    return Equivalence(True, "same_value")
    return Equivalence(False, "unreadable_answer" if unread else "different_value")


_NOTHING = frozenset(("nosolution", "allrealnumbers"))


def _without_label(answer: str) -> str:
    """`(B) 42` as an answer to be compared by its value."""
    return _LABEL.sub("", answer, count=1)


def _readings(text: str, *, is_answer: bool = False) -> list[Node]:
    """Every way to read an answer: `1,234` is a number, or two of them.

    Args:
        text: LaTeX or plain.
        is_answer: whether the end of a chain that starts with something unreadable may stand for it. Never for a reference.
    """
    trees: list[Node] = []
    counted = _COUNTED.fullmatch(text)
    if counted is not None and _COUNTS.isdisjoint(text.casefold().split()):  # "49 fourth-grade boys"
        text = counted.group(1)
    ambiguous = re.search(r"\d,\d{3}", clean(text)) is not None
    bracketed = re.fullmatch(r"\s*\$?\s*(?:\\left)?\(.*\)\s*\$?\s*", text, re.DOTALL) is not None
    for grouped in ((False,) if bracketed else (True, False)) if ambiguous else (True,):
        with suppress(Unreadable):
            trees.append(normal(parse(text, grouped=grouped)))
    if not trees and is_answer and (chain := _CHAIN.fullmatch(clean(text))) is not None:
        with suppress(Unreadable):
            trees.append(normal(parse(chain.group("rest"))))
    return trees


# --------------------------------------------------------------------------------------------------------------- normal form


def normal(node: Node) -> Node:
    """Units, percent in words, and signs of ± settled; a single bracketed item is that item."""
    node = replace(node, args=tuple(normal(a) for a in node.args))
    unit = _unit(node.unit)
    if unit in ("percent", "pct"):
        return Node("percent", (replace(node, unit=""),))
    if node.op == "tuple" and len(node.args) == 1:
        return node.args[0]
    if node.op == "constant" and node.name == "emptyset":
        return Node("set")
    if not _NO_UNIT.isdisjoint(unit.split()):
        raise Unreadable(f"{unit} is no unit")
    for word, factor in _SCALES.items():
        if word in unit.split():
            unit = unit.replace(word, "").strip()
            scaled = Node("multiply", (replace(node, unit=""), Node("number", value=Fraction(factor))))
            return replace(scaled, unit=unit)
    return replace(node, unit=unit)


_SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NO_UNIT = frozenset(
    "not no less more below above squared cubed half halves halve third thirds quarter quarters than wrong does exist or never plus minus times if when unless but "
    "between least most".split()
)

_UNITS = {
    "cm": ("length", Fraction(1, 100)), "centimeter": ("length", Fraction(1, 100)), "mm": ("length", Fraction(1, 1000)), "m": ("length", Fraction(1)), "meter": ("length", Fraction(1)),
    "km": ("length", Fraction(1000)), "kilometer": ("length", Fraction(1000)), "inch": ("imperial", Fraction(1)), "in": ("imperial", Fraction(1)), "ft": ("imperial", Fraction(12)),
    "foot": ("imperial", Fraction(12)), "feet": ("imperial", Fraction(12)), "yard": ("imperial", Fraction(36)), "mile": ("imperial", Fraction(63360)),
    "second": ("time", Fraction(1)), "sec": ("time", Fraction(1)), "minute": ("time", Fraction(60)), "min": ("time", Fraction(60)), "hour": ("time", Fraction(3600)),
    "hr": ("time", Fraction(3600)), "day": ("time", Fraction(86400)), "week": ("time", Fraction(604800)), "cent": ("money", Fraction(1)), "dollar": ("money", Fraction(100)),
    "g": ("mass", Fraction(1)), "gram": ("mass", Fraction(1)), "kg": ("mass", Fraction(1000)), "kilogram": ("mass", Fraction(1000)), "mg": ("mass", Fraction(1, 1000)),
}  # fmt: skip


def _unit(text: str) -> str:
    """A unit in one spelling: singular, `square x` as `x^2`."""
    text = re.sub(
        r"\b(square|sq|cubic|cu)\s+([a-z]+)",
        lambda m: f"{m.group(2)}^{2 if m.group(1)[0] == 's' else 3}",
        text.casefold().strip(),
    )
    if text in ("", "units", "unit"):
        return ""
    singular = re.sub(r"inches\b", "inch", text)
    return re.sub(r"(?<=[a-z]{3})s\b", "", singular)


def _unit_scale(mine: str, theirs: str) -> Fraction | None:
    """By what to multiply a quantity in `mine` to have it in `theirs`; None when they measure different things."""
    if mine == theirs or not mine or not theirs or "unit" in mine or "unit" in theirs:
        return Fraction(1)
    (one, power), (other, other_power) = (
        (re.fullmatch(r"([a-z]*)(?:\^(-?\d+))?", u) and u.partition("^")[::2]) or (u, "") for u in (mine, theirs)
    )
    a, b = _UNITS.get(one), _UNITS.get(other)
    if one == other and a is not None and power != other_power:
        return None
    if {one, other} == {"radian", "degree"}:
        return None
    if a is None or b is None:
        return Fraction(1)  # words of unknown meaning: "5 different ways" is 5
    if a[0] != b[0] or power != other_power:
        return None
    return (a[1] / b[1]) ** int(power or 1)


# ---------------------------------------------------------------------------------------------------------------- structures


def equivalent(mine: Node, theirs: Node) -> bool:
    """Whether an answer's tree means what the reference's means.

    Raises:
        Unreadable: when a value that decides cannot be had.
    """
    if mine == theirs:
        return True
    mine, theirs = (
        _without_conditions(_side_of_approximation(mine)),
        _without_conditions(_side_of_approximation(theirs)),
    )
    mine, theirs = _spread(mine), _spread(theirs)
    if theirs.op == "list" and theirs.name != "±":
        theirs = _merged(theirs)  # a reference that names one value in two ways
    if mine.op == "relation" and mine.name == "in" and mine.args[1].op == "set" and not _is_region(theirs):
        return equivalent(mine.args[1], theirs)
    if _is_region(theirs) or _is_region(mine):
        return _same_region(mine, theirs)
    if theirs.op == "relation":
        return _relation(mine, theirs)
    if mine.op == "relation":
        return _value_of_relation(mine, theirs)
    if mine.op in ("list", "set", "tuple") or theirs.op in ("list", "set", "tuple"):
        return _collection(mine, theirs)
    if _is_matrix(mine) or _is_matrix(theirs):
        return _same_cells(matrix(mine), matrix(theirs))
    if mine.op == "ratio" and theirs.op == "ratio" and len(mine.args) != len(theirs.args):
        return False
    if mine.op == theirs.op == "ratio" and len(mine.args) > 2:
        return all(
            same_value(_quotient(a, mine.args[0]), _quotient(b, theirs.args[0]))
            for a, b in zip(mine.args, theirs.args, strict=True)
        )
    return same_scalar(mine, theirs)


def _spread(node: Node) -> Node:
    """`a ± b` as the list of both; a set or list with such items as one of more items."""
    if node.op in ("list", "set"):
        items: list[Node] = []
        for item in node.args:
            spread = _spread(item)
            items += spread.args if spread.name == "±" else [spread]
        return replace(node, args=tuple(items))
    if node.op == "relation" and node.name == "=" and node.args[1].op != "list":
        right = _spread(node.args[1])
        if right.name == "±":
            return Node(
                "list", tuple(Node("relation", (node.args[0], value), name="=") for value in right.args), name="±"
            )
    if not _has(node, "plusminus"):
        return node
    if _count_plusminus(node) > 1 and not _has_sign(node, "∓"):
        raise Unreadable("several ± in one expression")
    return Node("list", (_signed(node, 1), _signed(node, -1)), name="±")


def _side_of_approximation(node: Node) -> Node:
    """`4\\sqrt2 ≈ 5.66` is its exact side, `x ≈ 3.14` its value."""
    if node.op != "relation" or "≈" not in node.name.split():
        return node
    signs = node.name.split()
    first = signs.index("≈")
    exact, rest = node.args[: first + 1], node.args[first + 1]
    if len(exact) == 1:
        return rest if _is_name(exact[0]) else exact[0]
    return Node("relation", exact, name=" ".join(signs[:first]))


def _without_conditions(node: Node) -> Node:
    """`2n + 1, n in Z` is 2n + 1; `1/x, x != 0` is 1/x."""
    if node.op != "list":
        return node
    kept = tuple(a for a in node.args if not _is_condition(a))
    if not kept or len(kept) == len(node.args):
        return node
    return kept[0] if len(kept) == 1 else replace(node, args=kept)


def _is_condition(node: Node) -> bool:
    if node.op != "relation":
        return False
    return node.name == "!=" or (
        node.name == "in" and node.args[1].op == "symbol" and node.args[1].name in ("Z", "N", "R", "Q")
    )


def _merged(node: Node) -> Node:
    items: list[Node] = []
    for item in node.args[:MAX_ITEMS]:
        if item.op in ("relation", "tuple", "set") or not any(_safely(same_value, item, other) for other in items):
            items.append(item)
    return items[0] if len(items) == 1 else replace(node, args=(*items, *node.args[MAX_ITEMS:]))


def _has(node: Node, op: str) -> bool:
    return node.op == op or any(_has(a, op) for a in node.args)


def _count_plusminus(node: Node) -> int:
    return (node.op == "plusminus") + sum(_count_plusminus(a) for a in node.args)


def _has_sign(node: Node, sign: str) -> bool:
    return (node.op == "plusminus" and node.name == sign) or any(_has_sign(a, sign) for a in node.args)


def _signed(node: Node, sign: int) -> Node:
    args = tuple(_signed(a, sign) for a in node.args)
    if node.op != "plusminus":
        return replace(node, args=args)
    negative = (sign < 0) != (node.name == "∓")
    return Node("negate", args) if negative else args[0]


def _items(node: Node) -> tuple[Node, ...]:
    return node.args if node.op in ("list", "set", "tuple") else (node,)


def _collection(mine: Node, theirs: Node) -> bool:
    """Sets and bare lists without order, tuples in order; `(1,2)` is not `{1,2}`, and neither is `[1,2]`."""
    a, b = _items(mine), _items(theirs)
    if _is_matrix(mine) or _is_matrix(theirs):
        vector, other = (mine, theirs) if _is_matrix(mine) else (theirs, mine)
        return other.op == "tuple" and len(vector.args) == len(other.args) and all(len(row.args) == 1 for row in vector.args) and all(
            equivalent(row.args[0], item) for row, item in zip(vector.args, other.args, strict=True))  # fmt: skip
    a, b = _without_doubles(mine, a), _without_doubles(theirs, b)
    if len(a) != len(b) or len(a) > MAX_ITEMS:
        return False
    if mine.op == theirs.op == "tuple":
        return mine.name == theirs.name and _pairwise(a, b)
    if "tuple" in (mine.op, theirs.op):
        other, bracketed = (mine, theirs) if theirs.op == "tuple" else (theirs, mine)
        return bracketed.name == "()" and other.op == "list" and _pairwise(a, b)
    if all(x.op == "relation" for x in (*a, *b)):
        return _matched(a, b, equivalent)
    named, values = (a, b) if all(x.op == "relation" for x in a) else (b, a)
    if all(x.op == "relation" for x in named) and len({x.args[0] for x in named}) == len(named):  # x = 1, y = 2
        return _pairwise(*(tuple(_right_side(x) for x in side) for side in (a, b))) and not any(
            x.op == "relation" for x in values
        )
    a = tuple(_right_side(x) for x in a) if any(x.op != "relation" for x in b) else a
    b = tuple(_right_side(x) for x in b) if any(x.op != "relation" for x in a) else b
    return _matched(a, b, equivalent)


def _without_doubles(node: Node, items: tuple[Node, ...]) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(items)) if node.op == "set" else items


def _pairwise(a: Sequence[Node], b: Sequence[Node]) -> bool:
    return all(equivalent(x, y) for x, y in zip(a, b, strict=True))


def _matched(a: Sequence[Node], b: Sequence[Node], same: Callable[[Any, Any], bool]) -> bool:
    """Whether the items can be paired off; equality is an equivalence, so taking the first fit is enough."""
    left = list(b)
    for item in a:
        fit = next((i for i, other in enumerate(left) if _safely(same, item, other)), None)
        if fit is None:
            return False
        del left[fit]
    return not left


def _safely(same: Callable[[Any, Any], bool], one: Any, other: Any) -> bool:
    try:
        return same(one, other)
    except Unreadable:
        return False


# ------------------------------------------------------------------------------------------------------------------ matrices


def _is_matrix(node: Node) -> bool:
    return (node.op == "matrix" and not node.name) or (
        node.op in ("add", "negate", "multiply", "divide") and any(_is_matrix(a) for a in node.args)
    )


def matrix(node: Node) -> list[list[Node]]:
    """Cells of a matrix, or of a sum or multiple of matrices.

    Raises:
        Unreadable: for anything else.
    """
    match node.op:
        case "matrix" if not node.name:
            return [list(row.args) for row in node.args]
        case "negate":
            return [[Node("negate", (cell,)) for cell in row] for row in matrix(node.args[0])]
        case "multiply" | "divide" if _is_matrix(node.args[0]) != _is_matrix(node.args[1]):
            first = _is_matrix(node.args[0])
            cells, scalar = (matrix(node.args[0]), node.args[1]) if first else (matrix(node.args[1]), node.args[0])
            if node.op == "divide" and not first:
                raise Unreadable("division by a matrix")
            return [[Node(node.op, (cell, scalar)) for cell in row] for row in cells]
        case "multiply":
            a, b = matrix(node.args[0]), matrix(node.args[1])
            if len(a[0]) == len(b) and len(a) * len(b) * len(b[0]) <= 1_000:
                columns = list(zip(*b, strict=True))
                return [
                    [
                        Node("add", tuple(Node("multiply", pair) for pair in zip(row, column, strict=True)))
                        for column in columns
                    ]
                    for row in a
                ]
        case "add":
            parts = [matrix(a) for a in node.args]
            if len({(len(p), len(p[0])) for p in parts}) == 1:
                return [
                    [Node("add", tuple(p[r][c] for p in parts)) for c in range(len(parts[0][0]))]
                    for r in range(len(parts[0]))
                ]
    raise Unreadable("not a matrix")


def _same_cells(a: list[list[Node]], b: list[list[Node]]) -> bool:
    if [len(row) for row in a] != [len(row) for row in b] or len(a) * len(a[0]) > 100:
        return False
    return all(same_scalar(x, y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))


# ----------------------------------------------------------------------------------------------------------------- relations


def _right_side(node: Node) -> Node:
    """The value in `x = value`, `2 = x` or `f(3) = value`."""
    if node.op != "relation" or set(node.name.split()) != {"="}:
        return node
    left, right = node.args[0], node.args[-1]
    return left if _is_name(right) and not _is_name(left) and not _is_application(left) else right


def _is_name(node: Node) -> bool:
    return node.op == "symbol" or (node.op == "call" and node.name in ("subscript", "prime") and _is_name(node.args[0]))


def _is_application(node: Node) -> bool:
    """`f(x)`, `\\overline{AB}`: a call of something that has no value by itself."""
    return node.op == "call" and node.name not in KNOWN_FUNCTIONS


def _gives_value(node: Node, value: Node) -> bool:
    """Whether an equation says what something is (`f(8) = 1`, `xy = 20`) rather than that something holds (`6x = 5`, `y^2 = 8x`)."""
    for side in node.args:
        if (
            side is value
            or _is_name(side)
            or _is_application(side)
            or _is_constant(side)
            or side.op == "matrix"
            or side.op == "opaque"
        ):
            continue
        known_call = side.op == "call"
        if (
            not known_call
            and (len(_symbols(side)) < 2 or _symbols(side) & _symbols(value))
            and not _has(side, "opaque")
            and not _is_matrix(side)
        ):
            return False
    return True


def _names_value(node: Node) -> bool:
    """The same of a reference, more strictly: `2x + z = 1` and `x^2 y = 4` are equations, whose answer is not their right side."""
    value = _right_side(node)
    plain_sides = all(
        side is value or _is_name(side) or not (_has(side, "add") or _has(side, "power")) for side in node.args
    )
    return plain_sides and _gives_value(node, value)


def _value_of_relation(mine: Node, theirs: Node) -> bool:
    """An answer `x = 5` for the reference 5. A chain of constants must be true: `42 = 41` is no 41."""
    if mine.name == "in" and mine.args[1].op in ("set", "list"):
        return equivalent(mine.args[1], theirs)
    if set(mine.name.split()) != {"="}:
        return False
    value = _right_side(mine)
    if not _gives_value(mine, value):
        return False
    for side in mine.args:
        if side is not value and _is_constant(side) and _is_constant(value):
            with suppress(Unreadable):
                if not same_value(side, value):
                    return False
    return equivalent(value, theirs)


def _is_constant(node: Node) -> bool:
    """Whether a tree is a number that this package can compute."""
    unknown = node.op in ("opaque", "symbol", "matrix") or (node.op == "call" and node.name not in KNOWN_FUNCTIONS)
    return not unknown and all(_is_constant(a) for a in node.args)


def _relation(mine: Node, theirs: Node) -> bool:
    if mine.op != "relation":
        value = _right_side(theirs)
        return value is not theirs and _names_value(theirs) and len(theirs.args) == 2 and equivalent(mine, value)
    signs, other_signs = mine.name.split(), theirs.name.split()
    if set(signs) == set(other_signs) == {"="}:
        if len(signs) == len(other_signs) == 1:
            return _same_equation(mine, theirs)
        return (
            len(signs) != len(other_signs)
            and _names_value(theirs)
            and equivalent(_right_side(mine), _right_side(theirs))
        )
    if len(signs) != len(other_signs):
        return False
    flipped = [_FLIPPED.get(s, s) for s in reversed(signs)]
    return (signs == other_signs and _pairwise(mine.args, theirs.args)) or (flipped == other_signs and _pairwise(mine.args[::-1], theirs.args)) or (
        len(signs) == 1 and _same_inequality(mine, theirs))  # fmt: skip


def _difference(node: Node) -> Node:
    return Node("add", (node.args[0], Node("negate", (node.args[1],))))


def _factors(mine: Node, theirs: Node) -> list[Value]:
    """Quotients of the two sides' differences at each point."""
    quotients = []
    for point in POINTS:
        evaluate = Evaluator(DIGITS[0], point)
        a, b = evaluate(_difference(mine)), evaluate(_difference(theirs))
        if b == 0 or a == 0:
            raise Unreadable("an equation that holds everywhere")
        quotients.append(evaluate.over(a, b))
    return quotients


def _same_equation(mine: Node, theirs: Node) -> bool:
    """`l = r` and `l' = r'` are the same when l - r is a constant multiple of l' - r'."""
    if not _symbols(mine) and not _symbols(theirs):
        return _pairwise(mine.args, theirs.args) or _pairwise(mine.args[::-1], theirs.args)
    if _symbols(mine) != _symbols(theirs):
        return False
    quotients = _factors(mine, theirs)
    return all(_near(q, quotients[0]) for q in quotients)


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def _same_inequality(mine: Node, theirs: Node) -> bool:
    sign, other = mine.name, theirs.name
    if sign not in _FLIPPED or other not in _FLIPPED or _symbols(mine) != _symbols(theirs):
        return False
    quotients = _factors(mine, theirs)
    if not all(_near(q, quotients[0]) for q in quotients):
        return False
    positive = (quotients[0] if isinstance(quotients[0], Fraction) else quotients[0].real) > 0
    return (sign if positive else _FLIPPED[sign]) == other


def _near(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    evaluate = Evaluator(DIGITS[0])
    a, b = evaluate.inexact(a), evaluate.inexact(b)
    return bool(abs(a - b) < abs(b) * evaluate.mp.mpf(10) ** -30)


def _symbols(node: Node) -> frozenset[str]:
    own = frozenset((node.name,)) if node.op == "symbol" else frozenset()
    return own.union(*(_symbols(a) for a in node.args))


# ------------------------------------------------------------------------------------------------------------------- regions


Bound = tuple[Node | None, bool]
"""A boundary (None: infinitely far) and whether it belongs to the set."""


def _is_region(node: Node) -> bool:
    """Whether a tree can only be read as a set of reals: a union, half-open brackets, an inequality in one unknown."""
    if node.op in ("union", "intersect", "minus"):
        return True
    if node.op == "tuple":
        return len(node.args) == 2 and (node.name in ("[)", "(]") or any(_infinite(a) for a in node.args))
    if node.op == "symbol":
        return node.name == "R"
    if node.op == "relation":
        signs = set(node.name.split())
        if signs == {"in"}:
            return len(node.args) == 2 and node.args[1].op in ("tuple", "union", "minus", "symbol", "set")
        return (
            bool(signs)
            and signs <= set(_FLIPPED)
            and len(_symbols(node)) == 1
            and not _has(node, "opaque")
            and not _has(node, "call")
        )
    return (
        node.op == "list"
        and node.name in ("or", "and", ",")
        and len(node.args) > 1
        and all(a.op == "relation" and _is_region(a) for a in node.args)
        and len(_symbols(node)) == 1
    )


def _infinite(node: Node) -> bool:
    return (node.op == "constant" and node.name == "inf") or (node.op == "negate" and _infinite(node.args[0]))


def region(node: Node) -> list[tuple[Bound, Bound]]:
    """Disjoint intervals, as (lower, upper).

    Raises:
        Unreadable: when the tree is no set of reals that this reads.
    """
    match node.op:
        case "union":
            return _joined([part for a in node.args for part in region(a)])
        case "list" if (
            node.name == "," and len(node.args) == 2 and (both := _met(region(node.args[0]), region(node.args[1])))
        ):
            return both  # x > 1, x < 5; but x < 1, x > 5 is either
        case "list" if node.name in ("or", ","):
            return _joined([part for a in node.args for part in region(a)])
        case "list" if node.name == "and" and len(node.args) == 2:
            return _met(region(node.args[0]), region(node.args[1]))
        case "intersect":
            return _met(region(node.args[0]), region(node.args[1]))
        case "minus":
            return _met(region(node.args[0]), _complement(node.args[1]))
        case "symbol" if node.name == "R":
            return [((None, False), (None, False))]
        case "tuple" if len(node.args) == 2:
            first, last = node.args
            if (_infinite(first) and first.op != "negate") or (_infinite(last) and last.op == "negate"):
                raise Unreadable("the ends of the interval are the wrong way round")
            low, high = ((None if _infinite(a) else a) for a in node.args)
            return [((low, node.name[0] == "[" and low is not None), (high, node.name[1] == "]" and high is not None))]
        case "set":
            return [((a, True), (a, True)) for a in node.args]
        case "relation" if node.name == "in":
            return region(node.args[1])
        case "relation":
            return _solved(node)
    raise Unreadable("no set of reals")


def _complement(node: Node) -> list[tuple[Bound, Bound]]:
    parts = sorted(region(node), key=lambda p: _real(p[0][0]))
    low: Bound = (None, False)
    gaps: list[tuple[Bound, Bound]] = []
    for start, end in parts:
        gaps.append((low, (start[0], not start[1])))
        low = (end[0], not end[1])
    gaps.append((low, (None, False)))
    return gaps


def _solved(node: Node) -> list[tuple[Bound, Bound]]:
    """A chain of inequalities, each linear in the one unknown."""
    result: list[tuple[Bound, Bound]] = [((None, False), (None, False))]
    if len(_symbols(node)) != 1:
        raise Unreadable("not one unknown")
    for i, sign in enumerate(node.name.split()):
        difference = Node("add", (node.args[i], Node("negate", (node.args[i + 1],))))
        (name,) = _symbols(node)
        at = [same_point(difference, name, Fraction(x)) for x in (0, 1, 3)]
        slope = at[1] - at[0]
        if slope == 0 or not _near(at[2] - at[0], slope * 3):
            raise Unreadable("not linear")
        root = -at[0] / slope
        bound = (
            Node("number", value=root)
            if isinstance(root, Fraction)
            else Node("add", (Node("divide", (Node("negate", (_at(difference, name, 0),)), _slope(difference, name))),))
        )
        if sign == "!=":
            return [((None, False), (bound, False)), ((bound, False), (None, False))]
        above = (slope.real > 0) == (sign in (">", ">="))
        edge: Bound = (bound, sign in ("<=", ">="))
        result = _met(result, [(edge, (None, False))] if above else [((None, False), edge)])
    return result


def _at(node: Node, name: str, x: int) -> Node:
    if node.op == "symbol" and node.name == name:
        return Node("number", value=Fraction(x))
    return replace(node, args=tuple(_at(a, name, x) for a in node.args))


def _slope(node: Node, name: str) -> Node:
    return Node("add", (_at(node, name, 1), Node("negate", (_at(node, name, 0),))))


def same_point(node: Node, name: str, x: Fraction) -> Value:
    return Evaluator(DIGITS[0])(_at(node, name, x.numerator))


def _real(node: Node | None, infinite: int = -1) -> Any:
    if node is None:
        return Evaluator(30).mp.mpf("inf") * infinite
    value = Evaluator(30).inexact(Evaluator(30)(node))
    if abs(value.imag) > 1e-20:
        raise Unreadable("a boundary is not real")
    return value.real


def _met(a: list[tuple[Bound, Bound]], b: list[tuple[Bound, Bound]]) -> list[tuple[Bound, Bound]]:
    parts = []
    for low, high in a:
        for other_low, other_high in b:
            start = max((low, other_low), key=lambda e: (_real(e[0]), not e[1]))
            end = min((high, other_high), key=lambda e: (_real(e[0], 1), e[1]))
            x, y = _real(start[0]), _real(end[0], 1)
            if x < y or (x == y and start[1] and end[1]):
                parts.append((start, end))
    return parts


def _joined(parts: list[tuple[Bound, Bound]]) -> list[tuple[Bound, Bound]]:
    """In order, with intervals that touch made one."""
    if len(parts) > MAX_ITEMS:
        raise Unreadable("too many intervals")
    merged: list[tuple[Bound, Bound]] = []
    for low, high in sorted(parts, key=lambda p: (_real(p[0][0]), not p[0][1])):
        if merged:
            end = merged[-1][1]
            x, y = _real(end[0], 1), _real(low[0])
            if y < x or (y == x and (end[1] or low[1])):
                merged[-1] = (merged[-1][0], max((end, high), key=lambda e: (_real(e[0], 1), e[1])))
                continue
        merged.append((low, high))
    return merged


def _same_region(mine: Node, theirs: Node) -> bool:
    if (
        theirs.op == "relation"
        and theirs.name == "in"
        and mine.op == "relation"
        and mine.name != "in"
        and not _is_region(mine)
    ):
        return False
    if (
        mine.op == theirs.op == "relation"
        and _symbols(mine) != _symbols(theirs)
        and "R" not in _symbols(mine) | _symbols(theirs)
    ):
        return False
    a, b = _joined(region(mine)), _joined(region(theirs))
    return len(a) == len(b) and all(
        one[1] == other[1]
        and (one[0] is None) == (other[0] is None)
        and (one[0] is None or other[0] is None or same_value(one[0], other[0]))
        for part, counterpart in zip(a, b, strict=True)
        for one, other in zip(part, counterpart, strict=True)
    )


# -------------------------------------------------------------------------------------------------------------------- values


def _quotient(a: Node, b: Node) -> Node:
    return Node("divide", (a, b))


def same_scalar(mine: Node, theirs: Node) -> bool:
    """Quantities, units and percent included. `25 %` is 0.25 and, where one side has no sign, also 25."""
    scale = _unit_scale(_unit_of(mine), _unit_of(theirs))
    if scale is None:
        return False
    if scale != 1:
        mine = Node("multiply", (replace(mine, unit=""), Node("number", value=scale)))
    if theirs.op == "base" and (mine.op != "base" or mine.name.partition("_")[2] != theirs.name.partition("_")[2]):
        return False  # a problem that asks for a number in a base asks for that base
    if same_value(mine, theirs):
        return True
    if _has(mine, "percent") != _has(theirs, "percent") and {mine.op, theirs.op} & {"percent", "negate"}:
        return same_value(_without(mine, "percent"), _without(theirs, "percent"))
    if (mine.op == "degree") != (theirs.op == "degree") and (_has_pi(mine) or _has_pi(theirs)):
        in_radians = Node("divide", (Node("constant", name="pi"), Node("number", value=Fraction(180))))
        return same_value(
            *(Node("multiply", (n.args[0], in_radians)) if n.op == "degree" else n for n in (mine, theirs))
        )
    return False


def _without(node: Node, op: str) -> Node:
    return (
        node.args[0]
        if node.op == op
        else replace(node, args=tuple(_without(a, op) for a in node.args))
        if node.op == "negate"
        else node
    )


def _has_pi(node: Node) -> bool:
    return (node.op == "constant" and node.name == "pi") or any(_has_pi(a) for a in node.args)


def _unit_of(node: Node) -> str:
    return node.unit or {"money": "dollar", "degree": "degree"}.get(node.op, "")


def same_value(mine: Node, theirs: Node) -> bool:
    """Equal at every point, exactly or to both precisions.

    Raises:
        Unreadable: when one of them has no value.
    """
    symbols = bool(_symbols(mine) or _symbols(theirs))
    points = _points(mine, theirs) if symbols else POINTS[:1]
    for point in points:
        gaps: list[tuple[Any, Any]] = []
        lost: list[list[int]] = []
        for digits in DIGITS:
            evaluate = Evaluator(digits, point)
            lost.append(evaluate.lost)
            a, b = evaluate(mine), evaluate(theirs)
            if isinstance(a, Fraction) and isinstance(b, Fraction):
                if a != b and (symbols or not _float_near(mine, theirs, a, b)):
                    return False
                break
            a, b = evaluate.inexact(a), evaluate.inexact(b)
            gaps.append((abs(a - b), max(abs(a), abs(b))))
            if (
                digits == DIGITS[0]
                and gaps[0][0] > gaps[0][1] * evaluate.mp.mpf(10) ** -8
                and gaps[0][1] > evaluate.mp.mpf(10) ** -30
            ):
                return False
        else:
            (gap, _), (finer, size) = gaps
            if any(abs(coarse - fine) < 10 for coarse in lost[0] for fine in lost[1]):
                raise Unreadable("a summand is too small to be seen")  # e^{-200} in 1 + e^{-200}; rounding would shrink
            mp = Evaluator(DIGITS[1]).mp
            shrinks = finer == 0 or finer <= size * mp.mpf(10) ** -60 or finer <= gap * mp.mpf(10) ** -20
            if not shrinks and (symbols or not _decimal_near(mine, theirs, finer, size)):
                return False
    return True


_PIECEWISE = frozenset(("abs", "floor", "ceil", "mod", "min", "max", "gcd", "lcm", "sgn"))


def _points(mine: Node, theirs: Node) -> Sequence[int]:
    """Where to evaluate: two points tell smooth functions apart; functions in pieces need many, and those of integers integers."""
    both = (mine, theirs)
    if any(
        _any(n, lambda n: n.op == "factorial" or (n.op == "call" and n.name in ("binom", "gcd", "lcm"))) for n in both
    ):
        return INTEGER_POINTS
    if any(_any(n, lambda n: n.op == "power" and n.args[0].op == "negate" and bool(_symbols(n.args[1]))) for n in both):
        return (*INTEGER_POINTS, *POINTS)
    if any(_any(n, lambda n: n.op == "call" and n.name in _PIECEWISE) for n in both):
        return (*POINTS, *SIGNED_POINTS, *INTEGER_POINTS, *WIDE_POINTS)
    return POINTS


def _any(node: Node, test: Callable[[Node], bool]) -> bool:
    return test(node) or any(_any(a, test) for a in node.args)


def _decimals(node: Node) -> int:
    """Significant digits of an answer that is one decimal, possibly with a sign or a percent sign; else 0."""
    return _decimals(node.args[0]) if node.op in ("negate", "percent", "money") else node.digits


def _float_near(mine: Node, theirs: Node, a: Fraction, b: Fraction) -> bool:
    """Whether one side is the other as floating point wrote it: a long decimal, or a ratio of integers over a power of two."""
    size = max(abs(a), abs(b))
    if (slack := max(_slack(mine, a), _slack(theirs, b))) > 0:
        return abs(a - b) <= slack
    return any(_is_float_ratio(n) for n in (mine, theirs)) and abs(a - b) <= size * Fraction(1, 10**14)


def _slack(node: Node, value: Fraction) -> Fraction:
    """Absolute error of a long decimal: that of floating point from 15 digits on, half a unit of its last digit below."""
    digits = _decimals(node)
    if digits < FLOAT_DIGITS or value == 0:
        return Fraction(0)
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 1 - len(str(int(1 / abs(value))))
    if digits >= 15:
        return abs(value) * Fraction(1, 10**12)
    return Fraction(10) ** (magnitude - digits) * Fraction(51, 100)


def _is_float_ratio(node: Node) -> bool:
    node = node.args[0] if node.op == "negate" else node
    if node.op != "divide" or any(n.op != "number" for n in node.args):
        return False
    bottom = node.args[1].value or Fraction(1)
    return bottom >= 1 << 30 and bottom.denominator == 1 and bottom.numerator & (bottom.numerator - 1) == 0


def _decimal_near(mine: Node, theirs: Node, gap: Any, size: Any) -> bool:
    for node in (mine, theirs):
        if _decimals(node) >= FLOAT_DIGITS:
            slack = _slack(node, Evaluator(DIGITS[1])(node))
            return bool(gap * slack.denominator <= slack.numerator)
    return False
