"""Any file of questions with reference answers, under the field names in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.hendrycks_math import level_of
from data.records import Problem
from data.sources import Source, answer_text, text


def to_problem(row: Mapping[str, Any], key: str) -> list[Problem]:
    own = row.get("id")
    subject, solution, pass_rate = row.get("subject"), row.get("solution"), row.get("pass_rate")
    return [
        Problem(
            id=str(own) if isinstance(own, str | int) and str(own).strip() else key,
            question=text(row, "problem", "question", "prompt"),
            answer=answer_text(row, "answer", "expected_answer", "reference", "final_answer"),
            level=level_of(row),
            subject=subject if isinstance(subject, str) else "",
            solution=solution if isinstance(solution, str) else "",
            pass_rate=pass_rate if isinstance(pass_rate, float) else None,
        )
    ]


QUESTIONS = Source(
    name="jsonl",
    kind=Problem,
    convert=to_problem,
    licence="as the file's owner states it",
    files={"train": ("*.jsonl", "*.parquet", "*.json")},
    note=" with the fields problem (or question) and answer",
)
