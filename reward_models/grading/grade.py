"""The grader that training and evaluation share. A verdict with a reason, never an exception."""

from __future__ import annotations

import time
from dataclasses import dataclass

from reward_models.grading.equivalence import compare
from reward_models.grading.extraction import Accept, extract, reference_answer
from reward_models.grading.notation import Unreadable
from rlhf.types import Verdict

VERSION = "2"
"""Changes whenever a verdict may; stored beside every score."""
MAX_REFERENCE = 100_000


@dataclass(frozen=True, slots=True)
class Grade:
    """What the grader says of one completion."""

    verdict: Verdict
    reason: str
    """The rule that decided; for `undecided` one of timeout, memory, crashed, unreadable_reference."""
    extracted: str | None = None
    seconds: float = 0.0


def grade(completion: str | None, reference: str | None, *, accept: Accept = "boxed") -> Grade:
    """Compare the answer of a completion with the reference answer.

    A completion without an answer is wrong; a reference that holds nothing to compare with leaves it undecided. The work is
    bounded by construction; `GraderPool` adds a limit on time and memory for what construction missed.

    Args:
        completion: as the policy wrote it, an open `<think>` of the template included.
        reference: an answer, or a solution that boxes it.
        accept: how plainly the completion must say its answer.
    """
    started = time.perf_counter()
    verdict, reason, extracted = _decide(completion, reference, accept)
    return Grade(verdict, reason, extracted, time.perf_counter() - started)


def _decide(completion: str | None, reference: str | None, accept: Accept) -> tuple[Verdict, str, str | None]:
    if reference is None or not reference.strip():
        return "undecided", "unreadable_reference", None
    found = extract(completion or "", accept)
    if found.answer is None:
        return "wrong", found.rule, None
    try:
        outcome = compare(found.answer, reference_answer(reference[-MAX_REFERENCE:]))
    except Unreadable:
        return "undecided", "unreadable_reference", found.answer
    except RecursionError:
        return "wrong", "nested_too_deeply", found.answer
    except MemoryError:
        raise
    except Exception as error:  # a fault of the grader must cost one verdict, and say so
        return "undecided", f"crashed: {type(error).__name__}", found.answer
    return ("correct" if outcome.equal else "wrong"), outcome.rule, found.answer
