"""Answers as trees. A recursive-descent parser over tokens; nothing is evaluated, nothing of the text is executed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from reward_models.grading.notation import Token, Unreadable, clean, tokenize, unstyle

MAX_DEPTH = 40
MAX_DIGITS = 1_200
"""Digits of one number."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node of an answer.

    op: number | constant | symbol | text | add | multiply | divide | power | negate | call | factorial | base | percent | degree | plusminus | money
        | tuple | set | list | matrix | relation | union | intersect | minus | ratio | opaque
    """

    op: str
    args: tuple[Node, ...] = ()
    name: str = ""
    """Of a symbol, constant, function; the delimiters of a tuple; the signs of a relation; the separator of a list."""
    value: Fraction | None = None
    digits: int = 0
    """Significant digits of a number written with a decimal point; 0 for integers, which are exact."""
    unit: str = ""


def number(text: str) -> Node:
    """A decimal, with a recurring part in `\\overline{}` if any, as an exact number."""
    if len(text) > MAX_DIGITS:
        raise Unreadable("too many digits")
    match = re.fullmatch(r"(\d*)\.?(\d*)\\overline\{(\d+)\}", text)
    if match:
        whole, fixed, repeated = match.groups()
        if "." not in text:
            raise Unreadable("overlined integer")
        scale = 10 ** len(fixed)
        value = (
            Fraction(int(whole or 0))
            + Fraction(int(fixed or 0), scale)
            + Fraction(int(repeated), scale * (10 ** len(repeated) - 1))
        )
        return Node("number", value=value)
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 400:
        raise Unreadable("exponent too large")
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    significant = mantissa.replace(".", "").lstrip("0")
    return Node("number", value=value, digits=max(1, len(significant)) if "." in mantissa else 0)


_OPENING = {"(": ")", "[": "]", "\\{": "\\}", "{": "}", "⌊": "⌋", "⌈": "⌉", "⟨": "⟩"}
_CALLED = frozenset("fghFGHPQ")


class Parser:
    """One answer, read once from left to right."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.position, self.depth, self.bars = tokens, 0, 0, 0

    # ---------------------------------------------------------------------------------------------------------------- tokens

    def peek(self, offset: int = 0) -> Token | None:
        index = self.position + offset
        return self.tokens[index] if index < len(self.tokens) else None

    def at(self, *texts: str, kind: str | None = None) -> bool:
        token = self.peek()
        return (
            token is not None
            and (token.text in texts or not texts)
            and (token.kind == kind if kind else token.kind not in ("word", "symbol"))
        )

    def take(self) -> Token:
        token = self.peek()
        if token is None:
            raise Unreadable("the expression ends too early")
        self.position += 1
        return token

    def expect(self, text: str) -> None:
        if not self.at(text):
            raise Unreadable(f"{text} expected")
        self.position += 1

    # ------------------------------------------------------------------------------------------------------------------ lists

    def answer(self) -> Node:
        node = self.listing()
        while self.at(".", "...") and self.position == len(self.tokens) - 1:
            self.position += 1
        if self.peek() is not None:
            raise Unreadable(f"{self.take().text} left over")
        return node

    def listing(self) -> Node:
        """Items separated by commas, semicolons, `and`, `or`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        items, separators = [self.relation()], set()
        while self.at(",", ";", "and", "or", "&"):
            separators.add(self.take().text)
            while self.at(",", "and", "or"):  # ", and"
                separators.add(self.take().text)
            if self.peek() is None or self.at(*_OPENING.values()):
                break
            items.append(self.relation())
        self.depth -= 1
        if len(items) == 1:
            return items[0]
        return Node("list", tuple(items), name="or" if "or" in separators else "and" if separators == {"and"} else ",")

    def relation(self) -> Node:
        sides, signs = [self.sets()], []
        while (token := self.peek()) is not None and token.kind == "relation":
            signs.append(self.take().text)
            sides.append(self.sets())
        if not signs:
            return sides[0]
        return Node("relation", tuple(sides), name=" ".join(signs))

    def sets(self) -> Node:
        node = self.ratio()
        while self.at("∪", "∩", "∖"):
            sign = self.take().text
            node = Node({"∪": "union", "∩": "intersect", "∖": "minus"}[sign], (node, self.ratio()))
        return node

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.at(":"):
            self.take()
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else Node("ratio", tuple(parts))

    # ------------------------------------------------------------------------------------------------------------- expressions

    def sum(self) -> Node:
        terms: list[Node] = []
        if self.at("±", "∓"):
            self.take()
            terms.append(Node("plusminus", (self.product(),)))
        else:
            terms.append(self.product())
        while self.at("+", "-", "±", "∓"):
            sign = self.take().text
            if sign == "+" and (self.peek() is None or self.at("...")):
                raise Unreadable("dangling +")
            term = self.product()
            terms.append({"+": term, "-": Node("negate", (term,))}.get(sign) or Node("plusminus", (term,), name=sign))
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def product(self) -> Node:
        node = self.signed()
        while True:
            token = self.peek()
            if token is None:
                break
            if self.at("*"):
                self.take()
                node = Node("multiply", (node, self.signed()))
            elif self.at("/"):
                self.take()
                node = Node("divide", (node, self.signed()))
            elif self.at("mod", "pmod"):
                name = self.take().text
                node = Node("call", (node, self.signed()), name=name)
            elif self.starts_atom(token):
                if token.kind == "number" and self.tokens[self.position - 1].kind == "number":
                    raise Unreadable("two numbers side by side")
                node = Node("multiply", (node, self.power()))
            else:
                break
        while (unit := self.unit()) is not None:
            node = Node(node.op, node.args, node.name, node.value, node.digits, (node.unit + " " + unit).strip())
        return node

    def mixed_number(self, whole: Node) -> Node:
        """`3\\frac{1}{2}` and `3 1/2` are 3.5: an integer with a proper fraction of integers after it."""
        start = self.position
        if self.at("frac", kind="command"):
            fraction = self.atom()
            if _is_proper(fraction):
                return Node("add", (whole, fraction))
        elif self.at(kind="number") and (slash := self.peek(1)) is not None and slash.text == "/":
            numerator = number(self.take().text)
            self.take()
            if self.at(kind="number"):
                fraction = Node("divide", (numerator, number(self.take().text)))
                if _is_proper(fraction):
                    return Node("add", (whole, fraction))
        self.position = start
        return whole

    def starts_atom(self, token: Token) -> bool:
        if token.kind in ("number", "base", "symbol", "constant", "function"):
            return True
        if token.kind == "command":
            return token.text != "end"
        if token.kind == "operator":
            return token.text in ("(", "[", "{", "\\{", "⌊", "⌈", "$") or (token.text == "|" and not self.bars)
        return False

    def unit(self) -> str | None:
        """A word after a quantity with its power: `square feet`, `cm^2`, `miles/hour`."""
        if not self.at(kind="word"):
            if self.at("/") and (after := self.peek(1)) is not None and after.kind == "word":
                self.take()
                word = "/ " + self.take().text
                if self.at("^"):
                    self.take()
                    word += "^" + _flat(self.power_operand())
                return word
            return None
        word = self.take().text
        if self.at(".") and self.position < len(self.tokens):
            self.take()
        if self.at("^"):
            self.take()
            word += "^" + _flat(self.power_operand())
        return word

    def signed(self) -> Node:
        if self.at("-"):
            self.take()
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unreadable("nested too deeply")
            node = Node("negate", (self.signed(),))
            self.depth -= 1
            return node
        if self.at("+"):
            self.take()
            if self.at("+", "-"):
                raise Unreadable("two signs")
            return self.signed()
        return self.power()

    def power(self) -> Node:
        node = self.atom()
        if node.op == "number" and not node.digits:
            node = self.mixed_number(node)
        while True:
            if self.at("^"):
                self.take()
                if self.at("°", "{") and self._degree_ahead():
                    node = Node("degree", (node,))
                    continue
                node = Node("power", (node, self.power_operand()))
            elif self.at("!"):
                self.take()
                node = Node("factorial", (node,))
            elif self.at("%"):
                self.take()
                node = Node("percent", (node,))
            elif self.at("°"):
                self.take()
                node = Node("degree", (node,))
            elif self.at("'"):
                self.take()
                node = Node("call", (node,), name="prime")
            elif self.at("_"):
                self.take()
                base = node.args[0] if node.op == "power" else node  # r^2_0 is r_0^2
                named = _with_subscript(base, self.subscript())
                node = Node("power", (named, node.args[1])) if node.op == "power" else named
            else:
                return node

    def _degree_ahead(self) -> bool:
        if self.at("°"):
            self.take()
            return True
        inner, after = self.peek(1), self.peek(2)
        if inner is not None and inner.text == "°" and after is not None and after.text == "}":
            self.position += 3
            return True
        return False

    def power_operand(self) -> Node:
        """What stands after `^` or `_`: a group, a signed number, or one digit of a bare number in LaTeX's reading; `x^10` is read as people mean it."""
        if self.at("-"):
            self.take()
            return Node("negate", (self.power_operand(),))
        node = self.atom()
        if self.at("^"):
            self.take()
            node = Node("power", (node, self.power_operand()))
        return node

    def subscript(self) -> Node:
        """What stands after `_`: an expression, else its letters as a name (`\\max`, `\\text{red}`)."""
        start = self.position
        try:
            return Node("negate", (self.atom(),)) if self.at("-") and self.take() else self.atom()
        except Unreadable:
            self.position = start
        first, name = self.take(), ""
        while first.text == "{" and not self.at("}"):
            name += self.take().text
        if first.text == "{":
            self.take()
        return Node("symbol", name=name or first.text)

    def group(self) -> Node:
        """`{...}`, or the single token that LaTeX takes in its place: `\\frac34`."""
        if self.at("{"):
            return self.atom()
        token = self.peek()
        if token is not None and token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.position] = Token("number", token.text[1:], False)
            return number(token.text[0])
        return self.atom()

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        try:
            return self._atom()
        finally:
            self.depth -= 1

    def _atom(self) -> Node:
        token = self.take()
        match token.kind:
            case "number":
                return number(token.text)
            case "base":
                return Node("base", name=re.sub(r"[{}]", "", token.text))
            case "constant":
                return Node("constant", name=token.text)
            case "symbol":
                if self.at("(") and (token.text in _CALLED or self._one_atom_ahead()):
                    return Node("call", (self.bracket("(", self.take().text),), name=token.text)
                return Node("symbol", name=token.text)
            case "function":
                return self.function(token.text)
            case "command":
                return self.command(token.text)
            case "operator" if token.text == "$":
                return Node("money", (self.signed(),))
            case "operator" if token.text == "|":
                self.bars += 1
                inner = self.sum()
                self.expect("|")
                self.bars -= 1
                return Node("call", (inner,), name="abs")
            case "operator" if token.text in _OPENING:
                return self.bracket(token.text, token.text)
        raise Unreadable(f"{token.text} where a value belongs")

    def _one_atom_ahead(self) -> bool:
        """Whether `(t)` follows: `x(t)` is a function of t, `x(t + 1)` and `x(2)` more likely products."""
        inner, after = self.peek(1), self.peek(2)
        kinds = ("symbol",) if self.tokens[self.position - 1].text in "xyzabcdkmn" else ("symbol", "number")
        return inner is not None and inner.kind in kinds and after is not None and after.text == ")"

    def bracket(self, opening: str, _: str) -> Node:
        bars, self.bars = self.bars, 0
        if self.at(_OPENING[opening]):
            self.take()
            self.bars = bars
            if opening in ("\\{", "{"):
                return Node("set")
            raise Unreadable("empty brackets")
        inner = self.listing()
        token = self.take()
        self.bars = bars
        closing = token.text
        if opening in "([" and closing in ")]":
            if inner.op == "list":
                return Node("tuple", inner.args, name=opening + closing)
            if opening + closing not in ("()", "[]"):
                raise Unreadable("brackets do not match")
            return inner
        if closing != _OPENING[opening]:
            raise Unreadable("brackets do not match")
        match opening:
            case "\\{":
                return Node("set", inner.args if inner.op == "list" else (inner,))
            case "{":
                return Node("set", inner.args) if inner.op == "list" else inner
            case "⌊" | "⌈":
                return Node("call", (inner,), name="floor" if opening == "⌊" else "ceil")
            case _:
                return Node("tuple", inner.args if inner.op == "list" else (inner,), name="()")

    def function(self, name: str) -> Node:
        if not name:  # \operatorname{lcm}
            return self.atom()
        base: Node | None = None
        power: Node | None = None
        while self.at("^", "_"):
            if self.take().text == "^":
                power = self.power_operand()
            else:
                base = self.atom()
        if name in ("sqrt", "cbrt"):
            argument = self.atom()
        elif self.at("("):
            argument = self.bracket("(", self.take().text)
        elif self.at("{"):
            argument = self.atom()
        else:
            argument = self.function_argument()
        args = (
            argument.args if argument.op in ("list", "tuple") and name in ("max", "min", "gcd", "lcm") else (argument,)
        )
        inverse = (
            power is not None and power.op == "negate" and power.args[0].value == 1 and name in ("sin", "cos", "tan")
        )
        if inverse:
            return Node("call", args, name="arc" + name)
        node = Node(
            "call", (*args, base) if base is not None else args, name=name + ("_base" if base is not None else "")
        )
        return Node("power", (node, power)) if power is not None else node

    def function_argument(self) -> Node:
        """`\\sin 2x \\cos y` takes 2x: a product up to the next function or sign."""
        node = self.signed()
        while (token := self.peek()) is not None and (
            token.kind in ("number", "symbol", "constant")
            or (token.kind == "command" and token.text in ("frac", "sqrt"))
        ):
            node = Node("multiply", (node, self.power()))
        return node

    def command(self, name: str) -> Node:
        match name:
            case "frac":
                return Node("divide", (self.group(), self.group()))
            case "binom":
                return Node("call", (self.group(), self.group()), name="binom")
            case "sqrt" | "cbrt":
                if self.at("["):
                    self.take()
                    index = self.sum()
                    self.expect("]")
                    return Node("call", (self.atom(), index), name="root")
                return Node("call", (self.atom(),), name=name)
            case "begin":
                return self.matrix()
            case "sum" | "prod" | "int" | "lim":
                bounds: list[Node] = []
                while self.at("_", "^"):
                    self.take()
                    bounds.append(self.atom() if not self.at("{") else self.bracket("{", self.take().text))
                return Node("opaque", (*bounds, self.product()), name=name)
            case "overline" | "bar" | "vec" | "hat" | "widehat" | "tilde" | "overrightarrow" | "dot" | "ddot":
                return Node("call", (self.group(),), name="mark " + name)
            case "boxed" | "fbox":
                return self.group()
        raise Unreadable(f"command {name}")

    def matrix(self) -> Node:
        self.expect("{")
        name = ""
        while not self.at("}"):
            name += self.take().text
        self.take()
        if name == "array" and self.at("{"):
            while not self.at("}"):
                self.take()
            self.take()
        if name not in (
            "pmatrix",
            "bmatrix",
            "vmatrix",
            "matrix",
            "Bmatrix",
            "smallmatrix",
            "array",
            "cases",
            "aligned",
        ):
            raise Unreadable(f"environment {name}")
        rows: list[Node] = []
        cells: list[Node] = []
        while not self.at("end", kind="command"):
            cells.append(self.relation())
            if self.at("&"):
                self.take()
            elif self.at("\\\\"):
                self.take()
                rows.append(Node("list", tuple(cells)))
                cells = []
            elif not self.at("end", kind="command"):
                raise Unreadable("matrix cell")
        if cells:
            rows.append(Node("list", tuple(cells)))
        self.take()
        self.expect("{")
        while not self.at("}"):
            self.take()
        self.take()
        if not rows or len({len(row.args) for row in rows}) != 1:
            raise Unreadable("ragged matrix")
        return Node("matrix", tuple(rows), name="det" if name == "vmatrix" else "")


def _is_proper(fraction: Node) -> bool:
    if fraction.op != "divide":
        return False
    top, bottom = fraction.args
    whole = top.op == bottom.op == "number" and not top.digits and not bottom.digits
    return whole and top.value is not None and bottom.value is not None and 0 < top.value < bottom.value


def _with_subscript(node: Node, subscript: Node) -> Node:
    """`a_1` as a name; `(101)_2` as a number in a base."""
    literal = node.op == "number" and not node.digits and node.value is not None and node.value.denominator == 1
    if literal and subscript.op == "number" and subscript.value in range(2, 37):
        return Node("base", name=f"{node.value}_{subscript.value}")
    return Node("call", (node, subscript), name="subscript")


def _flat(node: Node) -> str:
    return str(node.value) if node.value is not None else node.name or node.op


_LABEL = re.compile(r"\s*\\text\w*\s*\{\s*(?:final\s+)?answer", re.IGNORECASE)
_LEAD_IN = re.compile(
    r"^\s*(?:(?:approximately|about|exactly|equals?|is|are|the|roughly|around|answer|value|values|of|therefore|so|thus|hence|and)\b\s*|\\approx|=|:)+",
    re.IGNORECASE,
)


def parse(text: str, *, grouped: bool = True) -> Node:
    """The tree of an answer.

    Args:
        text: LaTeX or plain.
        grouped: read `1,234` as one number, not as two.

    Raises:
        Unreadable: when it is not an expression.
    """
    text = clean(text)
    if not grouped:
        text = text.replace(",", ", ")
    return Parser(
        tokenize(
            _LEAD_IN.sub(
                "", unstyle(_LEAD_IN.sub("", text)).lstrip(' "') if _LABEL.match(text) else _LEAD_IN.sub("", text)
            )
        )
    ).answer()
