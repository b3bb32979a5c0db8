"""Minerva's 272 quantitative problems from MIT courses (https://arxiv.org/abs/2206.14858); the answer is boxed in the solution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.records import Problem
from data.sources import Source, answer_text, last_boxed, text


def to_problem(row: Mapping[str, Any], key: str) -> list[Problem]:
    solution = row.get("solution") or ""
    answer = answer_text(row, "answer") if "answer" in row else last_boxed(str(solution))
    if not answer:
        raise ValueError("the solution has no \\boxed{} to take the answer from")
    return [
        Problem(
            id=key,
            question=text(row, "problem", "question"),
            answer=answer,
            subject=str(row.get("type") or ""),
            solution=solution if isinstance(solution, str) else "",
        )
    ]


MINERVA = Source(
    name="minerva",
    kind=Problem,
    convert=to_problem,
    licence="MIT (packaging); courses by MIT OpenCourseWare",
    files={"test": ("minerva_math.jsonl", "test.jsonl", "**/test-*.parquet")},
    repository="math-ai/minervamath",
    note=", or evaluation/data/minerva_math/test.jsonl of QwenLM/Qwen2.5-Math on GitHub",
)
