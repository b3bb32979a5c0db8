"""Which rows of a data set hold a problem of an evaluation set, word for word or reworded with other numbers.

Three rules, each with its threshold in the recipe:

- `exact`: the question has the problem's words, all of them, in their order, after normalisation (see `data/words.py`).
- `ngram`: at least `overlap` of the problem's n-grams (8 words by default) occur somewhere in the row. A share of the *problem's* n-grams is
  asked for, not a single one: competitions end dozens of problems with the same phrase of more than 13 words ("where m and n are
  relatively prime positive integers. Find m + n"). A problem of fewer words than an n-gram is found where it is all the row says.
- `numbers_blind`: with every run of numbers replaced by one mark, question and problem share at least `similarity` of all their
  3-grams (Jaccard), and the problem has at least `min_words` words, beside numbers and single letters. It catches problems whose numbers were changed, with a
  word or two.

The report stands in the manifest under `decontamination`, for evaluation to show beside a score:

    {
      "version": 1,
      "rules": {"ngram_words": 8, "overlap": 0.5, "similarity": 0.5, "min_words": 12, "numbers_blind": "drop"},
      "rows_scanned": 7470,                     rows of the training data that were compared
      "benchmarks": {
        "math500": {
          "problems": 500,                      problems the scan knew
          "sha256": {"…/test.jsonl": "35dc…"},  of the files they were read from
          "found": 3,                           distinct problems that occur in the rows scanned, by any rule
          "left": 0,                            of them, those with a row that was kept: what a score on it has to be read with
          "left_ids": [],                       their ids, as `load_benchmark` gives them
          "by_rule": {"exact": 1, "ngram": 1, "numbers_blind": 1}
        }
      },
      "pairs_total": 3,
      "pairs": [                                the strongest 200; all of them are in contamination.jsonl beside the manifest
        {"row": "math-train-12", "origin": "train.json row 13", "benchmark": "math500", "problem": "math500-test/algebra/1.json",
         "rule": "ngram", "score": 0.93, "dropped": true, "row_text": "…", "problem_text": "…"}
      ]
    }
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.records import Problem
from data.words import Hashes, HashSet, Offsets, Words, ngrams, split_words, text_hashes

Rule = Literal["exact", "ngram", "numbers_blind"]
BLIND_WORDS = 3
"""Words of the n-grams that numbers-blind matching compares."""
_LETTERS = HashSet(split_words(["a b c d e f g h i j k l m n o p q r s t u v w x y z"]).hashes)
"""Single letters are variables more often than words."""
PAIRS_SHOWN = 200
TEXT_SHOWN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Thresholds of the scan; see the module."""

    ngram_words: int = 8
    overlap: float = 0.5
    numbers_blind: Literal["drop", "report", "off"] = "drop"
    similarity: float = 0.5
    min_words: int = 12

    def drops(self, rule: Rule) -> bool:
        return rule != "numbers_blind" or self.numbers_blind == "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A row of a batch and the problem found in it."""

    row: int
    problem: int
    """Index into the problems the index was built from."""
    rule: Rule
    score: float
    """Share of the problem's n-grams, or Jaccard similarity; 1 for `exact`."""


class _Postings:
    """From an n-gram to the problems that have it."""

    def __init__(self, grams: Hashes, offsets: Offsets) -> None:
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        order = np.lexsort((owner, grams))
        grams, owner = grams[order], owner[order]
        repeated = np.zeros(len(grams), bool)
        repeated[1:] = (grams[1:] == grams[:-1]) & (owner[1:] == owner[:-1])
        grams, self._owners = grams[~repeated], owner[~repeated]
        self.known = HashSet(grams)
        self._begin = np.searchsorted(grams, self.known.sorted)
        self._end = np.append(self._begin[1:], len(grams))
        self.sizes = np.bincount(self._owners, minlength=len(offsets) - 1)
        """[problems] distinct n-grams of each."""

    def shared(self, found: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(problems, number of distinct n-grams each shares) for the distinct n-grams `found` in one row."""
        owners = [self._owners[self._begin[i] : self._end[i]] for i in np.unique(found)]
        problems, counts = np.unique(np.concatenate(owners), return_counts=True)
        return problems, counts


class EvaluationIndex:
    """All evaluation problems, ready to be looked for in batches of rows."""

    def __init__(self, questions: Sequence[str], rules: Rules) -> None:
        words = split_words(questions)
        blind = words.numbers_blind()
        self.rules = rules
        self._whole = dict(zip(text_hashes(words).tolist(), range(len(questions)), strict=True))
        self._plain = _Postings(*ngrams(words, rules.ngram_words))
        self._blind = _Postings(*ngrams(blind, BLIND_WORDS))
        spoken = ~blind.is_number & (_LETTERS.find(blind.hashes) < 0)
        self._long_enough = np.bincount(blind.texts()[spoken], minlength=len(questions)) >= rules.min_words

    def scan(self, questions: Words, whole_rows: Words) -> list[Match]:
        """The problems found in a batch, at most one pair of each row and problem, the strongest rule first.

        Args:
            questions: what is compared as a whole: exactly, and numbers-blind.
            whole_rows: what is searched for n-grams; question, and responses where a row has them.
        """
        matches: dict[tuple[int, int], Match] = {}
        for row, key in enumerate(text_hashes(questions).tolist()):
            if key in self._whole:
                problem = self._whole[key]
                matches[row, problem] = Match(row=row, problem=problem, rule="exact", score=1.0)
        for match in [*self._contained(whole_rows), *self._reworded(questions)]:
            matches.setdefault((match.row, match.problem), match)
        return sorted(matches.values(), key=lambda match: match.row)

    def _contained(self, rows: Words) -> list[Match]:
        matches = []
        for row, found, _ in _hits(self._plain, rows, self.rules.ngram_words):
            problems, shared = self._plain.shared(found)
            score = shared / self._plain.sizes[problems]
            for i in np.flatnonzero(score >= self.rules.overlap):
                matches.append(Match(row=row, problem=int(problems[i]), rule="ngram", score=float(score[i])))
        return matches

    def _reworded(self, rows: Words) -> list[Match]:
        if self.rules.numbers_blind == "off":
            return []
        matches = []
        for row, found, num_grams in _hits(self._blind, rows.numbers_blind(), BLIND_WORDS, self.rules.similarity):
            if len(np.unique(found)) < self.rules.similarity * num_grams:
                continue  # even if one problem had them all
            problems, shared = self._blind.shared(found)
            score = shared / (self._blind.sizes[problems] + num_grams - shared)
            for i in np.flatnonzero((score >= self.rules.similarity) & self._long_enough[problems]):
                matches.append(Match(row=row, problem=int(problems[i]), rule="numbers_blind", score=float(score[i])))
        return matches


def _hits(
    postings: _Postings, rows: Words, n: int, least_share: float = 0.0
) -> list[tuple[int, NDArray[np.int64], int]]:
    """(row, known n-grams in it, its distinct n-grams) of each row that has any, and at least `least_share` of its own."""
    grams, offsets = ngrams(rows, n)
    found = postings.known.find(grams)
    hits = np.concatenate([[0], np.cumsum(found >= 0)])
    per_row = hits[offsets[1:]] - hits[offsets[:-1]]
    # A row's repeated n-grams count twice here and once below, so half the share is asked for to leave nothing out.
    likely = np.flatnonzero((per_row > 0) & (per_row >= 0.5 * least_share * np.diff(offsets)))
    listed = []
    for row in likely.tolist():
        own = slice(offsets[row], offsets[row + 1])
        known = found[own]
        listed.append((row, known[known >= 0], len(np.unique(grams[own]))))
    return listed


def report(
    rules: Rules,
    *,
    rows_scanned: int,
    benchmarks: Mapping[str, Sequence[Problem]],
    checksums: Mapping[str, Mapping[str, str]],
    pairs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The manifest's section `decontamination`; its format stands in the module's docstring."""
    sections: dict[str, Any] = {}
    for name, problems in benchmarks.items():
        own = [pair for pair in pairs if pair["benchmark"] == name]
        left = {pair["problem"] for pair in own if not pair["dropped"]}
        rule_names: tuple[Rule, ...] = ("exact", "ngram", "numbers_blind")
        sections[name] = {
            "problems": len(problems),
            "sha256": dict(checksums.get(name, {})),
            "found": len({pair["problem"] for pair in own}),
            "left": len(left),
            "left_ids": sorted(left),
            "by_rule": {rule: sum(pair["rule"] == rule for pair in own) for rule in rule_names},
        }
    strongest = sorted(pairs, key=lambda pair: (pair["dropped"], -pair["score"]))
    return {
        "version": 1,
        "rules": {
            "ngram_words": rules.ngram_words,
            "overlap": rules.overlap,
            "similarity": rules.similarity,
            "min_words": rules.min_words,
            "numbers_blind": rules.numbers_blind,
        },
        "rows_scanned": rows_scanned,
        "benchmarks": sections,
        "pairs_total": len(pairs),
        "pairs": [dict(pair) for pair in strongest[:PAIRS_SHOWN]],
    }
