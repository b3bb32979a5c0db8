"""Choosing one answer among n samples of a problem: by vote, by a reward model's score, or by both.

Each figure is the expectation over all choices of n of the N samples at hand, so that a figure for n = 2 uses all of them. Intervals
are over problems (rlhf/uncertainty.py), never over samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.evaluation import ORIGINAL, GradedProblem, pass_at_k
from rlhf.report import printable, show_estimate
from rlhf.uncertainty import difference, share, sign_flip_test

MOST_SUBSETS = 2_000
"""Choices of n samples up to which a vote is counted over all of them; beyond, over as many drawn with a fixed seed."""

# -------------------------------------------------------------------------------------------------------------- of one problem


def best_of_n(scores: Sequence[float], correct: Sequence[bool], n: int) -> float:
    """Chance that the highest-scored of n samples is correct, over all choices of n of the N samples.

        Σ over distinct scores s:  (C(N - a, n) - C(N - b, n)) / C(N, n) · (share of the samples with score s that are correct)

    with a samples above s and b at s or above it: the chance that the highest score among the n is s. A tie is broken at random.

    Raises:
        ValueError: when there are fewer samples than n, or a score is not a finite number.
    """
    _require_samples(len(scores), n)
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"a score is {next(s for s in scores if not math.isfinite(s))}; a sample needs a finite one")
    total, above = len(scores), 0
    expected = 0.0
    for score in sorted(set(scores), reverse=True):
        tied = [right for s, right in zip(scores, correct, strict=True) if s == score]
        chance = math.comb(total - above, n) - math.comb(total - above - len(tied), n)
        expected += chance * sum(tied) / len(tied)
        above += len(tied)
    return expected / math.comb(total, n)


def majority_of_n(
    answers: Sequence[str | None],
    correct: Sequence[bool],
    n: int,
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> float:
    """Chance that the answer with the most weight among n samples is correct, over choices of n of the N samples.

    The weight of an answer is the sum over the samples that give it (https://arxiv.org/abs/2206.14858 for plain votes,
    https://arxiv.org/abs/2211.14275 for weights from a reward model); a tie is broken at random, a sample without an answer
    does not vote. Exact while there are at most `MOST_SUBSETS` choices, else the mean over that many drawn with `seed`.

    Args:
        answers: [N] what each sample votes for.
        correct: [N] whether it is right.
        n: samples that vote.
        weights: [N] of each vote, not negative; 1 by default.
        seed: of the choices, where they are drawn.

    Raises:
        ValueError: when there are fewer samples than n, or a weight is negative or not finite.
    """
    _require_samples(len(answers), n)
    weight = np.asarray(weights if weights is not None else [1.0] * len(answers), dtype=np.float64)
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError(f"the weights of votes are {weight.min():g} to {weight.max():g}; they must be 0 or more")
    classes = sorted({a for a in answers if a is not None})
    if not classes:
        return 0.0
    votes = np.array([[w * (a == c) for c in classes] for a, w in zip(answers, weight, strict=True)])  # [N, C]
    right = np.array([dict(zip(answers, correct, strict=True))[c] for c in classes], dtype=np.float64)  # [C]
    totals = votes[choices(len(answers), n, seed=seed)].sum(1)  # [choices, C]
    highest = totals.max(1, keepdims=True)
    winners = (totals >= highest * (1 - 1e-12)) & (highest > 0)  # sums of the same weights in another order are a tie
    return float((winners @ right / np.maximum(winners.sum(1), 1)).mean())


def choices(total: int, n: int, *, seed: int = 0) -> NDArray[np.int64]:
    """[choices, n] all choices of n of `total` samples, or `MOST_SUBSETS` random ones where there are more."""
    if math.comb(total, n) <= MOST_SUBSETS:
        return np.array(list(combinations(range(total), n)), dtype=np.int64)
    generator = np.random.default_rng([seed, total, n])
    return generator.random((MOST_SUBSETS, total)).argpartition(n - 1, axis=1)[:, :n]


def _require_samples(total: int, n: int) -> None:
    if not 1 <= n <= total:
        raise ValueError(f"choosing among {n} samples of a problem needs as many and there are {total}")


def ordered_pairs(scores: Sequence[float], correct: Sequence[bool]) -> float | None:
    """Share of the pairs of a correct and a wrong sample in which the correct one scores higher, a tie half; None where there is no such pair.

    It is the accuracy of a reward model on preference pairs made of the policy's own samples of a problem.
    """
    right = [s for s, c in zip(scores, correct, strict=True) if c]
    wrong = [s for s, c in zip(scores, correct, strict=True) if not c]
    if not right or not wrong:
        return None
    return sum((r > w) + 0.5 * (r == w) for r in right for w in wrong) / (len(right) * len(wrong))


# ---------------------------------------------------------------------------------------------------------------- of one model

PASS, MAJORITY, BEST, WEIGHTED = "pass", "majority", "best by ", "weighted by "


def methods_of(scorers: Sequence[str]) -> list[str]:
    """The ways to an answer: any correct sample (a bound), the vote, and for each reward model its best sample and its weighted vote."""
    return [PASS, MAJORITY, *(BEST + s for s in scorers), *(WEIGHTED + s for s in scorers)]


def chance_correct(problem: GradedProblem, method: str, n: int, *, seed: int) -> float:
    """Chance that `method` picks a correct answer from n samples of the problem, over the choices of n of all its samples."""
    if method == PASS:
        return pass_at_k(len(problem.correct), sum(problem.correct), n)
    if method == MAJORITY:
        return majority_of_n(problem.answers, problem.correct, n, seed=seed)
    scores = problem.scores[method.removeprefix(BEST).removeprefix(WEIGHTED)]
    if method.startswith(BEST):
        return best_of_n(scores, problem.correct, n)
    return majority_of_n(problem.answers, problem.correct, n, scores, seed=seed)


def summarise_selection(problems: Sequence[GradedProblem], *, ns: Sequence[int], seed: int) -> dict[str, Any]:
    """Accuracy of every method over n, and at the largest n the paired difference of every two, each with its interval.

    A problem with an undecided sample is left out as a whole, as in pass@1; so are perturbed ones.
    """
    judged = [p for p in problems if p.variant == ORIGINAL and p.is_judged]
    if not judged:
        raise ValueError("no problem was judged as a whole, so there is nothing to choose from; see the card's reasons")
    samples = len(judged[0].verdicts)
    values = {
        method: {n: [chance_correct(p, method, n, seed=seed) for p in judged] for n in ns}
        for method in methods_of(list(judged[0].scores))
    }
    most = max(ns)
    compared = {"pass@1": [p.accuracy for p in judged], **{m: v[most] for m, v in values.items() if m != PASS}}
    return {
        "ns": list(ns),
        "samples_per_problem": samples,
        "accuracy": {m: {f"{n}": asdict(share(v[n], samples=samples)) for n in ns} for m, v in values.items()},
        "ordered_pairs": {scorer: _ordered(judged, scorer) for scorer in judged[0].scores},
        "differences": [
            {"method": b, "than": a, "samples": most, **_paired(compared[a], compared[b], seed=seed)}
            for a, b in combinations(compared, 2)
        ],
    }


def _ordered(problems: Sequence[GradedProblem], scorer: str) -> dict[str, Any] | None:
    """Over the problems that have both a correct and a wrong sample."""
    shares = [ordered_pairs(p.scores[scorer], p.correct) for p in problems]
    both = [s for s in shares if s is not None]
    return asdict(share(both)) if both else None


def _paired(baseline: Sequence[float], other: Sequence[float], *, seed: int) -> dict[str, Any]:
    changes = [b - a for a, b in zip(baseline, other, strict=True)]
    return {**asdict(difference(changes)), "p_value": sign_flip_test(changes, seed=seed).p_value}


# --------------------------------------------------------------------------------------------------------------- for people


def selection_table(label: str, selection: Mapping[str, Any]) -> str:
    """Accuracy over n as lines of text, and what sets the methods apart."""
    ns = selection["ns"]
    rows = [(f"{label}, n =", *(f"{n}" for n in ns))]
    rows += [(m, *(show_estimate(v[f"{n}"]) for n in ns)) for m, v in selection["accuracy"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for scorer, ordered in selection["ordered_pairs"].items():
        shown = f"{show_estimate(ordered)} over {ordered['n']} problems" if ordered else "-"
        lines.append(f"{scorer}, a correct sample above a wrong one of the same problem: {shown}")
    for d in selection["differences"]:
        lines.append(
            f"{d['method']} - {d['than']}, n = {d['samples']}: {show_estimate(d, signed=True)}, p = {d['p_value']:.2g}"
        )
    return "\n".join(lines)


def draw_selection(selections: Mapping[str, Mapping[str, Any]], picture: Path) -> None:
    """A PNG: accuracy over n of every method with its 95 % band, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(selections), figsize=(6.5 * len(selections), 5), layout="constrained", squeeze=False
    )
    for axis, (label, selection) in zip(axes[0], selections.items(), strict=True):
        ns = selection["ns"]
        for i, (method, accuracy) in enumerate(selection["accuracy"].items()):
            estimates = [accuracy[f"{n}"] for n in ns]
            dashed = method == PASS or method.startswith(WEIGHTED)
            axis.plot(
                ns,
                [e["mean"] for e in estimates],
                marker="o",
                color=f"C{i}",
                linestyle="--" if dashed else "-",
                label="pass@n (a bound)" if method == PASS else method,
            )
            axis.fill_between(
                ns, [e["low"] for e in estimates], [e["high"] for e in estimates], color=f"C{i}", alpha=0.12
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(ns, [f"{n}" for n in ns])
        axis.set_xlabel("samples to choose from")
        axis.set_ylabel("accuracy")
        axis.set_title(f"{printable(label)}: {selection['accuracy'][MAJORITY][f'{ns[0]}']['n']} problems", fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
