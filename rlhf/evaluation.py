"""What k graded samples of each problem say of a model: accuracy, pass@k, votes, robustness, and how two models compare.

Intervals and tests are those of rlhf/uncertainty.py: over problems, never over samples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlhf.types import Verdict
from rlhf.uncertainty import (
    Estimate,
    bootstrap,
    detectable_difference,
    difference,
    share,
    sign_flip_test,
    standard_error,
)

ORIGINAL = "original"
"""The variant of a problem as its source has it; every other variant is a perturbation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedProblem:
    """All samples of one problem by one model."""

    id: str
    level: int
    answers: tuple[str | None, ...]
    """What each sample votes for: its answer, written the same way whenever it is the same; None where there is none."""
    verdicts: tuple[Verdict, ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    texts: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    """Why each verdict is what it is."""
    weights: tuple[float, ...] = ()
    """Of each sample's vote; empty where the engine gives none."""
    subject: str = ""
    variant: str = ORIGINAL
    origin: str = ""
    """Id of the problem that this one is a variant of."""
    question: str = ""
    reference: str = ""
    prefill: str = ""
    """What the chat template writes of the answer before the model does."""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What each reward model of the recipe thinks of each sample, 0 or more, by the model's name."""

    def __post_init__(self) -> None:
        each = {n: getattr(self, n) for n in ("answers", "lengths", "truncated", "texts", "reasons", "weights")}
        for name, values in (each | {f"scores of {scorer}": s for scorer, s in self.scores.items()}).items():
            size = len(values)
            if size != len(self.verdicts) and not (size == 0 and name in ("reasons", "weights")):
                raise ValueError(f"problem {self.id!r} has {len(self.verdicts)} verdicts and {size} {name}")

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> GradedProblem:
        """From a decoded line of a samples file.

        Raises:
            ValueError: naming the field that is missing or unknown.
        """
        known = {f.name for f in fields(cls)}
        wrong = set(row) - known or {"id", "answers", "verdicts", "texts"} - set(row)
        if wrong:
            raise ValueError(
                f"field {sorted(wrong)[0]!r} is {'unknown' if set(row) - known else 'missing'} in a row of samples"
            )
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in row.items()}
        values["scores"] = {scorer: tuple(s) for scorer, s in row.get("scores", {}).items()}
        return cls(**values)

    @property
    def is_judged(self) -> bool:
        return "undecided" not in self.verdicts

    @property
    def correct(self) -> tuple[bool, ...]:
        return tuple(verdict == "correct" for verdict in self.verdicts)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


# -------------------------------------------------------------------------------------------------------------- of one problem


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct (https://arxiv.org/abs/2107.03374, eq. 1).

        1 - C(n - c, k) / C(n, k)

    Raises:
        ValueError: when there are fewer samples than k.
    """
    if k > num_samples:
        raise ValueError(f"pass@{k} needs {k} samples of each problem and there are {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_correct(
    answers: Sequence[str | None], correct: Sequence[bool], weights: Sequence[float] | None = None
) -> float:
    """maj@k (https://arxiv.org/abs/2203.11171): whether the answer with the most votes is correct; samples without an answer do not vote.

    A tie between n answers counts as the share of them that are correct, which is the expectation of breaking it at random.

    Args:
        answers: [k] what each sample votes for.
        correct: [k] whether it is right.
        weights: [k] of each vote; 1 by default.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer is not None:
            votes[answer].append(weight)
    if not votes:
        return 0.0
    totals = {answer: math.fsum(cast) for answer, cast in votes.items()}  # exact, so that a tie is one in any order
    right = dict(zip(answers, correct, strict=True))
    winners = [answer for answer, total in totals.items() if total == max(totals.values())]
    return sum(right[answer] for answer in winners) / len(winners)


def worst_of(shares: Sequence[float], num_samples: int) -> tuple[float, float]:
    """(lowest accuracy over m variants of a problem, what it would be on average if the variants were all equally hard).

    The second is the least of m draws of Binomial(k, p) / k, with p the mean over the variants: E min = Σ_j P(X >= j)^m / k.
    Even a model that no rewording touches loses this much to the noise of k samples.
    """
    p, k, m = sum(shares) / len(shares), num_samples, len(shares)
    chances = [math.comb(k, j) * p**j * (1 - p) ** (k - j) for j in range(k + 1)]
    return min(shares), sum(sum(chances[j:]) ** m for j in range(1, k + 1)) / k


# ---------------------------------------------------------------------------------------------------------------- of one model


def summarise(problems: Sequence[GradedProblem], *, pass_at: Sequence[int], seed: int) -> dict[str, Any]:
    """The figures of one model on the problems as their source has them; perturbed ones are summed up under `robustness`.

    A problem with an undecided sample is left out as a whole, and counted.
    """
    originals = [p for p in problems if p.variant == ORIGINAL]
    judged = [p for p in originals if p.is_judged]
    k = len(originals[0].verdicts)

    def mean(of: Callable[[GradedProblem], float], over: Sequence[GradedProblem] = judged) -> dict[str, Any]:
        return asdict(share([of(p) for p in over], samples=k))

    def grouped(by: Callable[[GradedProblem], Any]) -> dict[str, Any]:
        return {
            f"{group}": mean(lambda p: p.accuracy, [p for p in judged if by(p) == group])
            for group in sorted({by(p) for p in judged})
        }

    accuracies = [p.accuracy for p in judged]
    verdicts = [verdict for p in originals for verdict in p.verdicts]
    lengths = [length for p in originals for length in p.lengths]
    weighted = all(p.weights for p in judged)
    summary: dict[str, Any] = {
        "pass_at_1": mean(lambda p: p.accuracy),
        "bootstrap": asdict(bootstrap(accuracies, seed=seed)),
        "standard_error": standard_error(accuracies) if len(accuracies) > 1 else None,
        "pass_at_k": {f"{j}": mean(lambda p, j=j: pass_at_k(k, sum(p.correct), j)) for j in pass_at if j > 1},
        "majority": {"k": k, **mean(lambda p: majority_correct(p.answers, p.correct))},
        "weighted_majority": (
            {"k": k, **mean(lambda p: majority_correct(p.answers, p.correct, p.weights))} if weighted else None
        ),
        "by_level": grouped(lambda p: p.level),
        "by_subject": grouped(lambda p: p.subject),
        "mean_length": sum(lengths) / len(lengths),
        "total_tokens": sum(sum(p.lengths) for p in problems),
        "truncated_share": sum(cut for p in originals for cut in p.truncated) / len(lengths),
        "undecided_share": verdicts.count("undecided") / len(verdicts),
        "undecided_problems": len(originals) - len(judged),
        "samples_per_problem": k,
    }
    if len(originals) < len(problems):
        summary["robustness"] = robustness(problems)
    return summary


def robustness(problems: Sequence[GradedProblem]) -> dict[str, Any]:
    """How accuracy holds when the same problems are told differently.

    Each variant is compared with the originals of the problems it exists for. The worst case is the mean over problems of the
    lowest accuracy over all of their variants; `worst_by_chance` is what it would be if the variants made no difference.
    """
    k = len(problems[0].verdicts)
    accuracy = {(p.origin or p.id, p.variant): p.accuracy for p in problems if p.is_judged}
    variants: dict[str, Any] = {}
    for variant in dict.fromkeys(p.variant for p in problems if p.variant != ORIGINAL):
        both = [i for i, v in accuracy if v == variant and (i, ORIGINAL) in accuracy]
        if not both:
            continue
        there = [accuracy[i, variant] for i in both]
        change = [new - accuracy[i, ORIGINAL] for i, new in zip(both, there, strict=True)]
        variants[variant] = {
            "accuracy": asdict(share(there, samples=k)),
            "original": asdict(share([accuracy[i, ORIGINAL] for i in both], samples=k)),
            "change": asdict(difference(change)),
            "p_value": sign_flip_test(change).p_value,
        }
    of_problem: dict[str, list[float]] = defaultdict(list)
    for (origin, _), value in accuracy.items():
        of_problem[origin].append(value)
    told_twice = [values for values in of_problem.values() if len(values) > 1]
    if not told_twice:
        return {"variants": variants, "worst": None, "worst_by_chance": None}
    worst = [worst_of(values, k) for values in told_twice]
    return {
        "variants": variants,
        "worst": asdict(share([seen for seen, _ in worst], samples=k)),
        "worst_by_chance": sum(expected for _, expected in worst) / len(worst),
    }


# --------------------------------------------------------------------------------------------------------------- of two models


def paired_difference(baseline: Sequence[float], other: Sequence[float]) -> Estimate:
    """Mean of `other - baseline` over the same problems, with its interval."""
    if len(baseline) != len(other):
        raise ValueError(f"a paired comparison needs the same problems, got {len(baseline)} and {len(other)}")
    return difference([b - a for a, b in zip(baseline, other, strict=True)])


def compare(baseline: Sequence[GradedProblem], other: Sequence[GradedProblem], *, seed: int) -> dict[str, Any]:
    """Paired difference in pass@1 over the problems that both have judged, with its p-value and what this design could have seen.

    Raises:
        ValueError: when the two are not samples of the same problems, in the same order.
    """
    if [p.id for p in baseline] != [p.id for p in other]:
        missing = {p.id for p in baseline} ^ {p.id for p in other}
        raise ValueError(
            f"a paired comparison needs the same problems in the same order; {len(missing)} are only in one of the two"
            + (f", for example {min(missing)!r}" if missing else "")
        )
    pairs = [
        (a.accuracy, b.accuracy)
        for a, b in zip(baseline, other, strict=True)
        if a.is_judged and b.is_judged and a.variant == ORIGINAL
    ]
    changes = [b - a for a, b in pairs]
    test = sign_flip_test(changes, seed=seed)
    error = standard_error(changes)
    return {
        **asdict(paired_difference([a for a, _ in pairs], [b for _, b in pairs])),
        "bootstrap": asdict(bootstrap(changes, seed=seed)),
        "standard_error": error if math.isfinite(error) else None,
        "p_value": test.p_value,
        "p_value_method": test.method,
        "better": sum(c > 0 for c in changes),
        "worse": sum(c < 0 for c in changes),
        "detectable": (
            detectable_difference(error * math.sqrt(len(changes)), len(changes)) if math.isfinite(error) else None
        ),
    }
