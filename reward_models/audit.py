"""Whom a reward favours: every component's mean in each group of completions, and its gap to the rest, with intervals.

A group is what shares a value of a column: of the data (subject, level, pass_rate) or of the completion (verdict, finish_reason). The unit
is the prompt, as in an evaluation: samples of one prompt are averaged before anything is resampled. A completion that a component does
not apply to, or that is undecided, is no observation of it; how many are is reported beside the mean. Groups of a column of completions share prompts, whose two sides are
resampled apart from each other: that makes the intervals of their gaps wider, not narrower, where samples of a prompt resemble each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rlhf.completions import Row
from rlhf.config import nearest
from rlhf.report import show_estimate
from rlhf.uncertainty import Estimate, bootstrap, bootstrap_gap

OF_COMPLETIONS = ("verdict", "finish_reason")
"""Columns of a completion itself."""
TOTAL = "total"
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One component in one group."""

    group: str
    component: str
    raw: Estimate | None
    """Mean raw value over prompts; None for the total, and where no completion has one."""
    weighted: Estimate | None
    """Mean of what it adds to the reward."""
    gap: Estimate | None
    """Of `weighted`, this group's mean minus that of all other completions; None where either has none."""
    completions: int
    """Of the group."""
    applies: float
    """Share of the group's decided completions that the component has a value for."""
    undecided: float
    """Share of the group's completions without a reward."""


def audit(rows: Iterable[Row], column: str, *, seed: int = 0) -> list[Finding]:
    """Every component in every group of `column`, groups in order; the total first.

    Raises:
        ValueError: when the completions do not have the column; names those they have.
    """
    rows = list(rows)
    known: list[str] = sorted({str(name) for row in rows for name in row["columns"]} | set(OF_COMPLETIONS))
    if column not in known:
        raise ValueError(f"the completions have no column {column!r}; {nearest(column, known)}")
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[column] if column in OF_COMPLETIONS else row["columns"].get(column, "")].append(row)
    names = dict.fromkeys(name for row in rows for name in row["components"])
    findings = []
    for value in sorted(groups, key=lambda value: (isinstance(value, str), value)):
        own = groups[value]
        rest = [row for other, of_other in groups.items() if other != value for row in of_other]
        findings += [_finding(str(value), name, own, rest, seed) for name in (TOTAL, *names)]
    return findings


def _finding(group: str, name: str, own: Sequence[Row], rest: Sequence[Row], seed: int) -> Finding:
    decided = [row for row in own if row["value"] is not None]
    having = [row for row in decided if name == TOTAL or name in row["weighted"]]
    raw = [] if name == TOTAL else per_prompt(decided, lambda row: row["components"].get(name))
    here, there = (per_prompt(some, lambda row: _added(row, name)) for some in (own, rest))
    return Finding(
        group=group,
        component=name,
        raw=bootstrap(raw, seed=seed) if raw else None,
        weighted=bootstrap(here, seed=seed) if here else None,
        gap=bootstrap_gap(here, there, seed=seed) if here and there else None,
        completions=len(own),
        applies=len(having) / len(decided) if decided else 0.0,
        undecided=1 - len(decided) / len(own),
    )


def _added(row: Row, name: str) -> float | None:
    return row["value"] if name == TOTAL else row["weighted"].get(name)


def per_prompt(rows: Sequence[Row], value: Any) -> list[float]:
    """One mean for each prompt that has any value, by the order in which prompts come."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found = value(row)
        if found is not None:
            values[row["prompt"]].append(found)
    return [fmean(of_prompt) for of_prompt in values.values()]


def audit_table(findings: Sequence[Finding], column: str) -> str:
    """The findings as lines of text; a star marks a gap whose interval leaves 0 out."""

    def show(estimate: Estimate | None, *, signed: bool = False) -> str:
        return "-" if estimate is None else show_estimate(asdict(estimate), signed=signed)

    head = (column, "component", "raw", "weighted", "gap to the rest", "applies", "undecided", "prompts")
    rows = [head] + [
        (
            f.group,
            f.component,
            show(f.raw),
            show(f.weighted),
            show(f.gap, signed=True) + (" *" if f.gap is not None and stands_out(f.gap) else ""),
            f"{f.applies:.0%}",
            f"{f.undecided:.0%}",
            str(f.weighted.n if f.weighted else 0),
        )
        for f in findings
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    gaps = sum(f.gap is not None for f in findings)
    note = f"95 % bootstrap intervals over prompts. Of {gaps} gaps, {gaps / 20:.1f} would leave 0 out by chance alone if there were none."
    return "\n".join([*lines, note])


def stands_out(gap: Estimate) -> bool:
    """Whether 0 is outside the interval of a gap, by more than rounding."""
    return gap.low > ROUNDING or gap.high < -ROUNDING


def to_rows(findings: Sequence[Finding]) -> list[Mapping[str, Any]]:
    """For a JSON file."""
    return [asdict(finding) for finding in findings]
