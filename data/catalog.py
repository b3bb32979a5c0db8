"""Sources by name. A new one is a file with a `Source` and a line here.

`load_benchmark(name, path=…, revision=…)` is what evaluation reads; `CATALOG` is what data recipes read.
"""

from __future__ import annotations

import logging

from data import gsm8k, stories
from data.aime import AIME24, AIME25, AIME_TRAIN
from data.amc import AMC23
from data.conversations import CHAT
from data.hendrycks_math import MATH, MATH500
from data.minerva import MINERVA
from data.olympiadbench import OLYMPIADBENCH
from data.preferences import HH_RLHF, PAIRS, ULTRAFEEDBACK
from data.questions import QUESTIONS
from data.records import Problem
from data.sources import Refused, Source, read_source
from data.steps import MATH_SHEPHERD, PRM800K, PRMBENCH, PROCESSBENCH, STEPWISE
from data.worked_solutions import NUMINA, OPENR1

logger = logging.getLogger(__name__)

SOURCES = {"stories": stories.prepare, "gsm8k": gsm8k.prepare}
"""Sources that yield everything a pipeline needs at once."""

_PROBLEMS = (gsm8k.GSM8K, MATH500, MATH, AIME24, AIME25, AMC23, OLYMPIADBENCH, MINERVA, QUESTIONS)
_DEMONSTRATIONS = (gsm8k.GSM8K_SOLUTIONS, OPENR1, NUMINA, CHAT)
_PAIRS = (HH_RLHF, ULTRAFEEDBACK, PAIRS)
_STEPS = (PRM800K, MATH_SHEPHERD, PROCESSBENCH, PRMBENCH, STEPWISE)

BENCHMARKS: dict[str, Source] = {source.name: source for source in _PROBLEMS}
CATALOG: dict[str, Source] = {s.name: s for s in (*_PROBLEMS, AIME_TRAIN, *_DEMONSTRATIONS, *_PAIRS, *_STEPS)}


def find(name: str, known: dict[str, Source]) -> Source:
    """Raises a ValueError that lists the known names when `name` is none of them."""
    if name not in known:
        raise ValueError(f"unknown source {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def read_benchmark(name: str, *, path: str | None, revision: str | None) -> tuple[list[Problem], list[Refused]]:
    """(problems, refused rows) of a benchmark's test split, in the order of its file.

    Raises:
        ValueError: for a name that is not in `BENCHMARKS`, and when its files are not there; says which there are and where to get them.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    source = BENCHMARKS[name]
    problems, refused = read_source(source, path=path, revision=revision, split=source.default_split)
    if not problems:
        reason = f": {refused[0].origin}: {refused[0].reason}" if refused else ""
        raise ValueError(f"benchmark {name} has no readable problem among {len(refused)} rows{reason}")
    return problems, refused


def load_benchmark(name: str, *, path: str | None, revision: str | None) -> list[Problem]:
    """The problems of a benchmark; a malformed row is left out, counted, and named in a warning with its file and line.

    Raises:
        ValueError: see `read_benchmark`.
    """
    problems, refused = read_benchmark(name, path=path, revision=revision)
    if refused:
        shown = "; ".join(f"{row.origin}: {row.reason}" for row in refused[:3])
        logger.warning(
            "benchmark %s: %d of %d rows refused (%s)", name, len(refused), len(refused) + len(problems), shown
        )
    return problems
