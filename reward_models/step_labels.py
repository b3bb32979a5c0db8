"""Labels for the steps of a policy's own solutions, without a human: what becomes of completions sampled from each prefix.

A step is right as far as the policy can still reach the right answer from it (Math-Shepherd, https://arxiv.org/abs/2312.08935, eq. 3
and 4). The first wrong step of a wrong solution is found with log2(steps) prefixes (OmegaPRM, https://arxiv.org/abs/2406.06592,
section 3.1). A completion that the grader cannot judge is left out of the estimate; it is never a wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.types import Verdict

Estimate = Literal["soft", "hard", "binary_search"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSolution:
    """A solution cut into S steps."""

    ends: tuple[int, ...]
    """[S] tokens up to and including each step; two short ones may end in the same token."""
    num_tokens: int
    finished: bool
    """Whether nothing follows the last step, so that what becomes of it is known."""
    correct: bool

    def __post_init__(self) -> None:
        if (
            not self.ends
            or list(self.ends) != sorted(self.ends)
            or not 0 < self.ends[0] <= self.ends[-1] <= self.num_tokens
        ):
            raise ValueError(f"the steps of a solution of {self.num_tokens} tokens end at {self.ends}")

    @property
    def num_open(self) -> int:
        """Steps whose prefix must be completed to know what it is worth: all but one that ends the solution."""
        return len(self.ends) - self.finished


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the completions of one prefix."""

    correct: int
    wrong: int
    undecided: int = 0

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Tally:
        return cls(verdicts.count("correct"), verdicts.count("wrong"), verdicts.count("undecided"))

    @property
    def value(self) -> float | None:
        """Share of the decided completions that are correct; None when none was decided."""
        decided = self.correct + self.wrong
        return self.correct / decided if decided else None


@dataclass(frozen=True, slots=True)
class StepLabels:
    """What was found out about the S steps of a solution."""

    labels: tuple[bool, ...]
    """[S]"""
    values: tuple[float, ...] = ()
    """[S] probability to reach the right answer from there; empty where only labels were asked for."""


Prefix = tuple[int, int]
"""(solution, step): the tokens up to and including the step."""
Complete = Callable[[Sequence[Prefix]], list[Tally]]
"""Samples completions of prefixes and has them graded; the prefixes of a call are sampled together."""


def label_solutions(
    solutions: Sequence[SampledSolution], complete: Complete, *, estimate: Estimate
) -> list[StepLabels | None]:
    """Labels of each solution; None where all completions of a prefix that was needed are undecided.

        soft            value_i = share of right completions after step i, label_i = value_i > 0 (eq. 4 there)
        hard            label_i = some completion after step i is right (eq. 3), and so for every step before it
        binary_search   the same labels, found by halving, where no step after a wrong one leads to a right answer

    A right solution is itself a completion of each of its prefixes, so `hard` and `binary_search` ask nothing about it.
    """
    if estimate == "binary_search":
        return [
            None if first is None else StepLabels(tuple(i < first for i in range(len(s.ends))))
            for s, first in zip(solutions, _first_wrong_steps(solutions, complete), strict=True)
        ]
    asked = [
        (n, i)
        for n, solution in enumerate(solutions)
        if estimate == "soft" or not solution.correct
        for i in range(solution.num_open)
    ]
    tallies = dict(zip(asked, complete(asked), strict=True)) if asked else {}
    return [_labels(n, solution, tallies, estimate) for n, solution in enumerate(solutions)]


def _labels(n: int, solution: SampledSolution, tallies: dict[Prefix, Tally], estimate: Estimate) -> StepLabels | None:
    if estimate == "hard" and solution.correct:
        return StepLabels((True,) * len(solution.ends))
    values = [tallies[n, i].value for i in range(solution.num_open)]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    known += [float(solution.correct)] * solution.finished
    if estimate == "soft":
        return StepLabels(tuple(value > 0 for value in known), tuple(known))
    first = next((i for i, value in enumerate(known) if value == 0), len(known))
    return StepLabels(tuple(i < first for i in range(len(known))))


def _first_wrong_steps(solutions: Sequence[SampledSolution], complete: Complete) -> list[int | None]:
    """Index of the first step after which no completion was right, the number of steps where there is none, None where unknown.

    All solutions are halved at the same time, so a round is one call.
    """
    low = [len(s.ends) if s.correct else 0 for s in solutions]
    high = [len(s.ends) if s.correct else s.num_open for s in solutions]  # an answer that is wrong is known to be
    unknown: set[int] = set()
    while open_ones := [n for n in range(len(solutions)) if low[n] < high[n] and n not in unknown]:
        middles = [(n, (low[n] + high[n]) // 2) for n in open_ones]
        for (n, middle), tally in zip(middles, complete(middles), strict=True):
            if tally.value is None:
                unknown.add(n)
            elif tally.value > 0:
                low[n] = middle + 1
            else:
                high[n] = middle
    return [None if n in unknown else low[n] for n in range(len(solutions))]


def expected_completion_tokens(
    solutions: Sequence[SampledSolution], *, estimate: Estimate, completions_per_prefix: int
) -> tuple[float, float]:
    """(prefixes, sampled tokens) that labelling these solutions takes, if a completion is as long as what the solution had left.

    Halving asks at most ceil(log2(S + 1)) times, S the steps whose worth is not known, about prefixes of mean length.
    """
    prefixes = tokens = 0.0
    for solution in solutions:
        if estimate != "soft" and solution.correct:
            continue
        left = [solution.num_tokens - end for end in solution.ends[: solution.num_open]]
        asked = math.ceil(math.log2(len(left) + 1)) if estimate == "binary_search" else len(left)
        prefixes += asked
        tokens += asked * completions_per_prefix * sum(left) / max(len(left), 1)
    return prefixes, tokens


def balanced(correct: Sequence[bool], share: float | None) -> list[int]:
    """Indices of the first ones such that `share` of them are correct, as many as there can be; all where share is None."""
    if share is None:
        return list(range(len(correct)))
    right, wrong = sum(correct), len(correct) - sum(correct)
    total = min(right / share if share > 0 else math.inf, wrong / (1 - share) if share < 1 else math.inf)
    left = {True: round(total * share), False: round(total * (1 - share))}
    kept = []
    for i, is_correct in enumerate(correct):
        if left[is_correct] > 0:
            left[is_correct] -= 1
            kept.append(i)
    return kept
