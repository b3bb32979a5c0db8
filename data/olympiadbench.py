"""OlympiadBench (https://arxiv.org/abs/2402.14008): the English open-ended mathematics problems without pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.records import Problem
from data.sources import Source, text


def to_problem(row: Mapping[str, Any], key: str) -> list[Problem]:
    """Several final answers are joined by commas, as the source itself writes them within one. The unit stays out of the answer.

    Raises:
        ValueError: for a problem that refers to a picture, beside rows that are malformed.
    """
    if row.get("modality", "Text-only") != "Text-only" or any(row.get(f"image_{i}") for i in range(1, 6)):
        raise ValueError("the problem has pictures, and only text is read here")
    answers = row.get("final_answer")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(f"field 'final_answer' must be a list of texts, got {answers!r:.80}")
    solutions = row.get("solution") or []
    context = f"{row['context'].strip()}\n" if isinstance(row.get("context"), str) else ""
    return [
        Problem(
            id=f"olympiadbench-{row['id']}" if isinstance(row.get("id"), int) else key,
            question=context + text(row, "question"),
            answer=", ".join(answer.strip() for answer in answers),
            subject=str(row.get("subfield") or ""),
            solution="\n\n".join(s for s in solutions if isinstance(s, str)) if isinstance(solutions, list) else "",
        )
    ]


OLYMPIADBENCH = Source(
    name="olympiadbench",
    kind=Problem,
    convert=to_problem,
    licence="MIT (packaging), Apache-2.0 (data set)",
    files={
        "test": (
            "olympiadbench_oe_maths_en.jsonl",
            "test.jsonl",
            "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
        )
    },
    repository="Hothan/OlympiadBench",
    revision="91184b52131e7fc9455fef848035173aea8cc01a",
    note=", or evaluation/data/olympiadbench/test.jsonl of QwenLM/Qwen2.5-Math on GitHub",
)
