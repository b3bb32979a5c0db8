"""Exact and near duplicates among millions of texts, with a few hundred bytes a text on disk and little in memory.

Each text leaves one hash of itself (exact duplicates: nothing but white space differs) and a MinHash signature of its word n-grams, computed by rensa
(R-MinHash, 64 places, 16 bits of each kept: https://arxiv.org/abs/1704.04370). Four places are a band of 64 bits. Texts that share a band
are compared over all 64 places, and are near duplicates when at least the threshold's share of places is equal: an estimate of the
Jaccard similarity with a standard error of at most 0.0625. Two texts with a similarity of 0.8 share a band with probability 0.9998.

Bands are looked at one after the other, so that memory is a few arrays of one number a text, whatever the number of bands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

from data.words import Hashes, Words, ngrams

PLACES, BANDS, SEED = 64, 16, 42
_PLACES_PER_BAND = PLACES // BANDS
_PLACE = np.uint64(0xFFFF)

Rows = NDArray[np.int64]
LoadBand = Callable[[int], Hashes]
"""Number of a band → that band of every text, [R]."""


def signatures(words: Words, *, shingle_words: int) -> Hashes:
    """[BANDS, R] the bands of each text's signature. Texts without words all get the same one."""
    grams, offsets = ngrams(words, shingle_words)
    if not len(grams):
        places = np.zeros((len(words.counts), PLACES), np.uint32)
    else:
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets.astype(np.uint64), PLACES, SEED)
        flat = np.fromiter(itertools.chain.from_iterable(matrix.to_rows()), np.uint32, len(words.counts) * PLACES)
        places = flat.reshape(-1, PLACES)
    return np.ascontiguousarray(places.astype(np.uint16)).view(np.uint64).T


def first_of_equal(keys: Hashes) -> Rows:
    """[R] the first row with the same key; its own number where it is the first."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.ones(len(keys), bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]] if len(keys) else order
    return first


def first_of_similar(
    load_band: LoadBand, alive: NDArray[np.bool_], *, threshold: float, answers: Hashes | None = None
) -> Rows:
    """[R] the first row of each row's cluster of near duplicates; its own number where it is the first, or not alive.

    A cluster is what pairs at or above the threshold connect.

    Args:
        load_band: one band of the signatures of all rows.
        alive: rows that take part.
        threshold: least share of equal places.
        answers: rows with different ones are no duplicates, however similar: `x + y = 12, find x` and `… find y` are two problems.
    """
    rows = np.flatnonzero(alive)
    root = np.arange(len(alive))
    for band in range(BANDS):
        keys = load_band(band)[rows]
        if answers is not None:
            keys ^= answers[rows]  # rows with different answers never share a band
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.ones(len(keys), bool)
        starts[1:] = keys[1:] != keys[:-1]
        del keys
        same = np.flatnonzero(~starts)
        first = np.flatnonzero(starts)[np.cumsum(starts)[same] - 1]
        later = rows[order[same]]
        codes = []
        for earlier in (rows[order[same - 1]], rows[order[first]]):
            new = root[earlier] != root[later]  # what is connected needs no further proof
            codes.append(earlier[new] * len(alive) + later[new])
        pairs = np.stack(np.divmod(np.unique(np.concatenate(codes)), len(alive)))
        if pairs.shape[1]:
            equal = _equal_places(load_band, pairs)
            root = _connect(root, pairs[:, equal >= threshold * PLACES])
    return root


def _equal_places(load_band: LoadBand, pairs: Rows) -> NDArray[np.int64]:
    """[pairs] how many of the 64 places are equal."""
    equal = np.zeros(pairs.shape[1], np.int64)
    for band in range(BANDS):
        keys = load_band(band)
        difference = keys[pairs[0]] ^ keys[pairs[1]]
        for place in range(_PLACES_PER_BAND):
            equal += (difference >> np.uint64(16 * place)) & _PLACE == 0
    return equal


def _connect(root: Rows, pairs: Rows) -> Rows:
    """The first row of each cluster after joining those of each pair."""
    root = root.copy()
    while True:
        left, right = root[pairs[0]], root[pairs[1]]
        apart = left != right
        if not apart.any():
            return root
        low, high = np.minimum(left[apart], right[apart]), np.maximum(left[apart], right[apart])
        np.minimum.at(root, high, low)
        while not np.array_equal(root, shorter := root[root]):
            root = shorter
