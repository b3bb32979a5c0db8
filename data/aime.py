"""American Invitational Mathematics Examination: 2024 and 2025 to evaluate on, 1983-2023 to train on. Answers are 0 to 999."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.hendrycks_math import level_of
from data.records import Problem
from data.sources import Source, answer_text, last_boxed, text


def to_problem(row: Mapping[str, Any], key: str) -> list[Problem]:
    """The answer without leading zeros: the examination writes 073, a model 73."""
    solution = row.get("solution") or row.get("reference_solution") or ""
    has_answer = any(name in row for name in ("answer", "expected_answer"))
    answer = answer_text(row, "expected_answer", "answer") if has_answer else last_boxed(str(solution)) or ""
    if not answer.isdecimal() or not 0 <= int(answer) <= 999:
        raise ValueError(f"the answer of an AIME problem is a whole number from 0 to 999, got {answer!r:.40}")
    year, exam, number = (row.get(name) for name in ("year", "aime_number", "problem_number"))
    return [
        Problem(
            id=f"aime-{year}-{exam}-{number}" if isinstance(year, int) and exam and number else key,
            question=text(row, "problem", "question"),
            answer=str(int(answer)),
            level=level_of(row),
            solution=solution if isinstance(solution, str) else "",
        )
    ]


def _source(name: str, repository: str | None, revision: str | None, *files: str, split: str) -> Source:
    return Source(
        name=name,
        kind=Problem,
        convert=to_problem,
        licence="MIT (packaging); problems by the MAA",
        files={split: files},
        repository=repository,
        revision=revision,
        note=", or the AIME files of QwenLM/Qwen2.5-Math, NVIDIA/NeMo-Skills or agentica-project/rllm on GitHub",
    )


AIME24 = _source(
    "aime24",
    "HuggingFaceH4/aime_2024",
    "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    "aime24.jsonl",
    "data/train-*.parquet",
    split="test",
)
AIME25 = _source(
    "aime25",
    "math-ai/aime25",
    "563bb8404243c5f09de6ec262f2db674fe5bce9b",
    "aime25.jsonl",
    "test.jsonl",
    "**/test-*.parquet",
    split="test",
)
AIME_TRAIN = _source("aime", None, None, "aime_1983_2023.json", "aime.json", split="train")
