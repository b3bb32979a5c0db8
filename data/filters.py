"""Which records are worth keeping: length in tokens, language, and signs of broken or empty text. For whole batches at once."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.words import HashSet, Words, ngrams, split_words

FUNCTION_WORDS = {
    "en": "the of and to is are was that it for with as on at by from this be if how many what which find has have her his "
    "she he they their each when then than let there does did will can not an or in a you your we I us so be do who",
    "de": "der die das und ist nicht ein eine einen mit von zu den dem auf für sich wie viele wenn auch wird sind hat er sie es im bei aus nach",
    "fr": "le la les des et est une un du que qui dans pour pas sur avec sont au aux combien si elle il ce cette par plus ont",
    "es": "el la los las es una un que en de del por con para no se su al cuántos cuántas si son está más como hay tiene",
    "it": "il lo la gli le è una un che di del della in per con non si su quanti quante se sono più come ha nel",
    "pt": "os as é uma um que de do da em para com não se por seu sua quantos quantas são mais como tem no na",
    "nl": "de het een en is van dat in op te met voor niet zijn hoeveel als ook wordt heeft er aan bij uit ze hij",
}
"""Words that a text of a few sentences can hardly do without. Single letters are none: in mathematics they are variables."""
LEAST_FUNCTION_WORDS = 2
"""Fewer tell nothing."""
SCRIPTS = {
    "zh": re.compile(r"[\u4e00-\u9fff]"),
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "ko": re.compile(r"[\uac00-\ud7af]"),
    "ru": re.compile(r"[\u0400-\u04ff]"),
    "ar": re.compile(r"[\u0600-\u06ff]"),
    "hi": re.compile(r"[\u0900-\u097f]"),
    "el": re.compile(r"[\u0370-\u03ff]"),
    "he": re.compile(r"[\u0590-\u05ff]"),
    "th": re.compile(r"[\u0e00-\u0e7f]"),
}
"""Scripts of one language, or of one family that is named after its largest; kana decide before Chinese characters."""
LANGUAGES = (*FUNCTION_WORDS, *SCRIPTS)
SCRIPT_SHARE = 0.3
"""Share of the letters from which a script decides; below it are Greek symbols in formulas and names in passing."""
PICTURE = re.compile(r"!\[[^\]]*\]\(|<image|<img|\\includegraphics", re.IGNORECASE)
BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0e-\x1f]")
"""Characters that only a wrong decoding leaves behind."""
REPEATED_WORDS, REPEATS_FROM = 5, 50
"""Repetition is measured on n-grams of so many words, in texts of at least so many words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What a record must be; the defaults let everything pass."""

    tokenizer: str | None = None
    min_tokens: int = 1
    max_tokens: int | None = None
    languages: tuple[str, ...] = ()
    min_letter_share: float = 0.0
    """Letters among all characters but spaces."""
    max_repetition: float = 1.0
    """Share of a text's n-grams that occurred in it before."""
    pictures: bool = True
    """Whether a text may refer to a picture that is not there."""

    def __post_init__(self) -> None:
        unknown = [language for language in self.languages if language not in LANGUAGES]
        if unknown:
            raise ValueError(f"filters.languages names {unknown[0]!r}; known: {', '.join(LANGUAGES)}")
        if self.tokenizer is None and (self.max_tokens is not None or self.min_tokens > 1):
            raise ValueError(
                "filters.max_tokens and min_tokens count tokens; set filters.tokenizer to the model's folder"
            )


class TokenCounter:
    """Tokens of texts, where a bound on them does not answer already.

    In a byte-level vocabulary every token stands for at least one byte: a text of no more bytes than `max_tokens` needs no tokenizing.
    """

    def __init__(self, path: str) -> None:
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"filters.tokenizer is {path}, which has no tokenizer.json; point it at a model's folder")
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._byte_level = '"ByteLevel"' in json.dumps(
            json.loads(file.read_text(encoding="utf-8")).get("pre_tokenizer")
        )

    def counts(self, texts: Sequence[str]) -> list[int]:
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def outside(self, texts: Sequence[str], *, min_tokens: int, max_tokens: int | None) -> dict[int, int]:
        """Index of each text with fewer or more tokens than allowed, and how many it has."""
        if self._byte_level and min_tokens <= 1:
            # At most four bytes a character, one where all are ASCII.
            limit = max_tokens if max_tokens is not None else 1 << 60
            asked = [
                i for i, t in enumerate(texts) if (len(t) if t.isascii() else len(t.encode("utf-8", "replace"))) > limit
            ]
        else:
            asked = list(range(len(texts)))
        counts = zip(asked, self.counts([texts[i] for i in asked]), strict=True)
        return {i: n for i, n in counts if n < min_tokens or (max_tokens is not None and n > max_tokens)}


class _FunctionWords:
    def __init__(self) -> None:
        self.languages = list(FUNCTION_WORDS)
        words = split_words(list(FUNCTION_WORDS.values()))
        self._known = HashSet(words.hashes)
        self._of = np.zeros((len(self._known.sorted), len(self.languages)), np.int64)
        self._of[self._known.find(words.hashes), words.texts()] = 1

    def best(self, words: Words) -> list[str]:
        """The language of each text with the most function words; empty where there are too few."""
        found = self._known.find(words.hashes)
        texts = words.texts()
        scores = np.stack(
            [
                np.bincount(texts, np.where(found >= 0, self._of[found, i], 0), len(words.counts))
                for i in range(len(self.languages))
            ]
        )
        return [
            self.languages[i] if top >= LEAST_FUNCTION_WORDS else ""
            for i, top in zip(scores.argmax(0), scores.max(0), strict=True)
        ]


_function_words: _FunctionWords | None = None


def languages_of(texts: Sequence[str], words: Words) -> list[str]:
    """The language of each text; empty where nothing tells, as in a bare formula or a few words."""
    global _function_words
    _function_words = _function_words or _FunctionWords()
    best = _function_words.best(words)
    for i, text in enumerate(texts):
        if not text.isascii() and (script := _script(text)):
            best[i] = script
    return best


def _script(text: str) -> str:
    letters = sum(map(str.isalpha, text)) or 1
    shares = {language: len(pattern.findall(text)) / letters for language, pattern in SCRIPTS.items()}
    if shares["ja"] > 0.05:
        return "ja"
    language = max(shares, key=lambda name: shares[name])
    return language if shares[language] >= SCRIPT_SHARE else ""


def refusals(
    filters: Filters, counter: TokenCounter | None, texts: Sequence[str], words: Words
) -> dict[int, tuple[str, str]]:
    """(reason, detail) of each text of a batch that a filter takes out; the first filter that does is named."""
    refused: dict[int, tuple[str, str]] = {}
    if counter is not None:
        for i, n in counter.outside(texts, min_tokens=filters.min_tokens, max_tokens=filters.max_tokens).items():
            short = n < filters.min_tokens
            bound = f"min_tokens {filters.min_tokens}" if short else f"max_tokens {filters.max_tokens}"
            refused[i] = ("too short" if short else "too long", f"{n} tokens, {bound}")
    if filters.languages:
        for i, language in enumerate(languages_of(texts, words)):
            if language and language not in filters.languages:
                refused.setdefault(i, ("language", f"reads as {language}"))
    for i, text in enumerate(texts):
        if problem := _broken(text, filters):
            refused.setdefault(i, problem)
    if filters.max_repetition < 1:
        for i, share in enumerate(repetition(words)):
            if share > filters.max_repetition:
                refused.setdefault(i, ("repetition", f"{share:.2f} of its {REPEATED_WORDS}-grams are repeated"))
    return refused


def _broken(text: str, filters: Filters) -> tuple[str, str] | None:
    if ("\ufffd" in text or not text.isprintable()) and (found := BROKEN.search(text)):
        return "broken text", f"has the character {found[0]!r}"
    if not filters.pictures and (found := PICTURE.search(text)):
        return "picture", f"refers to one: {found[0]!r}"
    if filters.min_letter_share > 0:
        characters = len(text) - text.count(" ") - text.count("\n")
        share = sum(map(str.isalpha, text)) / max(characters, 1)
        if share < filters.min_letter_share:
            return "few letters", f"{share:.2f} of its characters are letters"
    return None


def repetition(words: Words) -> NDArray[np.float64]:
    """[R] share of each text's n-grams that occurred in it before; 0 for short texts."""
    share = np.zeros(len(words.counts))
    if not (words.counts >= REPEATS_FROM).any():
        return share
    grams, offsets = ngrams(words, REPEATED_WORDS)
    for i in np.flatnonzero(words.counts >= REPEATS_FROM):
        own = grams[offsets[i] : offsets[i + 1]]
        share[i] = 1 - len(np.unique(own)) / len(own)
    return share
