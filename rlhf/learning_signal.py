"""From what was measured on each problem to the probability that it comes next. Arrays [N] have an entry for each problem."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def faded(counts: Array, ages: Array, half_life: float | None) -> Array:
    """Counts [N] that are `ages` [N] rollout batches old: c 2^(-age / half_life); as they are without a half-life."""
    return counts if half_life is None else counts * np.exp2(-ages / half_life)


def kind_rates(correct: Array, wrong: Array, kinds: NDArray[np.int64], *, rate: float, strength: float) -> Array:
    """[N] the pass rate that is expected of each problem from those of its kind, `kinds` [N] from 0.

    (strength rate + correct completions of the kind) / (strength + completions of the kind)
    """
    good, all_of_it = np.bincount(kinds, correct), np.bincount(kinds, correct + wrong)
    return ((strength * rate + good) / (strength + all_of_it))[kinds]


def beta_posterior(correct: Array, wrong: Array, *, rates: Array, strength: float) -> tuple[Array, Array]:
    """(alpha, beta) [N] of the Beta posterior of a pass rate, whose prior has mean `rates` [N] and weighs `strength` completions."""
    return strength * rates + correct, strength * (1 - rates) + wrong


def expected_signal(alpha: Array, beta: Array) -> Array:
    """E[p (1 - p)] of p ~ Beta(alpha, beta): [N] -> [N].

        alpha beta / ((alpha + beta) (alpha + beta + 1))

    p (1 - p) is the variance of a completion's 0/1 reward, to which the size of a group-relative gradient is proportional.
    """
    total = alpha + beta
    return alpha * beta / (total * (total + 1))


def normalised(weights: Array) -> Array:
    """[N] weights as probabilities; even ones where all are 0."""
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))


def with_floor(probabilities: Array, floor: float) -> Array:
    """A share `floor` of the choices goes to any of the problems: (1 - floor) q + floor / N."""
    return (1 - floor) * probabilities + floor / len(probabilities)


def replay_probabilities(
    signal: Array, ages: Array, seen: NDArray[np.bool_], *, temperature: float, stale_share: float, new_share: float
) -> Array:
    """Prioritised level replay (https://arxiv.org/abs/2010.03934, section 3): [N] -> [N].

        seen       (1 - new) ((1 - stale) P_signal + stale P_age)     P_signal ~ (1 / rank)^(1 / temperature), P_age ~ age
        unseen     new / number of them

    Rank 1 has the highest signal; problems of equal signal share their places. Where there is no unseen problem, or no seen one, the other
    side has it all. The paper draws whether to take a new level; here it is one distribution.
    """
    if not seen.any():
        return normalised(np.ones(len(signal)))
    new = new_share if not seen.all() else 0.0
    # rank of a tie: the mean of its places
    _, inverse, counts = np.unique(-signal[seen], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    of_seen = (1 - stale_share) * normalised(ranks ** (-1 / temperature)) + stale_share * normalised(ages[seen])
    probabilities = np.full(len(signal), new / max((~seen).sum(), 1))
    probabilities[seen] = (1 - new) * of_seen
    return probabilities


def paced_share(batch: int, *, start: float, batches: int, power: float) -> float:
    """Share of the problems, from the easiest on, that may come in rollout batch `batch`, from 0 (https://arxiv.org/abs/1904.03626).

    min(1, start + (1 - start) (batch / batches)^power)
    """
    return min(1.0, start + (1 - start) * (batch / batches) ** power)


def draw(probabilities: Array, count: int, *, seed: str) -> list[int]:
    """`count` problems one after the other, none twice before all have come: a function of its arguments.

    The keys log q + Gumbel noise in falling order are that sequence of draws (https://arxiv.org/abs/1903.06059). Problems of probability 0 come
    after all others.
    """
    generator = np.random.default_rng(random.Random(seed).getrandbits(64))
    drawn: list[int] = []
    while len(drawn) < count:
        noise = generator.gumbel(size=len(probabilities))
        with np.errstate(divide="ignore"):
            keys = np.log(probabilities) + noise
        drawn += np.lexsort((-noise, -keys)).tolist()
    return drawn[:count]


def importance_weights(probabilities: Array, chosen: list[int], exponent: float) -> Array:
    """Weights of chosen problems that make up for how they were chosen (https://arxiv.org/abs/1511.05952, section 3.4).

        w_i = (1 / (N q_i))^exponent / max over the chosen

    Exact for draws with replacement; here problems are drawn without, which differs where q is large.
    """
    weights = (len(probabilities) * probabilities[chosen]) ** -exponent
    return weights / weights.max() if len(chosen) else weights


def effective_number(probabilities: Array) -> float:
    """1 / sum q²: so many problems, drawn evenly, would be as spread out."""
    return float(1 / np.square(probabilities).sum())


def histogram(rates: Array, bins: int) -> list[float]:
    """Share of the rates [M] in each of so many equal parts of [0, 1]; zeros without any rate."""
    counts: Any = np.histogram(rates, bins=bins, range=(0.0, 1.0))[0]
    return (counts / max(len(rates), 1)).tolist()
