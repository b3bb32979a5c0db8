"""What training took away: accuracy on named suites before and after, and whether that is too much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.config import ForgettingGate
from rlhf.report import show_estimate


def worst_suite(changes: Mapping[str, Mapping[str, float]]) -> str:
    """The suite whose paired change in accuracy is the lowest."""
    return min(changes, key=lambda name: changes[name]["mean"])


def refusals(changes: Mapping[str, Mapping[str, float]], gate: ForgettingGate) -> list[str]:
    """Why a model is refused, a sentence for each suite; empty when it is not.

    By `interval` a suite passes when its whole 95 % interval lies above -max_fall. A model passes when all suites do, so the chance that
    one which has forgotten more gets through is at most 2.5 %, however many suites there are.
    """
    bound = -gate.max_fall
    deciding = "low" if gate.decided_by == "interval" else "mean"
    return [
        f"{name} changed by {show_estimate(dict(change), signed=True)}, and its {'low end' if deciding == 'low' else 'mean'} is below {bound:+.3f}"
        + ("" if change["mean"] < bound else "; more problems would give a narrower interval")
        for name, change in changes.items()
        if change[deciding] < bound
    ]


def forgetting_table(suites: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: every suite before and after, with the paired change, and the worst of them below."""
    lines = ["| suite | problems | before | after | change |", "|---|---|---|---|---|"]
    for name, found in suites.items():
        change = found["change"]
        lines.append(
            f"| {name} | {change['n']} | {show_estimate(found['before'])} | {show_estimate(found['after'])} | {show_estimate(change, signed=True)} |"
        )
    worst = worst_suite({name: found["change"] for name, found in suites.items()})
    lines.append(
        f"\nworst case: {worst}, {show_estimate(suites[worst]['change'], signed=True)} (95 % intervals over problems; changes are paired)"
    )
    return "\n".join(lines)
