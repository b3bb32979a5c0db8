"""Which completions of a problem become a preference pair.

    correct_wrong   a random correct completion against a random wrong one
    best_worst      the highest score against the lowest

A completion that nobody could judge is in no pair. One that was cut off is never chosen: what it would have said is not known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf.types import FinishReason, Verdict

Truncated = Literal["reject", "leave_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One graded completion of a problem."""

    text: str
    """As a reader sees it: with what the chat template wrote of it."""
    num_tokens: int
    finish_reason: FinishReason
    verdict: Verdict
    """`wrong` for a completion that was cut off, whatever it boxed."""
    score: float | None = None
    """For best_worst; None where it was not scored or could not be."""
    components: dict[str, float] = field(default_factory=dict)
    """What the score is made of, raw."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """What became of a problem."""

    pairs: tuple[tuple[int, int], ...]
    """(chosen, rejected) by their places among the candidates."""
    reason: str = ""
    """Why there is no pair."""


def correct_wrong(
    candidates: Sequence[Candidate], *, num_pairs: int, truncated: Truncated, rng: random.Random
) -> Pairing:
    """Up to `num_pairs` random pairs; no completion, and no text, is in two of them."""
    usable = [i for i in _distinct(candidates) if _is_usable(candidates[i], truncated)]
    right = [i for i in usable if candidates[i].verdict == "correct"]
    wrong = [i for i in usable if candidates[i].verdict == "wrong"]
    if not usable:
        undecided = all(c.verdict == "undecided" for c in candidates)
        return Pairing((), "all undecided" if undecided else "all truncated or undecided")
    if not right or not wrong:
        return Pairing((), "all wrong" if wrong else "all correct")
    rng.shuffle(right)
    rng.shuffle(wrong)
    return Pairing(tuple(zip(right, wrong, strict=False))[:num_pairs])


def best_worst(candidates: Sequence[Candidate], *, min_margin: float, truncated: Truncated) -> Pairing:
    """The highest score of those that ended by themselves against the lowest; of equal ones the first."""
    usable = [i for i in range(len(candidates)) if _is_usable(candidates[i], truncated)]
    scores = {i: score for i in usable if (score := candidates[i].score) is not None}
    ended = [i for i in scores if candidates[i].finish_reason == "stop"]
    if not scores:
        return Pairing((), "none scored")
    if not ended:
        return Pairing((), "all truncated")
    best, worst = max(ended, key=lambda i: scores[i]), min(scores, key=lambda i: scores[i])
    if scores[best] <= scores[worst]:
        return Pairing((), "all scored alike")
    if scores[best] - scores[worst] < min_margin:
        return Pairing((), "below min_margin")
    return Pairing(((best, worst),))


def _is_usable(candidate: Candidate, truncated: Truncated) -> bool:
    return candidate.verdict != "undecided" and (candidate.finish_reason == "stop" or truncated == "reject")


def _distinct(candidates: Sequence[Candidate]) -> list[int]:
    """The first of each text."""
    first: dict[tuple[str, str], int] = {}
    for i, candidate in enumerate(candidates):
        first.setdefault((candidate.text, candidate.finish_reason), i)
    return list(first.values())
