"""Evaluation problems are found in training rows word for word and reworded, and boilerplate is not taken for them."""

from pathlib import Path

import pytest

from data.catalog import CATALOG, load_benchmark
from data.decontamination import EvaluationIndex, Rules, report
from data.records import Problem
from data.sources import read_source
from data.words import split_words

REAL = Path(__file__).parents[3] / "shared/data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")

TRAIN_RIDE = "A plane travels 1200 miles in 3 hours. At the same rate, how many additional hours would it take to travel an additional 2000 miles?"
AIME = (
    "Let $x$ be the number of ways to colour the edges of a cube with three colours so that each face has two colours. "
    "The probability can be written as m/n where m and n are relatively prime positive integers. Find m + n."
)


def scan(rows, problems=(TRAIN_RIDE, AIME), **rules):
    words = split_words(rows)
    return [(m.row, m.problem, m.rule) for m in EvaluationIndex(list(problems), Rules(**rules)).scan(words, words)]


def test_a_problem_is_found_whatever_its_typography():
    assert scan([TRAIN_RIDE.upper().replace(",", " ,")]) == [(0, 0, "exact")]


def test_a_problem_inside_a_longer_text_is_found_by_its_ngrams():
    assert scan(["Here is a task for you. " + TRAIN_RIDE + " Think about it first."]) == [(0, 0, "ngram")]


def test_a_problem_with_other_numbers_and_another_vehicle_is_found():
    reworded = TRAIN_RIDE.replace("plane", "train").replace("1200", "270").replace("2000", "180").replace("3 ", "5 ")
    assert scan([reworded], overlap=1.0) == [(0, 0, "numbers_blind")]
    assert scan([reworded], overlap=1.0, numbers_blind="off") == []


def test_the_phrase_that_ends_dozens_of_problems_is_not_a_match():
    other = "A fair die is rolled five times. The probability can be written as m/n where m and n are relatively prime positive integers. Find m + n."
    assert scan([other]) == []
    assert scan([other], overlap=0.2) == [(0, 1, "ngram")]  # a single shared n-gram would have been enough elsewhere


def test_a_set_phrase_of_few_words_is_not_matched_numbers_blind():
    short = "What is the remainder when 17 is divided by 6?"
    rows = ["What is the remainder when 99 is divided by 4?"]
    assert scan(rows, problems=[short]) == []
    assert scan(rows, problems=[short], min_words=5) == [(0, 0, "numbers_blind")]


def test_the_problem_is_looked_for_in_the_responses_too_but_reworded_only_in_the_question():
    index = EvaluationIndex([TRAIN_RIDE], Rules())
    asked, whole = split_words(["Tell me a riddle"]), split_words(["Tell me a riddle\n" + TRAIN_RIDE])
    assert [m.rule for m in index.scan(asked, whole)] == ["ngram"]


def test_every_problem_that_a_row_holds_is_named():
    assert scan([TRAIN_RIDE + " " + AIME]) == [(0, 0, "ngram"), (0, 1, "ngram")]


def test_the_report_counts_problems_found_and_those_a_kept_row_still_holds():
    problems = {"b": [Problem(id="p1", question="q", answer="1"), Problem(id="p2", question="r", answer="2")], "c": []}
    pairs = [
        {"benchmark": "b", "problem": "p1", "rule": "exact", "score": 1.0, "dropped": True, "row": "x"},
        {"benchmark": "b", "problem": "p1", "rule": "ngram", "score": 0.5, "dropped": True, "row": "y"},
        {"benchmark": "b", "problem": "p2", "rule": "numbers_blind", "score": 0.6, "dropped": False, "row": "z"},
    ]
    section = report(Rules(), rows_scanned=9, benchmarks=problems, checksums={"b": {"f": "00"}}, pairs=pairs)
    b = section["benchmarks"]["b"]
    assert (b["problems"], b["found"], b["left"], b["left_ids"]) == (2, 2, 1, ["p2"])
    assert b["by_rule"] == {"exact": 1, "ngram": 1, "numbers_blind": 1}
    assert section["benchmarks"]["c"]["found"] == 0
    assert [pair["row"] for pair in section["pairs"]] == ["z", "x", "y"]  # what is still in comes first


def found_in(train, split, path, benchmarks):
    rows, _ = read_source(CATALOG[train], path=str(REAL / path), revision=None, split=split)
    problems = [p for name, place in benchmarks for p in load_benchmark(name, path=str(REAL / place), revision=None)]
    words = split_words([row.question for row in rows])
    matches = EvaluationIndex([p.question for p in problems], Rules()).scan(words, words)
    return {(rows[m.row].id, problems[m.problem].id, m.rule) for m in matches}


@needs_real
def test_gsm8k_train_holds_three_test_problems_reworded_and_none_word_for_word():
    assert found_in("gsm8k", "train", "gsm8k", [("gsm8k", "gsm8k")]) == {
        ("gsm8k-train-1314", "gsm8k-test-602", "ngram"),  # a train and a plane, how many additional hours
        ("gsm8k-train-5162", "gsm8k-test-602", "ngram"),
        ("gsm8k-train-3726", "gsm8k-test-824", "numbers_blind"),  # stamps of three designs, Bella's and Max's
        ("gsm8k-train-20", "gsm8k-test-632", "numbers_blind"),  # cans of cat food, Chad's and Kimberly's
    }


@needs_real
def test_aime_of_1983_to_2023_holds_nothing_of_2024_and_2025():
    assert found_in("aime", "train", "aime", [("aime24", "aime"), ("aime25", "aime")]) == set()


@needs_real
def test_a_benchmark_finds_itself_whole():
    problems = load_benchmark("aime24", path=str(REAL / "aime"), revision=None)
    words = split_words([p.question for p in problems])
    matches = EvaluationIndex([p.question for p in problems], Rules()).scan(words, words)
    assert [(m.row, m.problem) for m in matches if m.rule == "exact"] == [(i, i) for i in range(30)]
    second = load_benchmark("aime24", path=str(REAL / "aime/aime24_nemo.jsonl"), revision=None)
    words = split_words([p.question for p in second])
    found = EvaluationIndex([p.question for p in problems], Rules()).scan(words, words)
    assert len({m.problem for m in found}) == 30  # another packaging, other typography
