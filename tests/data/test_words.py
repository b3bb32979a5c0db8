"""Words, n-grams and their hashes: what counts as the same text."""

# ruff: noqa: RUF001

import numpy as np
import pytest

from data.words import HashSet, ngrams, split_words, text_hashes


def same(*texts, blind=False):
    words = split_words(texts)
    return len(set(text_hashes(words.numbers_blind() if blind else words).tolist())) == 1


@pytest.mark.parametrize(
    "texts",
    [
        ("Find $3x+1$.", "find 3 X + 1"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", r"\frac 1 2", r"\left(\tfrac12\right)".replace("12", "1 2")),
        ("2 − 1", "2 - 1"),
        ("2×3·4", "2*3*4"),
        (r"x \le 3", r"x \leq 3", "x ≤ 3", "x <= 3"),
        ("naïve “café”", "NAÏVE café!"),
        ("ﬁnd x²", "find x2"),
    ],
)
def test_the_same_text_written_differently_is_the_same_words(texts):
    assert same(*texts)


@pytest.mark.parametrize("texts", [("3x+1", "3x-1"), ("2 3", "23"), ("a b", "b a"), ("a", "a a"), ("x^2", "x_2")])
def test_other_operators_numbers_or_order_are_other_texts(texts):
    assert not same(*texts)


def test_numbers_blind_sees_neither_the_numbers_nor_how_many_stand_together():
    assert same("She has 12 apples and 3.", "She has 1,000 apples and 4.5.", blind=True)
    assert same("Compute 1 + 2 now", "Compute 3 * 4 - 5 now", blind=True)
    assert not same("She has 12 apples", "She has 12 pears", blind=True)


def test_a_batch_gives_what_its_texts_give_one_by_one():
    texts = ["What is 2 + 2?", "", "ΑΒΓ 東京 12", "x" * 200, "a\0b", "∑∑"]
    together = split_words(texts)
    assert together.counts.tolist() == [5, 0, 3, 4, 2, 0]  # a word of 200 letters is cut at every 64
    for i, text in enumerate(texts):
        alone = split_words([text])
        assert alone.hashes.tolist() == together.hashes[together.offsets[i] : together.offsets[i + 1]].tolist()
        assert text_hashes(alone)[0] == text_hashes(together)[i]
        assert set(ngrams(alone, 3)[0].tolist()) <= set(ngrams(together, 3)[0].tolist())


def test_a_text_of_w_words_has_w_minus_n_plus_one_ngrams_and_a_short_one_a_single_one():
    grams, offsets = ngrams(split_words(["a b c d", "", "a b", "a b c"]), 3)
    assert np.diff(offsets).tolist() == [2, 0, 1, 1]
    assert grams[0] == grams[offsets[3]]  # a b c
    assert grams[0] != grams[1]


def test_no_two_of_a_million_numbers_collide():
    words = split_words([" ".join(map(str, range(1_000_000)))])
    assert len(np.unique(words.hashes)) == 1_000_000


def test_a_hash_set_finds_what_is_in_it_and_nothing_else():
    known = np.array([5, 7, 2**63], np.uint64)
    index = HashSet(known).find(np.array([7, 8, 2**63, 0], np.uint64))
    assert index.tolist() == [1, -1, 2, -1]
    assert HashSet(np.empty(0, np.uint64)).find(known).tolist() == [-1, -1, -1]
