"""Problems with worked solutions: the forms of OpenR1-Math (several generations, some verified) and NuminaMath (one solution)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.records import Demonstration
from data.sources import Source, last_boxed, split_thoughts, text

NO_ANSWER = ("proof", "notfound")
"""What NuminaMath-1.5 writes where a problem has no answer to compare with."""


def from_openr1(row: Mapping[str, Any], key: str) -> list[Demonstration]:
    """The first generation that is complete and was verified as correct, verbatim.

    Raises:
        ValueError: when none is.
    """
    generations = row.get("generations")
    if not isinstance(generations, list) or not all(isinstance(g, str) for g in generations):
        raise ValueError(f"field 'generations' must be a list of texts, got {generations!r:.80}")
    complete = _flags(row, "is_reasoning_complete", len(generations), missing=True)
    by_rule = _flags(row, "correctness_math_verify", len(generations), missing=False)
    by_model = _flags(row, "correctness_llama", len(generations), missing=False)
    for generation, whole, *verified in zip(generations, complete, by_rule, by_model, strict=True):
        thoughts, said = split_thoughts(generation)
        if whole and any(verified) and thoughts and said:
            return [
                Demonstration(
                    id=key,
                    question=text(row, "problem"),
                    scratchpad=thoughts,
                    answer=text(row, "answer"),
                    response=generation.strip(),
                    subject=str(row.get("problem_type") or ""),
                )
            ]
    raise ValueError(f"none of its {len(generations)} generations is complete and verified as correct")


def _flags(row: Mapping[str, Any], name: str, length: int, *, missing: bool) -> list[bool]:
    flags = row.get(name)
    if flags is None:
        return [missing] * length
    if not isinstance(flags, list) or len(flags) != length or any(type(f) is not bool for f in flags):
        raise ValueError(f"field {name!r} must be a list of {length} bool, got {flags!r:.80}")
    return flags


def from_numina(row: Mapping[str, Any], key: str) -> list[Demonstration]:
    """The solution is the scratchpad; the answer is the field of that name, else the solution's last box.

    Raises:
        ValueError: when there is no answer, as for a proof.
    """
    solution = text(row, "solution")
    answer = text(row, "answer") if row.get("answer") else last_boxed(solution)
    if not answer or answer.lower() in NO_ANSWER:
        raise ValueError(
            "there is no answer to compare with: the problem asks for a proof, or the solution boxes nothing"
        )
    subject = str(row.get("problem_type") or row.get("source") or "")
    return [Demonstration(id=key, question=text(row, "problem"), scratchpad=solution, answer=answer, subject=subject)]


OPENR1 = Source(
    name="openr1_math",
    kind=Demonstration,
    convert=from_openr1,
    licence="Apache-2.0",
    files={"train": ("data/train-*.parquet", "train*.parquet", "*.jsonl")},
    repository="open-r1/OpenR1-Math-220k",
)
NUMINA = Source(
    name="numina_math",
    kind=Demonstration,
    convert=from_numina,
    licence="Apache-2.0 (NuminaMath-1.5), Apache-2.0 (NuminaMath-CoT)",
    files={"train": ("data/train-*.parquet", "train*.parquet", "*.jsonl")},
    repository="AI-MO/NuminaMath-1.5",
    revision="1b05109f9e5c1ad06c0663519502416c30b300f8",
)
