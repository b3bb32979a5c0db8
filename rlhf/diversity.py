"""How different the samples of one prompt are from each other: numbers that fall, or rise, when exploration collapses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

END_OF_THOUGHT = "</think>"
MAX_TOKENS = 512
"""Of a completion that self-BLEU looks at, so that it stays cheap beside sampling."""


def distinct_share(values: Sequence[object]) -> float:
    """Different values among G, less the one there always is: 0 when all are equal, 1 when no two are."""
    return (len(set(values)) - 1) / (len(values) - 1)


def thought_and_answer(text: str) -> tuple[str, str]:
    """What stands before the last end of a thought, and what comes after it; without one, everything is the answer."""
    thought, _, answer = text.rpartition(END_OF_THOUGHT)
    return thought.strip(), answer.strip()


def self_bleu(samples: Sequence[Sequence[int]], *, order: int = 4) -> float:
    """Self-BLEU (https://arxiv.org/abs/1802.01886): BLEU (2002, aclanthology.org/P02-1040) of each sample with the others as references, in
    the mean: 1 when all are the same, 0 when they share no `order`-gram.

        BLEU = min(1, exp(1 - r / c)) exp( 1/order sum_n ln p_n )

    p_n: share of the sample's n-grams, each at most as often as the reference that has it most often; c: length of the sample; r: that of
    the reference nearest in length, the shorter of two. A sample shorter than `order` goes by the n-grams it has. Not smoothed.

    Args:
        samples: [G][T] token ids of two samples or more.
        order: longest n-gram.
    """
    cut = [tuple(sample[:MAX_TOKENS]) for sample in samples]
    matched = [[0.0] * order for _ in cut]
    for n in range(1, order + 1):
        counts = [Counter(zip(*(sample[i:] for i in range(n)), strict=False)) for sample in cut]
        most: dict[tuple[int, ...], tuple[int, int]] = {}  # of each n-gram, the two highest counts of any samples
        for count in counts:
            for gram, times in count.items():
                first, second = most.get(gram, (0, 0))
                most[gram] = (times, first) if times > first else (first, max(second, times))
        for i, count in enumerate(counts):
            for gram, times in count.items():
                first, second = most[gram]
                matched[i][n - 1] += min(times, second if times == first else first)
    return sum(_bleu(i, cut, matched[i]) for i in range(len(cut))) / len(cut)


def _bleu(i: int, samples: Sequence[Sequence[int]], matched: Sequence[float]) -> float:
    length = len(samples[i])
    of_orders = [m / (length - n) for n, m in enumerate(matched) if length > n]
    if not of_orders or min(of_orders) == 0:
        return 0.0
    nearest = min((len(s) for j, s in enumerate(samples) if j != i), key=lambda other: (abs(other - length), other))
    brevity = min(1.0, math.exp(1 - nearest / length))
    return brevity * math.exp(sum(map(math.log, of_orders)) / len(of_orders))
