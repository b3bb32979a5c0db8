"""What an expression is worth: exactly where rational arithmetic reaches, else to a given number of digits.

Every operation has a bound on its cost, checked before it is done: powers, factorials and arguments that would need
astronomical numbers raise `Unreadable` instead of being computed. Symbols stand for fixed arbitrary rational numbers, and what
this module cannot compute (a sum to infinity, an unknown function) for a number drawn from a hash of its operands' values, so
that equal expressions have equal values and different ones almost surely have not (Schwartz 1980, Zippel 1979).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

from reward_models.grading.notation import Unreadable
from reward_models.grading.syntax import Node

MAX_BITS = 60_000
"""Of an exact integer."""
MAX_EXPONENT_BITS = 200
"""Of the binary exponent of an inexact number."""

MAX_STEPS = 20_000
"""Nodes evaluated for one value; trees may share parts."""
INTEGER_POINTS = range(4, 10)
WIDE_POINTS = range(10, 16)

Value = Any
"""A Fraction, or a number of an mpmath context."""

_contexts = threading.local()


def context(digits: int) -> MPContext:
    """This thread's mpmath context of that precision; contexts are not safe to share between threads."""
    cache: dict[int, MPContext] = _contexts.__dict__.setdefault("by_digits", {})
    if digits not in cache:
        cache[digits] = MPContext()
        cache[digits].dps = digits
    return cache[digits]


class Evaluator:
    """Evaluates trees at one point and precision.

    Args:
        digits: of inexact numbers.
        point: which assignment of numbers to symbols; 0 and 1 are positive, in 2 and 3 every symbol is
            negative once, then come integers of both parities, then numbers from -99 to 99.
    """

    def __init__(self, digits: int, point: int = 0) -> None:
        self.mp, self.digits, self.point = context(digits), digits, point
        self.steps = 0
        self.lost: list[int] = []
        """Decimal exponents of summands too small to be seen in their sum at this precision."""

    # --------------------------------------------------------------------------------------------------------------- values

    def symbol(self, name: str) -> Fraction:
        drawn = int.from_bytes(hashlib.sha256(f"{self.point}:{name}".encode()).digest()[:4], "big")
        if self.point in INTEGER_POINTS:
            return Fraction(drawn % 60 + 4)
        if self.point in WIDE_POINTS:
            return Fraction(drawn % 200_003 - 100_000, 1009)
        value = Fraction(drawn % 9973 + 2500, 4999)
        sign = hashlib.sha256(name.encode()).digest()[0] & 1
        return -value if self.point == 2 + sign else value

    def inexact(self, value: Value) -> Any:
        if isinstance(value, Fraction):
            return self.mp.mpf(value.numerator) / self.mp.mpf(value.denominator)
        return value

    def checked(self, value: Value) -> Value:
        """Bounded in size and finite.

        Raises:
            Unreadable: otherwise.
        """
        if isinstance(value, Fraction):
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
                raise Unreadable("number too large")
            return value
        for part in (value.real, value.imag):
            if not self.mp.isfinite(part) or abs(part.man_exp[1]).bit_length() > MAX_EXPONENT_BITS:
                raise Unreadable("not a finite number")
        return value

    def hashed(self, name: str, values: list[Value]) -> Fraction:
        """A number that depends on the operands' first 20 digits only."""
        parts = [name]
        for value in values:
            inexact = self.inexact(value)
            imaginary = inexact.imag if abs(inexact.imag) > 1e-25 else 0
            parts.append(f"{self.mp.nstr(inexact.real, 20)},{self.mp.nstr(imaginary, 20)}")
        drawn = int.from_bytes(hashlib.sha256("|".join(parts).encode()).digest()[:4], "big")
        return Fraction(drawn % 99_991 + 7, 49_999)

    # ----------------------------------------------------------------------------------------------------------- evaluation

    def __call__(self, node: Node) -> Value:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Unreadable("too many operations")
        return self.checked(self.evaluate(node))

    def evaluate(self, node: Node) -> Value:
        match node.op:
            case "number":
                return node.value
            case "constant":
                return self.constant(node.name)
            case "symbol":
                return self.symbol(node.name)
            case "add":
                return self.total([self(a) for a in node.args])
            case "negate":
                return -self(node.args[0])
            case "multiply":
                return self.times(self(node.args[0]), self(node.args[1]))
            case "divide" | "ratio" if len(node.args) == 2:
                return self.over(self(node.args[0]), self(node.args[1]))
            case "power":
                base = self(node.args[0])
                return base if base == 1 else self.power(base, self(node.args[1]))
            case "factorial":
                return self.factorial(self(node.args[0]))
            case "percent":
                return self.times(self(node.args[0]), Fraction(1, 100))
            case "degree" | "money":
                return self(node.args[0])  # inside a trigonometric function: see `angle`
            case "base":
                return self.in_base(node.name)
            case "call":
                return self.call(node)
            case "matrix" if node.name == "det":
                return self.determinant([[self(cell) for cell in row.args] for row in node.args])
            case "relation" | "opaque":
                return self.hashed(node.op + node.name, [self(a) for a in node.args])
        raise Unreadable(f"{node.op} has no value")

    def constant(self, name: str) -> Value:
        match name:
            case "pi":
                return +self.mp.pi
            case "e":
                return +self.mp.e
            case "i":
                return self.mp.mpc(0, 1)
        raise Unreadable(f"{name} is not a number")

    def total(self, values: list[Value]) -> Value:
        exact = Fraction(0)
        for value in values:
            if isinstance(value, Fraction):
                exact = self.checked(exact + value)
        rest = [v for v in values if not isinstance(v, Fraction)]
        if not rest:
            return exact
        result = self.inexact(exact)
        for value in rest:
            result = result + value
        for value in (self.inexact(exact), *rest):
            if value != 0 and abs(value) < abs(result) * self.mp.mpf(10) ** (5 - self.digits):
                self.lost.append(int(self.mp.log10(abs(value) / abs(result))))
        return result

    def times(self, a: Value, b: Value) -> Value:
        exact = isinstance(a, Fraction) and isinstance(b, Fraction)
        return self.checked(a * b) if exact else self.inexact(a) * self.inexact(b)

    def over(self, a: Value, b: Value) -> Value:
        if b == 0:
            raise Unreadable("division by zero")
        return a / b if isinstance(a, Fraction) and isinstance(b, Fraction) else self.inexact(a) / self.inexact(b)

    def power(self, base: Value, exponent: Value) -> Value:
        if base == 1:
            return Fraction(1)
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            n = exponent.numerator
            if base == 0:
                if n <= 0:
                    raise Unreadable("zero to the power of zero or less")
                return Fraction(0)
            if isinstance(base, Fraction):
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits * abs(n) <= MAX_BITS:
                    return base**n
        if base == 0:
            if self.inexact(exponent).real <= 0:
                raise Unreadable("zero to the power of zero or less")
            return Fraction(0)
        odd = isinstance(exponent, Fraction) and exponent.denominator % 2 == 1 and exponent.denominator > 1
        if (
            odd and (base if isinstance(base, Fraction) else base.real if base.imag == 0 else 1) < 0
        ):  # the real root, as people mean it
            magnitude = self.power(-base, exponent)
            return -magnitude if exponent.numerator % 2 else magnitude
        base, exponent = self.inexact(base), self.inexact(exponent)
        size = abs(self.mp.log(abs(base))) * abs(exponent) if abs(base) != 1 else abs(exponent)
        if size > 2**60 or abs(exponent) > 2**100:
            raise Unreadable("power too large")
        return self.mp.power(base, exponent)

    def factorial(self, value: Value) -> Value:
        if not isinstance(value, Fraction) or value < 0:
            return self.hashed("factorial", [value])
        if value.denominator == 1 and value.numerator <= 4_000:
            return Fraction(math.factorial(value.numerator))
        if value > 10**15:
            raise Unreadable("factorial too large")
        return self.mp.factorial(self.inexact(value))

    def in_base(self, text: str) -> Fraction:
        digits, _, base = text.partition("_")
        radix = int(base)
        if not 2 <= radix <= 36 or len(digits) > 200:
            raise Unreadable(f"base {radix}")
        try:
            return Fraction(int(digits, radix))
        except ValueError:
            raise Unreadable(f"{digits} has digits outside base {radix}") from None

    def determinant(self, rows: list[list[Value]]) -> Value:
        if len(rows) != len(rows[0]) or len(rows) > 4:
            raise Unreadable("determinant")
        if len(rows) == 1:
            return rows[0][0]
        minors = [[row[:c] + row[c + 1 :] for row in rows[1:]] for c in range(len(rows))]
        return self.total(
            [
                self.times(self.times(rows[0][c], Fraction((-1) ** c)), self.determinant(minors[c]))
                for c in range(len(rows))
            ]
        )

    def call(self, node: Node) -> Value:
        name = node.name
        values = [self(_in_radians(a) if name in _TRIGONOMETRIC else a) for a in node.args]
        if name in ("gcd", "lcm", "max", "min"):
            values.sort(key=lambda v: (self.inexact(v).real, self.inexact(v).imag))
        first = values[0]
        if name in _INTEGER_FUNCTIONS and all(isinstance(v, Fraction) for v in values):
            return Fraction(_INTEGER_FUNCTIONS[name](*values))
        if name in ("floor", "ceil") and not isinstance(first, Fraction):
            nearest = self.mp.nint(self.inexact(first).real)
            if self.inexact(first).imag != 0 or abs(self.inexact(first) - nearest) < self.mp.mpf(10) ** -20:
                raise Unreadable("too close to an integer")
            return Fraction(int(self.mp.floor(first) if name == "floor" else self.mp.ceil(first)))
        match name:
            case "sqrt" | "cbrt" | "root":
                index = values[1] if name == "root" else Fraction(2 if name == "sqrt" else 3)
                return self.root(first, index)
            case "binom":
                n, k = values
                if (
                    isinstance(n, Fraction)
                    and isinstance(k, Fraction)
                    and n.denominator == k.denominator == 1
                    and 0 <= k <= n <= 4_000
                ):
                    return Fraction(math.comb(n.numerator, k.numerator))
                if any(abs(self.inexact(v)) > 10**15 for v in values):
                    raise Unreadable("binomial too large")
                return self.mp.binomial(self.inexact(n), self.inexact(k))
            case "abs":
                return abs(first)
            case "max" | "min" if all(self.inexact(v).imag == 0 for v in values):
                return (max if name == "max" else min)(values, key=lambda v: self.inexact(v).real)
            case "log_base":
                return self.over(self.logarithm(first), self.logarithm(values[1]))
            case "log":
                return (
                    self.hashed("log", [first])
                    if first == 0
                    else self.over(self.logarithm(first), self.logarithm(Fraction(10)))
                )
            case "ln" | "lg":
                return (
                    self.logarithm(first)
                    if name == "ln"
                    else self.over(self.logarithm(first), self.logarithm(Fraction(10)))
                )
            case "exp":
                return self.power(self.constant("e"), first)
        function = _FUNCTIONS.get(name)
        if function is None:
            return self.hashed(name, values)
        argument = self.inexact(first)
        if abs(argument) > 10**40:
            raise Unreadable(f"argument of {name} too large")
        try:
            return function(self.mp, argument)
        except (ValueError, ZeroDivisionError, ArithmeticError):
            raise Unreadable(f"{name} is not defined there") from None

    def root(self, value: Value, index: Value) -> Value:
        if not isinstance(index, Fraction) or index == 0:
            return self.power(value, self.over(Fraction(1), index))
        if isinstance(value, Fraction) and index == 2 and value >= 0:
            top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
            if top * top == value.numerator and bottom * bottom == value.denominator:
                return Fraction(top, bottom)
        return self.power(value, Fraction(1) / index)

    def logarithm(self, value: Value) -> Value:
        if value == 0:
            raise Unreadable("logarithm of zero")
        return self.mp.log(self.inexact(value))


def _in_radians(node: Node) -> Node:
    """`30^\\circ` as an argument of sin is 30 pi / 180."""
    if node.op == "degree":
        return Node(
            "multiply",
            (node.args[0], Node("divide", (Node("constant", name="pi"), Node("number", value=Fraction(180))))),
        )
    return Node(node.op, tuple(_in_radians(a) for a in node.args), node.name, node.value, node.digits, node.unit)


def _floor(value: Fraction) -> int:
    return math.floor(value)


def _ceil(value: Fraction) -> int:
    return math.ceil(value)


def _mod(a: Fraction, b: Fraction) -> Fraction:
    if b == 0:
        raise Unreadable("modulo zero")
    return a % b


def _gcd(*values: Fraction) -> int:
    return math.gcd(*(_whole(v) for v in values))


def _lcm(*values: Fraction) -> int:
    result = 1
    for value in values:
        result = math.lcm(result, _whole(value))
        if result.bit_length() > MAX_BITS:
            raise Unreadable("number too large")
    return result


def _whole(value: Fraction) -> int:
    if value.denominator != 1:
        raise Unreadable("an integer is needed")
    return value.numerator


_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_INTEGER_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floor": _floor,
    "ceil": _ceil,
    "mod": _mod,
    "gcd": _gcd,
    "lcm": _lcm,
}
_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sin": lambda mp, x: mp.sin(x), "cos": lambda mp, x: mp.cos(x), "tan": lambda mp, x: mp.tan(x), "cot": lambda mp, x: mp.cot(x), "sec": lambda mp, x: mp.sec(x),
    "csc": lambda mp, x: mp.csc(x), "arcsin": lambda mp, x: mp.asin(x), "arccos": lambda mp, x: mp.acos(x), "arctan": lambda mp, x: mp.atan(x),
    "arccot": lambda mp, x: mp.acot(x), "arcsec": lambda mp, x: mp.asec(x), "arccsc": lambda mp, x: mp.acsc(x), "sinh": lambda mp, x: mp.sinh(x),
    "cosh": lambda mp, x: mp.cosh(x), "tanh": lambda mp, x: mp.tanh(x), "coth": lambda mp, x: mp.coth(x), "Re": lambda mp, x: mp.re(x), "Im": lambda mp, x: mp.im(x),
    "arg": lambda mp, x: mp.arg(x),
}  # fmt: skip
KNOWN_FUNCTIONS = (
    frozenset(_FUNCTIONS)
    | frozenset(_INTEGER_FUNCTIONS)
    | {"sqrt", "cbrt", "root", "binom", "abs", "max", "min", "log", "log_base", "ln", "lg", "exp"}
)
"""Functions whose values this module computes."""
