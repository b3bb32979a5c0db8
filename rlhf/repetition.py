"""How much of a completion repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NGRAM = 8
"""Tokens of the n-grams that are counted: about five words."""
MULTIPLIER = np.uint64(6364136223846793005)
"""Of the hash that stands for an n-gram."""


def repeated_share(token_ids: Sequence[int], *, n: int = NGRAM) -> float:
    """Share of a completion's n-grams that stood in it before: [T] -> number in [0, 1); 0 for one shorter than n."""
    count = len(token_ids) - n + 1
    if count < 1:
        return 0.0
    ids = np.asarray(token_ids, dtype=np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        hashes = hashes * MULTIPLIER + ids[i : i + count]
    return 1.0 - len(np.unique(hashes)) / count
