"""MATH (https://arxiv.org/abs/2103.03874) and its 500 test problems held out by PRM800K (MATH-500)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.records import Problem
from data.sources import Source, answer_text, last_boxed, text


def level_of(row: Mapping[str, Any]) -> int:
    """`Level 3`, 3 or 3.0 as 3, 4.5 as 4; 0 where it is unknown (`Level ?`, null, or no number from 0 to 99)."""
    value = row.get("level", row.get("difficulty"))
    whole = str(value).removeprefix("Level ").partition(".")[0] if isinstance(value, str | int | float) else ""
    return int(whole) if whole.isdecimal() and len(whole) <= 2 else 0


def to_problem(row: Mapping[str, Any], key: str) -> list[Problem]:
    """The answer field where there is one, else the last box of the solution."""
    solution = row.get("solution") or ""
    if not isinstance(solution, str):
        raise ValueError(f"field 'solution' must be a text, got {solution!r:.80}")
    if "answer" in row:
        answer = answer_text(row, "answer")
    elif (answer := last_boxed(solution) or "") == "":
        raise ValueError("field 'answer' is missing and the solution has no \\boxed{} to take it from")
    unique = row.get("unique_id")
    return [
        Problem(
            id=f"math500-{unique}" if isinstance(unique, str) else key,
            question=text(row, "problem", "question"),
            answer=answer,
            level=level_of(row),
            subject=str(row.get("subject") or row.get("type") or ""),
            solution=solution,
        )
    ]


MATH = Source(
    name="math",
    kind=Problem,
    convert=to_problem,
    licence="MIT",
    files={
        "train": ("train.jsonl", "train_problem_answer.json", "data/train-*.parquet"),
        "test": ("test.jsonl", "data/test-*.parquet"),
    },
    repository="DigitalLearningGmbH/MATH-lighteval",
    revision="92ace7ed9c5f22d9148ea70c403948eae7bed2e8",
    note=", or hendrycks/math and any repackaging of it with the fields problem, solution (or answer), level and type",
)
MATH500 = Source(
    name="math500",
    kind=Problem,
    convert=to_problem,
    licence="MIT",
    files={"test": ("test.jsonl", "math500_test.jsonl")},
    repository="HuggingFaceH4/MATH-500",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
)
