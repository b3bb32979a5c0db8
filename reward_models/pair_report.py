"""What held-out preference pairs say of a reward model: is its confidence justified, where is it right, and does it like length?

Intervals are over pairs (rlhf/uncertainty.py). A tie of the two scores is half right, as a coin would be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.report import printable, show_estimate
from rlhf.uncertainty import CONFIDENCE, Estimate, difference, share

BINS = 10
RESAMPLES = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair:
    """A held-out pair with the model's scores."""

    chosen: float
    rejected: float
    chosen_length: int
    """Tokens of the response, the prompt aside."""
    rejected_length: int
    source: str = ""

    @property
    def right(self) -> float:
        return 1.0 if self.chosen > self.rejected else 0.5 if self.chosen == self.rejected else 0.0

    @property
    def confidence(self) -> float:
        """Chance that the model gives to the response it prefers, sigmoid(|r_chosen - r_rejected|) (Bradley and Terry 1952)."""
        return 1 / (1 + math.exp(-abs(self.chosen - self.rejected)))


def accuracy(pairs: Sequence[ScoredPair]) -> Estimate:
    """Share of the pairs whose chosen response scores higher."""
    return share([pair.right for pair in pairs])


def calibration(pairs: Sequence[ScoredPair], *, bins: int = BINS) -> list[dict[str, Any]]:
    """The calibration curve: for each bin of equal width in [0.5, 1] that holds pairs, predicted confidence and observed accuracy.

    A pair told the other way round has one minus both figures, so the half from 0.5 up is the whole curve.
    """
    bin_of = [min(int((pair.confidence - 0.5) * 2 * bins), bins - 1) for pair in pairs]
    groups = [[pair for pair, b in zip(pairs, bin_of, strict=True) if b == i] for i in range(bins)]
    return [
        {"predicted": math.fsum(p.confidence for p in group) / len(group), "observed": asdict(accuracy(group))}
        for group in groups
        if group
    ]


def expected_calibration_error(curve: Sequence[Mapping[str, Any]]) -> float:
    """Σ_b n_b / n |predicted_b - observed_b| (https://arxiv.org/abs/1706.04599, eq. 3)."""
    total = sum(b["observed"]["n"] for b in curve)
    return sum(b["observed"]["n"] * abs(b["predicted"] - b["observed"]["mean"]) for b in curve) / total


def by_source(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    return {
        source or "(none)": asdict(accuracy([p for p in pairs if p.source == source]))
        for source in sorted({p.source for p in pairs})
    }


def by_length(pairs: Sequence[ScoredPair], *, groups: int = 4) -> dict[str, Any]:
    """Accuracy of the shortest quarter of the pairs to the longest, by the mean length of their two responses."""
    lengths = np.array([(p.chosen_length + p.rejected_length) / 2 for p in pairs])
    edges = np.unique(np.quantile(lengths, np.arange(1, groups + 1) / groups, method="inverted_cdf"))
    group_of = np.searchsorted(edges, lengths)
    found = {}
    for g, edge in enumerate(edges):
        group = [p for p, i in zip(pairs, group_of, strict=True) if i == g]
        found[f"up to {edge:g} tokens"] = asdict(accuracy(group))
    return found


def length_bias(pairs: Sequence[ScoredPair], *, seed: int = 0) -> dict[str, Any]:
    """How the scores go with length: correlations, accuracy where length points the other way, and how often the longer one is preferred.

    `preferred - chosen` is above 0 for a model that likes length more than the pairs do.
    """
    scores = np.array([(p.chosen, p.rejected) for p in pairs])
    lengths = np.array([(p.chosen_length, p.rejected_length) for p in pairs], dtype=np.float64)
    uneven = [p for p in pairs if p.chosen_length != p.rejected_length]
    shorter = [p for p in uneven if p.chosen_length < p.rejected_length]
    longer = [p for p in uneven if p.chosen_length > p.rejected_length]
    even = [p for p in pairs if p.chosen_length == p.rejected_length]
    likes_longer = [p.right if p.chosen_length > p.rejected_length else 1 - p.right for p in uneven]
    is_longer = [float(p.chosen_length > p.rejected_length) for p in uneven]
    return {
        "score_and_length": correlation(scores, lengths, seed=seed),
        "difference_of_scores_and_of_lengths": correlation(
            scores[:, :1] - scores[:, 1:], lengths[:, :1] - lengths[:, 1:], seed=seed
        ),
        "chosen_shorter": _accuracy_or_none(shorter),
        "chosen_longer": _accuracy_or_none(longer),
        "same_length": _accuracy_or_none(even),
        "longer_is_preferred": asdict(share(likes_longer)) if uneven else None,
        "longer_is_chosen": asdict(share(is_longer)) if uneven else None,
        "preferred - chosen": (
            asdict(difference([a - b for a, b in zip(likes_longer, is_longer, strict=True)])) if uneven else None
        ),
    }


def _accuracy_or_none(pairs: Sequence[ScoredPair]) -> dict[str, Any] | None:
    return asdict(accuracy(pairs)) if pairs else None


def correlation(x: NDArray[np.float64], y: NDArray[np.float64], *, seed: int = 0) -> dict[str, Any] | None:
    """Pearson's correlation of [N, K] with [N, K], and its percentile bootstrap interval over the N pairs; None where one is constant.

    Returns:
        mean, low, high, n.
    """
    n = len(x)
    sums = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1).sum(1)  # [N, 6]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) @ sums
    found = _pearson(np.vstack([sums.sum(0), draws]))
    if not np.isfinite(found[0]):
        return None
    low, high = np.nanquantile(found[1:], ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return asdict(Estimate(float(found[0]), float(low), float(high), n))


def _pearson(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """[R] correlations from [R, 6] sums of 1, x, y, xx, yy, xy; NaN where x or y is constant."""
    n, x, y, xx, yy, xy = sums.T
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-12 * n**4, (n * xy - x * y) / np.sqrt(spread), np.nan)


def report(pairs: Sequence[ScoredPair], *, seed: int = 0) -> dict[str, Any]:
    """All of it, as plain values for a JSON file."""
    curve = calibration(pairs)
    return {
        "interval": asdict(accuracy(pairs)),
        # -log sigmoid(d); a model that knows nothing has ln 2 = 0.693
        "loss": float(np.logaddexp(0.0, [p.rejected - p.chosen for p in pairs]).mean()),
        "calibration": curve,
        "calibration_error": expected_calibration_error(curve),
        "by_source": by_source(pairs),
        "by_length": by_length(pairs),
        "length_bias": length_bias(pairs, seed=seed),
    }


# --------------------------------------------------------------------------------------------------------------- for people


def report_table(found: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    bias = found["length_bias"]
    rows: list[tuple[str, Mapping[str, Any] | None]] = [("accuracy", found["interval"])]
    if len(found["by_source"]) > 1:
        rows += [(f"  {printable(source)}", e) for source, e in found["by_source"].items()]
    rows += [(f"  {name}", e) for name, e in found["by_length"].items()]
    rows += [(f"  {name}", bias[key]) for name, key in _WHERE.items()]
    rows += [("correlation of score and length", bias["score_and_length"])]
    rows += [("  of their differences within a pair", bias["difference_of_scores_and_of_lengths"])]
    rows += [("longer one preferred - longer one chosen", bias["preferred - chosen"])]
    width = max(len(name) for name, _ in rows)
    signed = ("correlation", "  of their", "longer one")
    lines = [
        f"{name:{width}}  {show_estimate(dict(e), signed=name.startswith(signed))} over {e['n']:,}"
        if e
        else f"{name:{width}}  -"
        for name, e in rows
    ]
    lines.append(f"{'loss, ln 2 = 0.693 for none':{width}}  {found['loss']:.3f}")
    lines.append(f"{'expected calibration error':{width}}  {found['calibration_error']:.3f}")
    return "\n".join(lines)


_WHERE = {
    "chosen one shorter": "chosen_shorter",
    "chosen one longer": "chosen_longer",
    "of the same length": "same_length",
}


def draw_report(pairs: Sequence[ScoredPair], found: Mapping[str, Any], picture: Path) -> None:
    """A PNG: calibration curve, accuracy by source and by length, score against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    axis, curve = axes[0, 0], found["calibration"]
    axis.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", linewidth=1, label="calibrated")
    axis.errorbar(
        [b["predicted"] for b in curve],
        [b["observed"]["mean"] for b in curve],
        yerr=_bars([b["observed"] for b in curve]),
        marker="o",
        capsize=3,
        label=f"expected calibration error {found['calibration_error']:.3f}",
    )
    axis.set(xlabel="predicted: sigmoid of the score difference", ylabel="observed share", title="calibration")
    axis.legend(fontsize=9)
    bias = {name: found["length_bias"][key] for name, key in _WHERE.items() if found["length_bias"][key]}
    for axis, title, groups in (
        (axes[0, 1], "accuracy by source", found["by_source"]),
        (axes[1, 0], "accuracy by length", found["by_length"] | bias),
    ):
        means = [e["mean"] for e in groups.values()]
        axis.barh(range(len(groups)), means, xerr=_bars(list(groups.values())), color="tab:blue", alpha=0.6, capsize=3)
        names = [f"{printable(name):.40} ({e['n']:,})" for name, e in groups.items()]
        axis.set_yticks(range(len(groups)), names, fontsize=9, parse_math=False)
        axis.axvline(0.5, color="gray", linestyle="--", linewidth=1)
        axis.set(xlim=(0, 1), title=title)
        axis.invert_yaxis()
    axis, correlated = axes[1, 1], found["length_bias"]["score_and_length"]
    for name, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
        lengths = [getattr(p, f"{name}_length") for p in pairs]
        axis.scatter(lengths, [getattr(p, name) for p in pairs], s=6, alpha=0.4, color=color, label=name)
    shown = show_estimate(correlated, signed=True) if correlated else "none: one of them is constant"
    axis.set(xlabel="tokens of the response", ylabel="score", title=f"correlation {shown}")
    axis.legend(fontsize=9)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _bars(estimates: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    return [[e["mean"] - e["low"] for e in estimates], [e["high"] - e["mean"] for e in estimates]]
