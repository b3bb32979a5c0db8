"""The grader that training and evaluation share. A verdict with a reason, never an exception."""

from __future__ import annotations

from dataclasses import dataclass

from reward_models.grading.equivalence import equivalent, normalise
from reward_models.grading.extraction import extract_boxed
from rlhf.types import Verdict


@dataclass(frozen=True, slots=True)
class Grade:
    verdict: Verdict
    reason: str
    extracted: str | None = None


def grade(completion: str, reference: str) -> Grade:
    """Compare the boxed answer of a completion with the reference answer.

    A completion without a boxed answer is wrong; a reference that holds nothing to compare with leaves the completion undecided.
    """
    if not normalise(reference):
        return Grade("undecided", "unreadable_reference")
    extracted = extract_boxed(completion)
    if extracted is None:
        return Grade("wrong", "no_boxed_answer")
    return (
        Grade("correct", "equal", extracted)
        if equivalent(extracted, reference)
        else Grade("wrong", "different", extracted)
    )
