"""The problems an evaluation asks: published benchmarks, the embedded task, or any JSONL with problem and answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from data.catalog import BENCHMARKS, read_benchmark
from data.records import Problem
from data.sources import Refused, read_source
from data.stories import generate_stories, to_problem

SIZES = {
    "gsm8k": 1319,
    "math500": 500,
    "math": 5000,
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
    "olympiadbench": 675,
    "minerva": 272,
    "stories": 500,
}
"""Problems of each benchmark as it was published; the folder of one may hold another's file under the same name."""
STORY_LEVELS = (3, 5)
"""Events of the embedded task's problems, as in recipes/tiny/prepare_data.yaml."""


def known_benchmarks() -> list[str]:
    return [*BENCHMARKS, "stories"]


def size_of(name: str) -> int:
    """Problems of a published benchmark.

    Raises:
        ValueError: for an unknown one, or a form of file that anyone may have.
    """
    if name not in SIZES:
        known = f"known: {', '.join(SIZES)}"
        raise ValueError(
            f"benchmark {name!r} has no published size; {known}"
            if name in BENCHMARKS
            else f"unknown benchmark {name!r}; {known}"
        )
    return SIZES[name]


def read_problems(name: str, *, path: str | None, revision: str | None) -> tuple[list[Problem], list[Refused]]:
    """(problems, refused rows) of a benchmark, in the order of its file.

    Raises:
        ValueError: for an unknown name, for files that are not there, and when the file holds another number of rows than was published.
    """
    if name == "stories":
        low, high = STORY_LEVELS
        told = generate_stories("test", seed=0, min_level=low, max_level=high)
        return [to_problem(story) for story in islice(told, SIZES[name])], []
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(known_benchmarks())}")
    if name == "gsm8k":
        problems, refused = _with_calculator_marks(path=path, revision=revision)
    else:
        problems, refused = read_benchmark(name, path=path, revision=revision)
    rows = len(problems) + len(refused)
    if name in SIZES and rows != SIZES[name]:
        raise ValueError(
            f"benchmark {name} has {SIZES[name]} problems and {path or 'the hub'} gave {rows}; "
            "set benchmark.path to the file itself, or name it jsonl to evaluate on these"
        )
    return problems, refused


def _with_calculator_marks(*, path: str | None, revision: str | None) -> tuple[list[Problem], list[Refused]]:
    """GSM8K with the `<<a*b=c>>` marks left in its solutions, by which data/perturbation.py follows changed numbers to the answer."""
    source = BENCHMARKS["gsm8k"]

    def convert(row: Mapping[str, Any], id: str) -> list[Problem]:
        return [replace(p, solution=row["answer"]) for p in source.convert(row, id) if isinstance(p, Problem)]

    return read_source(replace(source, convert=convert), path=path, revision=revision, split=source.default_split)
