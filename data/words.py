"""Texts as sequences of normalised words, and n-grams of them as 64-bit hashes, for whole batches at once.

Normalised: Unicode compatibility forms unified, lower case, LaTeX spacing commands and punctuation gone; a run of digits is a word of
its own, and so is each operator, so that `3x+1` and `3 x + 1` are the same four words and `3x-1` is another. Numbers-blind: operators
are gone and each run of numbers is one and the same word, so that two problems that differ in their numbers only are the same text.

A word costs no Python object: a batch is one byte string, and hashes are sums over its bytes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

_OPERATORS = "+-*/^=<>"
_SAME_OPERATOR = str.maketrans(
    {"\u2212": "-", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*", "\u00f7": "/", "\u2264": "<=", "\u2265": ">="}
)
_NOT_A_WORD = re.compile(r"[^\w\s\x00\\+\-*/^=<>]|_")
_SYNONYMS = (
    (b"\\dfrac", b" frac "),
    (b"\\tfrac", b" frac "),
    (b"\\left", b" "),
    (b"\\right", b" "),
    (b"\\text", b" "),
    (b"\\mathrm", b" "),
    (b"\\leq", b" <= "),
    (b"\\geq", b" >= "),
    (b"\\le", b" <= "),  # after \\left; it is a French word otherwise
    (b"\\ge", b" >= "),
)
"""What LaTeX writes in several ways; the backslash itself separates words."""
_SPACE, _LETTER, _DIGIT, _OPERATOR, _END = 0, 1, 2, 3, 4
_CLASS = np.full(256, _SPACE, np.uint8)
for _byte in range(256):
    if chr(_byte).isascii() and chr(_byte).isdigit():
        _CLASS[_byte] = _DIGIT
    elif _byte >= 128 or chr(_byte).isalpha():  # a byte of a longer UTF-8 character; non-words are gone by then
        _CLASS[_byte] = _LETTER
for _operator in _OPERATORS:
    _CLASS[ord(_operator)] = _OPERATOR
_CLASS[0] = _END
_LONGEST = 64
"""Bytes of a word beyond which it is cut into several, so that powers need no more than so many entries."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.cumprod(np.full(_LONGEST, _BASE, np.uint64), dtype=np.uint64)
_NUMBER = np.uint64(0x23)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a batch of texts."""

    hashes: Hashes
    """[W] one a word, text after text."""
    offsets: Offsets
    """[R + 1] where the words of each text begin, and W."""
    is_number: NDArray[np.bool_]
    """[W]"""
    is_operator: NDArray[np.bool_]
    """[W]"""

    @property
    def counts(self) -> Offsets:
        """[R] words of each text."""
        return np.diff(self.offsets)

    def texts(self) -> NDArray[np.int64]:
        """[W] the text that each word belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    def numbers_blind(self) -> Words:
        """The same texts with every run of numbers replaced by one mark."""
        named = ~self.is_operator
        hashes, is_number, texts = self.hashes[named], self.is_number[named], self.texts()[named]
        follows = np.zeros(len(hashes), bool)
        follows[1:] = is_number[1:] & is_number[:-1] & (texts[1:] == texts[:-1])
        hashes = np.where(is_number, _mix(np.full(1, _NUMBER)), hashes)[~follows]
        counts = np.bincount(texts[~follows], minlength=len(self.offsets) - 1)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Words(hashes, offsets, is_number[~follows], np.zeros(len(hashes), bool))


def split_words(texts: Sequence[str]) -> Words:
    """The words of each text, in order."""
    joined = "\0".join([_clean(t) for t in texts] if not all(map(str.isascii, texts)) else texts)
    if joined.count("\0") != max(len(texts) - 1, 0):
        joined = "\0".join(_clean(t.replace("\0", " ")) for t in texts)
    raw = joined.lower().encode("utf-8", errors="replace") + b"\0"
    for name, same in _SYNONYMS:
        raw = raw.replace(name, same)
    data = np.frombuffer(raw, np.uint8)
    kinds = _CLASS[data]
    begins = np.empty(len(data), bool)
    begins[0] = True
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    begins |= kinds == _OPERATOR
    runs = np.flatnonzero(begins)
    ends = np.append(runs[1:], len(data))
    words = (kinds[runs] != _SPACE) & (kinds[runs] != _END)
    starts, lengths = runs[words], (ends - runs)[words]
    if len(lengths) and lengths.max() > _LONGEST:
        starts, lengths = _cut(starts, lengths)
    per_text = np.searchsorted(starts, np.flatnonzero(kinds == _END))[: len(texts)]
    hashes = _word_hashes(data, starts, lengths)
    offsets = np.concatenate([[0], per_text]).astype(np.int64)
    return Words(hashes, offsets, kinds[starts] == _DIGIT, kinds[starts] == _OPERATOR)


def _clean(text: str) -> str:
    if text.isascii():
        return text
    return _NOT_A_WORD.sub(" ", unicodedata.normalize("NFKC", text.translate(_SAME_OPERATOR)))


def _cut(starts: Offsets, lengths: Offsets) -> tuple[Offsets, Offsets]:
    pieces = -(-lengths // _LONGEST)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + piece * _LONGEST
    return starts, np.minimum(np.repeat(lengths, pieces) - piece * _LONGEST, _LONGEST)


def _word_hashes(data: NDArray[np.uint8], starts: Offsets, lengths: Offsets) -> Hashes:
    """Sum over the bytes of each word of byte x base^(place in the word), mixed."""
    if not len(starts):
        return np.empty(0, np.uint64)
    first = np.cumsum(lengths) - lengths
    place = np.arange(lengths.sum()) - np.repeat(first, lengths)
    letters = data[np.repeat(starts, lengths) + place].astype(np.uint64)
    return _mix(np.add.reduceat(letters * _POWERS[place], first))


def _mix(values: Hashes) -> Hashes:
    """Every bit of a hash depends on every bit of the value (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngrams(words: Words, n: int) -> tuple[Hashes, Offsets]:
    """(hashes [N], offsets [R + 1]) of the n-grams of each text, in order; a text of fewer words is one gram of them all."""
    counts = words.counts
    num_grams = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
    offsets = np.concatenate([[0], np.cumsum(num_grams)]).astype(np.int64)
    first = np.repeat(words.offsets[:-1] - offsets[:-1], num_grams) + np.arange(offsets[-1])
    length = np.minimum(np.repeat(counts, num_grams), n)
    grams = np.zeros(len(first), np.uint64)
    padded = np.append(words.hashes, np.zeros(n, np.uint64))
    for place in range(n):
        grams *= _BASE
        grams += padded[first + place] if place == 0 else np.where(place < length, padded[first + place], np.uint64(0))
    return _mix(grams), offsets


def text_hashes(words: Words) -> Hashes:
    """[R] one hash a text: equal exactly when the sequences of words are."""
    length = words.counts
    place = np.arange(len(words.hashes)) - np.repeat(words.offsets[:-1], length)
    mixed = _mix(words.hashes + place.astype(np.uint64) * _BASE)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(mixed, dtype=np.uint64)])
    return _mix(sums[words.offsets[1:]] - sums[words.offsets[:-1]] + length.astype(np.uint64))


class HashSet:
    """Membership of many hashes at once: a table of bits, then a search among the few that pass it."""

    def __init__(self, hashes: Iterable[int] | Hashes) -> None:
        self.sorted = np.unique(np.asarray(hashes if isinstance(hashes, np.ndarray) else list(hashes), np.uint64))
        bits = max(16, int(len(self.sorted) * 16).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[(self.sorted >> self._shift).astype(np.int64)] = True

    def find(self, hashes: Hashes) -> NDArray[np.int64]:
        """Index into `sorted` of each hash, -1 where it is not there."""
        found = np.full(len(hashes), -1, np.int64)
        maybe = np.flatnonzero(self._table[(hashes >> self._shift).astype(np.int64)])
        if len(maybe):
            wanted = hashes[maybe]
            index = np.minimum(np.searchsorted(self.sorted, wanted), len(self.sorted) - 1)
            found[maybe] = np.where(self.sorted[index] == wanted, index, -1)
        return found
