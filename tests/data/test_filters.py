"""Filters name a reason and a detail; what they cannot judge passes."""

# ruff: noqa: RUF001

from pathlib import Path

import pytest

from data.filters import Filters, TokenCounter, languages_of, refusals, repetition
from data.words import split_words

REAL = Path(__file__).parents[3] / "shared/data"


@pytest.fixture(scope="module")
def counter(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return TokenCounter(str(folder))


def why(texts, counter=None, **filters):
    if counter is not None:
        filters["tokenizer"] = "given"
    found = refusals(Filters(**filters), counter, texts, split_words(texts))
    return {i: reason for i, (reason, _) in found.items()}


def test_the_defaults_let_everything_pass():
    assert why(["", "x", "naïve", "東京 " * 100]) == {}


@pytest.mark.parametrize("text", ["On Monday Mia has 7 coins.", "東京 é 🙂", "12345", " "])
def test_a_text_is_too_long_from_one_token_above_the_limit(counter, tokenizer, text):
    n = len(tokenizer.encode(text, add_special_tokens=False))
    assert why([text], counter, max_tokens=n) == {}
    assert why([text], counter, min_tokens=n) == {}
    assert why([text], counter, min_tokens=n + 1) == {0: "too short"}
    if n > 1:
        assert why([text], counter, max_tokens=n - 1) == {0: "too long"}


def test_the_shortcut_for_short_texts_decides_as_counting_does(counter, demonstrations):
    texts = [d.question for d in demonstrations[:50]] + ["é" * 30, "🙂" * 10]
    for limit in (10, 30, 60):
        counted = {i for i, n in enumerate(counter.counts(texts)) if n > limit}
        assert set(counter.outside(texts, min_tokens=1, max_tokens=limit)) == counted


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("How many apples does Anna have if she buys three and eats two?", "en"),
        ("Wie viele Äpfel hat Anna, wenn sie drei kauft und zwei isst?", "de"),
        ("Combien de pommes a Anne si elle en achète trois?", "fr"),
        ("¿Cuántas manzanas tiene Ana si compra tres?", "es"),
        ("Quante mele ha Anna se ne compra tre?", "it"),
        ("Quantas maçãs tem a Ana se compra três?", "pt"),
        ("Hoeveel appels heeft Anna als ze er drie koopt?", "nl"),
        ("小明有三个苹果，又买了两个，一共有几个？", "zh"),
        ("リンゴを三つ買いました。全部でいくつですか？", "ja"),
        ("Сколько яблок у Анны?", "ru"),
        ("$x^2 + y_1 = 0$", ""),
        ("Let $\\alpha$, β and γ be given: find α + β.", "en"),
    ],
)
def test_the_language_is_told_by_script_and_function_words(text, language):
    assert languages_of([text], split_words([text])) == [language]


def test_another_language_is_taken_out_and_a_bare_formula_is_not():
    texts = ["How many are there in the box?", "Wie viele sind in der Kiste?", "$x+1=2$"]
    assert why(texts, languages=("en",)) == {1: "language"}


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_no_problem_of_math_or_gsm8k_reads_as_another_language():
    from data.catalog import load_benchmark

    for name, path in (("math", "math"), ("gsm8k", "gsm8k"), ("olympiadbench", "bench"), ("minerva", "bench")):
        texts = [p.question for p in load_benchmark(name, path=str(REAL / path), revision=None)]
        assert set(languages_of(texts, split_words(texts))) <= {"en", ""}


def test_broken_text_pictures_and_few_letters_are_named():
    texts = ["fine text", "bro\ufffdken", "see ![figure](a.png)", "1 + 2 = 3 ?!", "two\nlines\tare fine"]
    assert why(texts, pictures=False, min_letter_share=0.5) == {1: "broken text", 2: "picture", 3: "few letters"}


def test_repetition_is_the_share_of_ngrams_that_came_before():
    once = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(100))
    twice = f"{once} {once}"  # 196 5-grams: 96 new, 4 across the seam, 96 repeated
    share = repetition(split_words([once, twice, "a b " * 10])).tolist()
    assert share == [0, 96 / 196, 0]
    assert why([once, twice], max_repetition=0.4) == {1: "repetition"}


def test_the_first_filter_that_takes_a_text_out_is_named(counter):
    assert why(["Wie viele sind in der Kiste?"], counter, max_tokens=1, languages=("en",)) == {0: "too long"}


def test_an_unknown_language_lists_the_known_ones():
    with pytest.raises(ValueError, match="names 'xx'; known: en, de"):
        Filters(languages=("xx",))


def test_tokens_cannot_be_counted_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"set filters.tokenizer"):
        Filters(max_tokens=10)
    with pytest.raises(ValueError, match=r"which has no tokenizer.json"):
        TokenCounter(str(tmp_path))
