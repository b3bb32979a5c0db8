"""Which of a policy's completions become demonstrations (as DeepSeek-R1's small models were made, https://arxiv.org/abs/2501.12948, section 2.4).

A completion must be right, must have ended by itself, must be one pair of think tags before a boxed answer, and must please the process
model where there is one. Of what is left, equal completions of one question count once, similar ones of one problem too, and each problem
gives so many.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.chat import THINK_CLOSE, THINK_OPEN
from data.duplicates import first_of_equal, first_of_similar, signatures
from data.shards import exact_hashes
from data.words import split_words
from rlhf.types import FinishReason, Verdict

KEPT = "kept"
FATES = (
    "undecided",
    "wrong",
    "truncated",
    "malformed",
    "without thoughts",
    "low process score",
    "exact duplicate",
    "near duplicate",
    "beyond max_per_problem",
    KEPT,
)
"""What becomes of a completion, in the order in which it may fail."""
_WELL_FORMED = re.compile(
    rf"{THINK_OPEN}(?P<thoughts>(?:(?!</?think>).)*){THINK_CLOSE}\s*[^<]*\\boxed\{{[^<]*\}}[^<]*", re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One completion, as it is looked at."""

    problem: str
    """Id of its problem."""
    question: str
    text: str
    """The whole assistant's turn."""
    num_tokens: int
    finish_reason: FinishReason
    verdict: Verdict
    score: float | None = None
    """The process model's; None where there is none, or where it was not asked."""

    @property
    def thoughts(self) -> str | None:
        """What stands between the think tags; None where the completion is not one pair of them and a boxed answer behind it."""
        match = _WELL_FORMED.fullmatch(self.text)
        return match["thoughts"].strip() if match else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a trace must be."""

    require_thoughts: bool = True
    min_score: float | None = None
    """Of the process model."""
    near_threshold: float | None = 0.8
    """Least estimated Jaccard similarity of near duplicates; None keeps them."""
    shingle_words: int = 5
    max_per_problem: int = 1
    prefer: Literal["shortest", "random"] = "shortest"
    """Which of a problem's traces come first, where not all can stay."""


def fate_of(trace: Trace, rules: Rules) -> str:
    """What a trace's own contents decide; `kept` where they decide nothing against it."""
    if trace.verdict == "undecided":
        return "undecided"
    if trace.finish_reason == "length":
        return "truncated"
    if trace.verdict == "wrong":
        return "wrong"
    if trace.thoughts is None:
        return "malformed"
    if rules.require_thoughts and not trace.thoughts:
        return "without thoughts"
    if rules.min_score is not None and (trace.score is None or trace.score < rules.min_score):
        return "low process score"
    return KEPT


def choose_traces(traces: Sequence[Trace], rules: Rules, *, seed: int) -> list[str]:
    """What becomes of each trace, in order. Preferred ones are looked at first, so that they are the ones that stay."""
    fates = [fate_of(trace, rules) for trace in traces]
    order = list(range(len(traces)))
    random.Random(seed).shuffle(order)
    if rules.prefer == "shortest":
        order.sort(key=lambda i: traces[i].num_tokens)
    left = [i for i in order if fates[i] == KEPT]
    if not left:
        return fates
    first = first_of_equal(exact_hashes([f"{traces[i].question}\n{traces[i].text}" for i in left]))
    for n, i in enumerate(left):
        if first[n] != n:
            fates[i] = "exact duplicate"
    left = [i for i in left if fates[i] == KEPT]
    if rules.near_threshold is not None:
        bands = signatures(split_words([traces[i].text for i in left]), shingle_words=rules.shingle_words)
        problems = exact_hashes([traces[i].problem for i in left])  # traces of two problems are two traces
        alive = np.ones(len(left), bool)
        first = first_of_similar(lambda band: bands[band], alive, threshold=rules.near_threshold, answers=problems)
        for n, i in enumerate(left):
            if first[n] != n:
                fates[i] = "near duplicate"
    taken: Counter[str] = Counter()
    for i in left:
        if fates[i] != KEPT:
            continue
        taken[traces[i].problem] += 1
        if taken[traces[i].problem] > rules.max_per_problem:
            fates[i] = "beyond max_per_problem"
    return fates
