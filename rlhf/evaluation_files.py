"""What an evaluation leaves in its folder, read back: samples, cards, and two of them compared."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.card import show_contamination
from rlhf.evaluation import GradedProblem, compare
from rlhf.report import show_estimate, show_test

RELEVANT = (
    "prompt.template",
    "prompt.system_prompt",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.max_new_tokens",
    "sampling.samples_per_prompt",
    "grader.version",
    "grader.source",
    "grader.accept",
    "grader.truncated",
    "engine.name",
)
"""Entries of two cards that should be equal for the difference to be the models'."""


def write_samples(file: Path, problems: Sequence[GradedProblem]) -> None:
    """One problem a line, whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        for problem in problems:
            # ASCII, so that no terminal obeys a control character when the file is printed
            out.write(json.dumps(asdict(problem), ensure_ascii=True) + "\n")
    os.replace(temporary, file)


def read_samples(file: Path) -> list[GradedProblem]:
    """The problems of a samples file.

    Raises:
        ValueError: naming the file, and the line that is not as it should be.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist; run scripts/evaluate.py first")
    problems = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                problems.append(GradedProblem.from_row(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file}:{number}: {error}") from None
    if not problems:
        raise ValueError(f"{file} holds no samples")
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One model's samples and card."""

    name: str
    problems: list[GradedProblem]
    card: dict[str, Any]


def read_evaluated(place: str) -> Evaluated:
    """A model's evaluation from `FOLDER`, or `FOLDER:LABEL` where the folder holds several; the last one by default.

    Raises:
        ValueError: when there is none; names the labels there are.
    """
    folder, label = Path(place), ""
    if not folder.is_dir() and ":" in place:
        head, _, label = place.rpartition(":")
        folder = Path(head)
    results = folder / "results.json"
    if not results.is_file():
        raise ValueError(f"{place} holds no finished evaluation (no results.json); run scripts/evaluate.py first")
    labels = list(json.loads(results.read_text(encoding="utf-8"))["models"])
    label = label or labels[-1]
    if label not in labels:
        raise ValueError(f"{folder} has no model {label!r}; it has {', '.join(labels)}")
    card = folder / f"card.{label}.json"
    return Evaluated(
        name=f"{folder.name}:{label}",
        problems=read_samples(folder / f"samples.{label}.jsonl"),
        card=json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {},
    )


def compare_evaluations(baseline: Evaluated, other: Evaluated) -> dict[str, Any]:
    """Figures of both, their paired difference, and what else differs between them."""
    return {
        "baseline": {"name": baseline.name, "pass_at_1": baseline.card.get("scores", {}).get("pass_at_1")},
        "other": {"name": other.name, "pass_at_1": other.card.get("scores", {}).get("pass_at_1")},
        "difference": compare(baseline.problems, other.problems, seed=0),
        "not_alike": [
            f"{key} is {_at(baseline.card, key)!r} there and {_at(other.card, key)!r} here"
            for key in RELEVANT
            if _at(baseline.card, key) != _at(other.card, key)
        ],
        "contamination": show_contamination(other.card.get("contamination")),
    }


def _at(card: dict[str, Any], key: str) -> Any:
    block, _, name = key.partition(".")
    return card.get(block, {}).get(name)


def comparison_text(compared: dict[str, Any]) -> str:
    """The comparison as lines of text."""
    difference = compared["difference"]
    lines = [
        f"{side['name']}: pass@1 {show_estimate(side['pass_at_1'])}"
        for side in (compared["baseline"], compared["other"])
        if side["pass_at_1"]
    ]
    lines += [
        f"paired difference over {difference['n']} problems: {show_estimate(difference, signed=True)}",
        f"  by bootstrap: [{difference['bootstrap']['low']:+.3f}, {difference['bootstrap']['high']:+.3f}]; "
        f"{difference['better']} problems better, {difference['worse']} worse",
        show_test(difference),
    ]
    if difference["detectable"] is not None and difference["p_value"] > 0.05:
        lines.append("no difference is shown; one smaller than that would not have been either")
    lines += [f"not alike: {line}" for line in compared["not_alike"]]
    lines.append(f"contamination: {compared['contamination']}")
    return "\n".join(lines)
