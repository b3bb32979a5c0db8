"""This project's grader inside lm-evaluation-harness. Install this project beside it, or set PYTHONPATH to the repository."""

from __future__ import annotations

from typing import Any

from reward_models.grading import GraderPool

_POOL = GraderPool(workers=1)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The harness calls it with a problem and the one completion of it. What cannot be judged is reported, and never as wrong alone."""
    (grade,) = _POOL.grade_many([(results[0], doc["answer"])])
    return {"correct": float(grade.verdict == "correct"), "undecided": float(grade.verdict == "undecided")}
