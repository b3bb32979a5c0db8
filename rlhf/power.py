"""What an evaluation will be able to show, before it is run: the interval of a score and the smallest difference, by samples a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.uncertainty import Spread, detectable_difference, half_width


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """A row of the table."""

    samples: int
    interval: float
    """Half the length of a score's 95 % interval."""
    detectable: float
    """True difference between two models that is seen 4 times in 5."""


def designs(problems: int, samples: Sequence[int], spread: Spread, correlation: float) -> list[Design]:
    """One design for each number of samples a problem."""
    return [
        Design(
            samples=k,
            interval=half_width(spread.of_a_score(k), problems),
            detectable=detectable_difference(spread.of_a_difference(k, correlation), problems),
        )
        for k in samples
    ]


def power_text(name: str, problems: int, k: int, spread: Spread, correlation: float, basis: str) -> str:
    """The table, with the asked number of samples marked."""
    rows = designs(problems, sorted({1, 4, 16, 64, k}), spread, correlation)
    limit = designs(problems, [10**9], spread, correlation)[0]
    lines = [
        f"{name}: {problems} problems; {basis}",
        f"variance between problems {spread.between:.4f}, of one sample {spread.within:.4f}, correlation of two models {correlation:.2f}",
        "",
        "samples a problem   95 % interval of a score   difference seen 4 times in 5",
    ]
    lines += [
        f"{row.samples:>17,}   ± {row.interval:<24.3f} {row.detectable:.3f}{'   <- asked' if row.samples == k else ''}"
        for row in rows
    ]
    lines.append(f"{'without end':>17}   ± {limit.interval:<24.3f} {limit.detectable:.3f}")
    if limit.detectable > 0.05:
        lines += ["", "No number of samples makes up for few problems: add benchmarks to see smaller differences."]
    return "\n".join(lines)
