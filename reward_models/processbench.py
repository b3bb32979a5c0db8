"""The first wrong step of a solution, and how well it is found, as ProcessBench counts (https://arxiv.org/abs/2412.06559).

    accuracy on erroneous solutions = share whose first wrong step is named exactly
    accuracy on correct solutions   = share of which no step is called wrong
    F1 = harmonic mean of the two

A model that calls nothing wrong, or everything, has an F1 of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.uncertainty import CONFIDENCE, RESAMPLES, Estimate, share

NO_ERROR = -1
CANDIDATES = 201
"""Thresholds that are tried: quantiles of the probabilities."""


def first_error(probabilities: Sequence[float], threshold: float) -> int:
    """Index of the first step whose probability of being right is below the threshold, -1 when there is none."""
    return next((i for i, p in enumerate(probabilities) if p < threshold), NO_ERROR)


def first_wrong(labels: Sequence[bool]) -> int:
    """Index of the first step labelled wrong, -1 when there is none."""
    return next((i for i, right in enumerate(labels) if not right), NO_ERROR)


def harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


@dataclass(frozen=True, slots=True)
class ProcessBenchScore:
    """Each with its 95 % interval: Wilson's for the accuracies, for F1 the percentiles of the bootstrap within the two kinds."""

    f1: Estimate
    erroneous: Estimate
    correct: Estimate


def require_both_kinds(truth: Sequence[int], name: str) -> None:
    """Raise when there is no erroneous solution, or no correct one: F1 needs both.

    Raises:
        ValueError: naming the data.
    """
    wrong = sum(index != NO_ERROR for index in truth)
    if wrong in (0, len(truth)):
        kind = "erroneous" if wrong == 0 else "correct"
        raise ValueError(f"{name} holds no {kind} solution among {len(truth)}; F1 needs both kinds: add some")


def benchmark_score(predicted: Sequence[int], truth: Sequence[int], *, seed: int = 0) -> ProcessBenchScore:
    """[N] and [N] indices of first wrong steps, -1 for none."""
    require_both_kinds(truth, "the benchmark")
    hits = {
        wrong: [float(p == t) for p, t in zip(predicted, truth, strict=True) if (t != NO_ERROR) == wrong]
        for wrong in (True, False)
    }
    generator = np.random.default_rng(seed)
    drawn = [generator.binomial(len(h), sum(h) / len(h), RESAMPLES) / len(h) for h in hits.values()]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile([harmonic_mean(a, b) for a, b in zip(*drawn, strict=True)], (tail, 1 - tail))
    erroneous, correct = share(hits[True]), share(hits[False])
    f1 = harmonic_mean(erroneous.mean, correct.mean)
    return ProcessBenchScore(Estimate(f1, float(low), float(high), len(truth)), erroneous, correct)


def choose_threshold(probabilities: Sequence[Sequence[float]], truth: Sequence[int]) -> float:
    """The threshold of highest F1, in the middle of the widest range that reaches it; for solutions other than those that are then scored.

    Args:
        probabilities: of N solutions, of each step.
        truth: [N] index of the first wrong step, -1 for none.
    """
    require_both_kinds(truth, "the part that the threshold is chosen on")
    table = np.ones((len(truth), max(map(len, probabilities))))
    for row, of_steps in zip(table, probabilities, strict=True):
        row[: len(of_steps)] = of_steps
    known = np.asarray(truth)
    quantiles = np.unique(
        np.quantile(np.concatenate([np.asarray(p) for p in probabilities]), np.linspace(0, 1, CANDIDATES))
    )
    candidates = np.sort(np.append(quantiles, (quantiles[1:] + quantiles[:-1]) / 2))
    scores = []
    for threshold in candidates:
        below = table < threshold
        hit = np.where(below.any(1), below.argmax(1), NO_ERROR) == known
        scores.append(harmonic_mean(hit[known != NO_ERROR].mean(), hit[known == NO_ERROR].mean()))
    best = np.flatnonzero(np.asarray(scores) == max(scores))
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    low, high = max(((candidates[run[0]], candidates[run[-1]]) for run in runs), key=lambda ends: ends[1] - ends[0])
    return float((low + high) / 2)
