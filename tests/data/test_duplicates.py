"""Exact and near duplicates: which row stays, and how similar is similar."""

import random

import numpy as np

from data.duplicates import BANDS, PLACES, first_of_equal, first_of_similar, signatures
from data.words import split_words

rng = random.Random(0)
VOCABULARY = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]


def text(length=100):
    return " ".join(rng.choices(VOCABULARY, k=length))


def jaccard(a, b, n=5):
    grams = [{tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)} for t in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def near(texts, threshold=0.8, alive=None):
    bands = signatures(split_words(texts), shingle_words=5)
    assert bands.shape == (BANDS, len(texts))
    return first_of_similar(
        lambda band: bands[band], np.ones(len(texts), bool) if alive is None else alive, threshold=threshold
    ).tolist()


def test_of_equal_keys_the_first_one_stays():
    assert first_of_equal(np.array([7, 3, 7, 9, 3, 7], np.uint64)).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_of_equal(np.empty(0, np.uint64)).tolist() == []


def test_one_word_changed_in_a_hundred_is_a_near_duplicate_and_half_of_them_is_none():
    a, b = text(), text()
    changed = a.replace(a.split()[50], "changed", 1)
    half = " ".join(a.split()[:50] + b.split()[:50])
    assert jaccard(a, changed) > 0.85
    assert jaccard(a, half) < 0.4
    assert near([a, b, changed, half]) == [0, 1, 0, 3]


def test_a_chain_of_near_duplicates_is_one_cluster_and_its_first_row_stays():
    a = text()
    b = a.replace(a.split()[10], "one", 1)
    c = b.replace(b.split()[90], "two", 1)
    assert near([text(), c, a, text(), b]) == [0, 1, 1, 3, 1]


def test_similar_questions_with_different_answers_are_two_problems():
    a = text()
    bands = signatures(split_words([a, a, a]), shingle_words=5)
    answers = np.array([7, 8, 7], np.uint64)
    given = bands.copy()
    found = first_of_similar(lambda band: bands[band], np.ones(3, bool), threshold=0.8, answers=answers)
    assert found.tolist() == [0, 1, 0]
    assert (bands == given).all()


def test_rows_that_are_not_alive_take_no_part():
    a = text()
    assert near([a, a, a], alive=np.array([False, True, True])) == [0, 1, 1]


def test_the_share_of_equal_places_estimates_the_similarity():
    estimates, truths = [], []
    for _ in range(60):
        a = text(60)
        words = a.split()
        for _ in range(2):
            words[rng.randrange(60)] = "other"
        b = " ".join(words)
        bands = signatures(split_words([a, b]), shingle_words=5)
        places = np.ascontiguousarray(bands.T).view(np.uint16)
        estimates.append((places[0] == places[1]).mean())
        truths.append(jaccard(a, b))
    error = np.asarray(estimates) - np.asarray(truths)
    assert abs(error.mean()) < 3 * 0.0625 / np.sqrt(60)
    assert error.std() < 1.3 / (2 * np.sqrt(PLACES))


def test_thousands_of_copies_of_one_text_and_unrelated_ones_are_told_apart():
    a = text()
    texts = [a if i % 3 == 0 else text() for i in range(300)]
    assert near(texts) == [0 if i % 3 == 0 else i for i in range(300)]
