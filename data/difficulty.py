"""How hard each problem is for a policy: the share of its samples that are correct. Taken up again where it was killed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from data.records import Problem

PROBLEMS_PER_BATCH = 64
"""Measured at once, and lost at most when the run is killed."""


def annotate(
    problems: Iterator[Problem],
    judge: Callable[[list[Problem]], list[float | None]],
    store: Path,
    *,
    say: Callable[[str], None],
    problems_per_batch: int = PROBLEMS_PER_BATCH,
) -> dict[str, float | None]:
    """Pass rate by id; None where no sample could be judged, which is no statement about the policy.

    Args:
        problems: to be measured, ids unique.
        judge: pass rates of a list of problems, in order.
        store: JSON lines of what was measured; what is there already is not measured again.
        say: prints a line.
        problems_per_batch: given to `judge` at once.
    """
    rates = _read(store)
    if rates:
        say(f"{len(rates):,} pass rates were measured by an earlier run")
    todo = (problem for problem in problems if problem.id not in rates)
    with store.open("a", encoding="utf-8") as file:
        while batch := list(itertools.islice(todo, problems_per_batch)):
            measured = judge(batch)
            assert len(measured) == len(batch)
            for problem, rate in zip(batch, measured, strict=True):
                rates[problem.id] = rate
                file.write(json.dumps({"id": problem.id, "pass_rate": rate}) + "\n")
            file.flush()
            say(f"{len(rates):,} pass rates")
    return rates


def _read(store: Path) -> dict[str, float | None]:
    """What was measured so far; a last line cut off by a kill is measured again, and taken off the file."""
    if not store.is_file():
        return {}
    rates: dict[str, float | None] = {}
    whole = []
    for line in store.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        row = json.loads(line)
        rates[row["id"]] = row["pass_rate"]
        whole.append(line)
    store.write_text("".join(whole), encoding="utf-8")
    return rates


def pass_rate(verdicts: list[str]) -> float | None:
    """Share of the decided samples that are correct; None when none was decided."""
    decided = [verdict for verdict in verdicts if verdict != "undecided"]
    return sum(verdict == "correct" for verdict in decided) / len(decided) if decided else None
