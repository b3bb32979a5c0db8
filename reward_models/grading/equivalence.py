"""Whether two short answers say the same: exactly, as numbers or as normalised text. Nothing is evaluated."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 300
"""Characters of an answer; longer ones are compared as text only. Integers stay far below the cost of big-number arithmetic."""

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
_WRAPPERS = (re.compile(r"\\text\{([^{}]*)\}"), re.compile(r"\\(?:mathrm|mbox)\{([^{}]*)\}"))


def normalise(answer: str) -> str:
    """The answer without what carries no meaning: dollar signs, spaces, `\\text{}`, thousands separators, a final full stop."""
    for wrapper in _WRAPPERS:
        answer = wrapper.sub(r"\1", answer)
    for noise in ("\\$", "$", "\\!", "\\,", "\\ ", "\\left", "\\right", " ", "\n"):
        answer = answer.replace(noise, "")
    answer = answer.rstrip(".")
    return answer.replace(",", "") if _GROUPED.fullmatch(answer) else answer


def as_number(answer: str) -> Fraction | None:
    """A normalised answer as an exact number: integers, decimals, `a/b`, `\\frac{a}{b}`; None for anything else."""
    if len(answer) > MAX_LENGTH:
        return None
    if match := _FRACTION.fullmatch(answer):
        sign, numerator, denominator = match.groups()
        answer = f"{sign}{numerator}/{denominator}"
    numerator, slash, denominator = answer.partition("/")
    if not _NUMBER.fullmatch(numerator) or (slash and not _NUMBER.fullmatch(denominator)):
        return None
    divisor = Fraction(denominator) if slash else Fraction(1)
    return Fraction(numerator) / divisor if divisor else None


def equivalent(answer: str, reference: str) -> bool:
    """True when both are the same number, or the same text up to case."""
    answer, reference = normalise(answer), normalise(reference)
    number, reference_number = as_number(answer), as_number(reference)
    if number is not None and reference_number is not None:
        return number == reference_number
    return answer.casefold() == reference.casefold()
