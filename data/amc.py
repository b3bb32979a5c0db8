"""AMC 12 of 2023: the 40 problems whose answer is a whole number. It is stored as a float there (27.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.records import Problem
from data.sources import Source, answer_text, text


def to_problem(row: Mapping[str, Any], key: str) -> list[Problem]:
    return [Problem(id=key, question=text(row, "problem", "question"), answer=answer_text(row, "answer"))]


AMC23 = Source(
    name="amc23",
    kind=Problem,
    convert=to_problem,
    licence="MIT (packaging); problems by the MAA",
    files={"test": ("amc23.jsonl", "test.jsonl", "**/test-*.parquet")},
    repository="math-ai/amc23",
    revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
    note=", or evaluation/data/amc23/test.jsonl of QwenLM/Qwen2.5-Math on GitHub",
)
