"""What a mean over problems does not say: intervals, the paired test of two models, and the smallest difference a design can see.

The unit is the problem: samples of one problem are not independent observations of a model's ability, so every function takes one
number a problem and clusters by it. Coverage of every interval is simulated in docs/benchmarks/evaluation.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
MOST_SUMS = 2**21
"""Distinct sums of differences up to which the permutation test is exact by dynamic programming."""
MOST_FLIPS = 20
"""Problems with a difference up to which it is exact by enumeration where the differences have no common unit."""
MONTE_CARLO_FLIPS = 100_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over n problems with a 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def _values(per_problem: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(per_problem, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no judged problems to average over; every completion was undecided")
    return values


@lru_cache
def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for probability above 1/2 and whole degrees of freedom.

    Bisection on the finite series of its distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if degrees < 1 or not 0.5 <= probability < 1:
        raise ValueError(f"Student's t needs degrees >= 1 and a probability in [0.5, 1), got {degrees}, {probability}")
    odd = degrees % 2
    steps = np.arange(1, (degrees - odd) // 2, dtype=np.float64)
    factors = 2 * steps / (2 * steps + 1) if odd else (2 * steps - 1) / (2 * steps)

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        first = (math.cos(angle) if degrees > 1 else 0.0) if odd else 1.0
        series = first * (1.0 + float(np.cumprod(factors * math.cos(angle) ** 2).sum()))
        return 2 / math.pi * (angle + math.sin(angle) * series) if odd else math.sin(angle) * series

    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * probability - 1 else (low, middle)
    return low


def standard_error(per_problem: Sequence[float]) -> float:
    """Of the mean, clustered by problem (https://arxiv.org/abs/2411.00640, equal samples a problem): s / sqrt(n)."""
    values = _values(per_problem)
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.inf


def bootstrap(per_problem: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean with the expanded percentile bootstrap interval over problems: problems are resampled, not samples.

    The plain percentiles (Efron 1979) are too narrow by sqrt((n-1)/n) z/t; they are taken further out by that much
    (Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789): z' = -sqrt(n/(n-1)) t.
    """
    values = _values(per_problem)
    low, high = _expanded_percentiles(_resampled_means(values, np.random.default_rng(seed)), values.size)
    return Estimate(float(values.mean()), low, high, int(values.size))


def bootstrap_gap(per_problem: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Estimate:
    """How much higher the mean of one group of problems is than that of another, each resampled by itself; n is the smaller group's size."""
    one, other = _values(per_problem), _values(others)
    generator = np.random.default_rng(seed)
    gaps = _resampled_means(one, generator) - _resampled_means(other, generator)
    n = min(one.size, other.size)
    low, high = _expanded_percentiles(gaps, n)
    return Estimate(float(one.mean() - other.mean()), low, high, int(n))


def _resampled_means(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """[RESAMPLES] means of as many draws with replacement."""
    n = values.size
    distinct, counts = np.unique(values, return_counts=True)
    if (
        8 * distinct.size <= n
    ):  # accuracies over few samples: how often each value is drawn is multinomial, the same draw at less cost
        return generator.multinomial(n, counts / n, RESAMPLES) @ distinct / n
    return np.concatenate([values[generator.integers(0, n, (100, n))].mean(1) for _ in range(RESAMPLES // 100)])


def _expanded_percentiles(resampled: NDArray[np.float64], n: int) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    if n > 1:
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile(1 - tail, n - 1))
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return float(low), float(high)


def share(per_problem: Sequence[float], *, samples: int = 1) -> Estimate:
    """Mean of numbers in [0, 1] with Wilson's interval at the effective number of observations.

        n' = p (1 - p) / se²        t = Student's quantile with n - 1 degrees of freedom
        (p + t²/2n' ± t sqrt(p(1-p)/n' + t²/4n'²)) / (1 + t²/n')

    Wilson (1927) for clustered data, as surveys do it (Franco et al. 2019, https://doi.org/10.1093/jssam/smy019). Unlike p ± t se it
    stays within [0, 1] and says something where every problem has the same result.

    Args:
        per_problem: one number a problem.
        samples: behind each of them; n' is never above n · samples.
    """
    values = _values(per_problem)
    n, p = values.size, float(values.mean())
    if n == 1:
        return Estimate(p, 0.0, 1.0, 1)
    spread, error = p * (1 - p), standard_error(per_problem)
    if spread <= 0:
        effective = float(n)  # nothing is known of the spread between problems
    else:
        effective = min(spread / error**2, float(n * samples)) if error > 0 else float(n * samples)
    t = student_quantile((1 + CONFIDENCE) / 2, n - 1)
    center = (p + t * t / (2 * effective)) / (1 + t * t / effective)
    half = t / (1 + t * t / effective) * math.sqrt(max(spread, 0.0) / effective + t * t / (4 * effective**2))
    return Estimate(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)), int(n))


def difference(per_problem: Sequence[float]) -> Estimate:
    """Mean of paired differences in [-1, 1] with Student's interval, mean ± t se, clipped to where a difference can be."""
    values = _values(per_problem)
    n, mean = values.size, float(values.mean())
    half = student_quantile((1 + CONFIDENCE) / 2, n - 1) * standard_error(per_problem) if n > 1 else math.inf
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half), int(n))


# ---------------------------------------------------------------------------------------------------------- permutation test


@dataclass(frozen=True, slots=True)
class PermutationTest:
    """How often chance alone, flipping each difference's sign with a coin, is at least as far from 0 as what was seen."""

    p_value: float
    method: Literal["exact, dynamic programming", "exact, enumeration", "Monte-Carlo"]


def sign_flip_test(differences: Sequence[float], *, seed: int = 0) -> PermutationTest:
    """Two-sided paired permutation test (Fisher 1935): p = P(|Σ s_i d_i| >= |Σ d_i|) over all signs s.

    Exact by counting sums where the differences are multiples of a common unit, as differences of accuracies over k samples are;
    exact by enumeration for few problems; otherwise by drawing signs, with (1 + hits) / (1 + draws), which is never 0.
    """
    moved = [d for d in differences if d]
    if not moved:
        return PermutationTest(1.0, "exact, enumeration")
    whole = _in_common_unit(moved)
    if whole is not None:
        return PermutationTest(_by_counting(whole), "exact, dynamic programming")
    values = np.asarray(moved)
    seen = abs(values.sum()) - 1e-9 * np.abs(values).sum()  # a sum that rounding put a hair below is the same sum
    if len(moved) <= MOST_FLIPS:
        sums = np.zeros(1)
        for value in moved:
            sums = np.concatenate((sums + value, sums - value))
        return PermutationTest(float((np.abs(sums) >= seen).mean()), "exact, enumeration")
    generator = np.random.default_rng(seed)
    hits = sum(
        int((np.abs(generator.choice((-1.0, 1.0), (1000, values.size)) @ values) >= seen).sum())
        for _ in range(MONTE_CARLO_FLIPS // 1000)
    )
    return PermutationTest((1 + hits) / (1 + MONTE_CARLO_FLIPS), "Monte-Carlo")


def _in_common_unit(differences: Sequence[float]) -> list[int] | None:
    """The differences as multiples of their common unit; None where they have none, or their sums are too many to count."""
    fractions = [Fraction(d).limit_denominator(10_000) for d in differences]
    if any(abs(float(f) - d) > 1e-12 for f, d in zip(fractions, differences, strict=True)):
        return None
    unit = 1
    for fraction in fractions:
        unit = math.lcm(unit, fraction.denominator)
        if unit > MOST_SUMS:
            return None
    whole = [int(f * unit) for f in fractions]
    return whole if sum(map(abs, whole)) <= MOST_SUMS else None


def _by_counting(whole: Sequence[int]) -> float:
    """P(|Σ s_i m_i| >= |Σ m_i|): the distribution of the sum, one difference after the other."""
    reach = sum(map(abs, whole))
    chance = np.zeros(2 * reach + 1)  # index 0 is a sum of -reach
    chance[reach] = 1.0
    for m in map(abs, whole):
        halves = chance / 2
        chance = np.zeros_like(halves)
        chance[m:] += halves[: halves.size - m]
        chance[: halves.size - m] += halves[m:]
    seen = abs(sum(whole))
    return min(1.0, float(chance[: reach - seen + 1].sum() + chance[max(reach + seen, reach - seen + 1) :].sum()))


# ---------------------------------------------------------------------------------------------------------------------- power


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Where the noise of an accuracy comes from."""

    between: float
    """Variance over problems of the chance to solve each."""
    within: float
    """Mean over problems of p (1 - p): the variance of one sample."""

    @classmethod
    def assumed(cls, accuracy: float, concentration: float) -> Spread:
        """Of problems whose chances are Beta with this mean and a + b = concentration; (0.5, 2) is the uniform one: 1/12 and 1/6."""
        variance = accuracy * (1 - accuracy)
        return cls(between=variance / (concentration + 1), within=variance * concentration / (concentration + 1))

    @classmethod
    def measured(cls, accuracies: Sequence[float], samples: int) -> Spread:
        """By the method of moments from k samples of each problem; with k = 1 all variance counts as within.

        within = mean of x (1 - x) k / (k - 1)        between = variance of x - within / k
        """
        x = _values(accuracies)
        if samples == 1:
            return cls(between=0.0, within=float(x.mean() * (1 - x.mean())))
        within = float((x * (1 - x)).mean() * samples / (samples - 1))
        return cls(between=max(0.0, float(x.var(ddof=1)) - within / samples), within=within)

    def of_a_score(self, samples: int) -> float:
        """Standard deviation of one problem's accuracy over k samples."""
        return math.sqrt(self.between + self.within / samples)

    def of_a_difference(self, samples: int, correlation: float) -> float:
        """Standard deviation of one problem's difference between two such models (https://arxiv.org/abs/2411.00640).

        ω² + 2 within / k  with  ω² = 2 between (1 - correlation), the correlation of what the two find hard.
        """
        return math.sqrt(2 * self.between * (1 - correlation) + 2 * self.within / samples)


def detectable_difference(deviation: float, n: int, *, power: float = 0.8) -> float:
    """The true difference that n problems show at the 5 % level with this power (https://arxiv.org/abs/2411.00640, section 5).

        (t + z_power) · deviation / sqrt(n)

    Args:
        deviation: standard deviation over problems of the paired difference.
        n: problems.
        power: chance to see it.
    """
    if n < 2:
        return math.inf
    t = student_quantile((1 + CONFIDENCE) / 2, n - 1)
    return (t + NormalDist().inv_cdf(power)) * deviation / math.sqrt(n)


def half_width(deviation: float, n: int) -> float:
    """Half the length of the interval of a mean: t · deviation / sqrt(n)."""
    return student_quantile((1 + CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n) if n > 1 else math.inf
