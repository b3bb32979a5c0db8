"""Accuracy with its uncertainty: pass@1, pass@k, maj@k, intervals over problems, and the paired difference of two models.

The unit of every interval is the problem: samples of one problem are not independent observations of a model's ability.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf.types import Verdict

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over n problems with a 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(per_problem: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean with the 95 % percentile bootstrap interval over problems (Efron 1979): resample problems, not samples."""
    values = np.asarray(per_problem, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no judged problems to average over; every completion was undecided")
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [values[generator.integers(0, values.size, (100, values.size))].mean(1) for _ in range(RESAMPLES // 100)]
    )
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(values.mean()), float(low), float(high), int(values.size))


def paired_difference(baseline: Sequence[float], other: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of `other - baseline` over the same problems, with its interval."""
    if len(baseline) != len(other):
        raise ValueError(f"a paired comparison needs the same problems, got {len(baseline)} and {len(other)}")
    return bootstrap([b - a for a, b in zip(baseline, other, strict=True)], seed=seed)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct (https://arxiv.org/abs/2107.03374, eq. 1).

        1 - C(n - c, k) / C(n, k)

    Raises:
        ValueError: when there are fewer samples than k.
    """
    if k > num_samples:
        raise ValueError(f"pass@{k} needs {k} samples of each problem and there are {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """maj@k: whether the most frequent answer is correct; samples without an answer do not vote.

    A tie between n answers counts as the share of them that are correct, which is the expectation of breaking it at random.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    right = dict(zip(answers, correct, strict=True))
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(right[answer] for answer in winners) / len(winners)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedProblem:
    """All samples of one problem by one model."""

    id: str
    level: int
    answers: tuple[str | None, ...]
    """As extracted and normalised; None where there is none."""
    verdicts: tuple[Verdict, ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    texts: tuple[str, ...]

    @property
    def is_judged(self) -> bool:
        return "undecided" not in self.verdicts

    @property
    def correct(self) -> tuple[bool, ...]:
        return tuple(verdict == "correct" for verdict in self.verdicts)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


def summarise(problems: Sequence[GradedProblem], *, pass_at: Sequence[int], seed: int) -> dict[str, Any]:
    """The figures of one model. A problem with an undecided sample is left out as a whole, and counted."""
    judged = [p for p in problems if p.is_judged]
    samples = [(length, cut) for p in problems for length, cut in zip(p.lengths, p.truncated, strict=True)]
    k = len(problems[0].verdicts)
    return {
        "pass_at_1": asdict(bootstrap([p.accuracy for p in judged], seed=seed)),
        "pass_at_k": {
            f"{j}": asdict(bootstrap([pass_at_k(len(p.correct), sum(p.correct), j) for p in judged], seed=seed))
            for j in pass_at
            if j > 1
        },
        "majority": {"k": k, **asdict(bootstrap([majority_correct(p.answers, p.correct) for p in judged], seed=seed))},
        "by_level": {
            f"{level}": asdict(bootstrap([p.accuracy for p in judged if p.level == level], seed=seed))
            for level in sorted({p.level for p in judged})
        },
        "mean_length": sum(length for length, _ in samples) / len(samples),
        "truncated_share": sum(cut for _, cut in samples) / len(samples),
        "undecided_problems": len(problems) - len(judged),
        "samples_per_problem": k,
    }


def compare(baseline: Sequence[GradedProblem], other: Sequence[GradedProblem], *, seed: int) -> dict[str, Any]:
    """Paired difference in pass@1 over the problems that both have judged."""
    both = [(a.accuracy, b.accuracy) for a, b in zip(baseline, other, strict=True) if a.is_judged and b.is_judged]
    return asdict(paired_difference([a for a, _ in both], [b for _, b in both], seed=seed))
