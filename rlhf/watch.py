"""Signs that a policy games its reward."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 8
"""Tokens of the n-grams that repetition is counted in: about five words."""


def repeated_share(token_ids: Sequence[int], *, n: int = NGRAM) -> float:
    """Share of the n-grams of a completion that stood in it before, in [0, 1); 0 for one shorter than n."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
