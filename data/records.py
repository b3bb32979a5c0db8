"""The four kinds of record every source becomes, and the JSONL files that hold them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from data.files import Unreadable, read_rows, slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question with a reference answer."""

    id: str
    question: str
    answer: str
    level: int = 0
    """Difficulty as the source grades it; 0 where it does not."""
    subject: str = ""
    """Field as the source names it; empty where it does not."""
    solution: str = ""
    """A worked solution, as the source has it."""
    pass_rate: float | None = None
    """Share of a policy's samples that were correct; None where it was not measured."""
    think: str = ""
    """Thinking budget that is put to the policy: off, short, long or a number of tokens (data/chat.py); empty for none."""

    def __post_init__(self) -> None:
        if not self.answer.strip():
            raise ValueError("field 'answer' is empty")
        _check_think(self.think)
        if self.pass_rate is not None and not 0 <= self.pass_rate <= 1:
            raise ValueError(f"field 'pass_rate' must be between 0 and 1, got {self.pass_rate}")

    @property
    def columns(self) -> dict[str, str | int | float]:
        """What rewards may depend on and be audited by."""
        measured = {} if self.pass_rate is None else {"pass_rate": self.pass_rate}
        budget = {"think": self.think} if self.think else {}
        return {"level": self.level, "subject": self.subject, **measured, **budget}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A question, a worked scratchpad (empty when the answer is given at once) and the answer."""

    id: str
    question: str
    scratchpad: str
    answer: str
    response: str = ""
    """What the assistant says, verbatim; empty where it is to be rendered from scratchpad and answer."""
    history: list[str] = field(default_factory=list)
    """Earlier turns, the user's and the assistant's alternating."""
    system: str = ""
    """A system prompt of the conversation's own."""
    subject: str = ""
    think: str = ""
    """Thinking budget that the scratchpad keeps to; empty for none."""
    sampler: str = ""
    """Which policy wrote it, its weights' checksum, seed and temperature; empty where none of ours did."""

    def __post_init__(self) -> None:
        if not self.answer.strip() and not self.response.strip():
            raise ValueError("field 'answer' is empty")
        _check_think(self.think)
        _check_history(self.history)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two responses to one question, the first one better."""

    id: str
    question: str
    chosen: str
    rejected: str
    error_step: int = -1
    """Index of the first wrong step of `rejected`; -1 where unknown."""
    history: list[str] = field(default_factory=list)
    """Earlier turns, the user's and the assistant's alternating."""
    system: str = ""
    """A system prompt of the conversation's own."""
    margin: float | None = None
    """By how much the first is better, in the source's own unit; None where it does not say."""
    source: str = ""
    """Where the pair is from, or what kind it is of; a reward model's accuracy is told for each."""
    chosen_finish: str = "stop"
    """`stop` where the assistant ended its turn, `length` where a limit cut it: then no stop token belongs to it."""
    rejected_finish: str = "stop"
    sampler: str = ""
    """Which policy wrote the two, its weights' checksum, seed and temperature; empty where none of ours did."""
    think: str = ""
    """Thinking budget that was put to whoever wrote them; empty for none."""

    def __post_init__(self) -> None:
        _check_history(self.history)
        _check_think(self.think)
        for name in ("chosen_finish", "rejected_finish"):
            if getattr(self, name) not in ("stop", "length"):
                raise ValueError(f"field {name!r} must be stop or length, got {getattr(self, name)!r:.40}")
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise ValueError(f"field 'margin' must be a number of 0 or more, got {self.margin}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSteps:
    """A scratchpad cut into steps, each labelled as still right or not."""

    id: str
    question: str
    steps: list[str]
    labels: list[bool]
    values: list[float] = field(default_factory=list)
    """Probability that a solution which begins with the steps up to and including this one ends right; empty where it was not estimated."""

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.labels):
            raise ValueError(f"{len(self.steps)} steps but {len(self.labels)} labels")
        # A label of -100 or 1.0 would silently count as True once cast.
        if any(type(label) is not bool for label in self.labels):
            raise ValueError(f"field 'labels' must be a list of bool, got {self.labels!r:.80}")
        if self.values and len(self.values) != len(self.steps):
            raise ValueError(f"{len(self.steps)} steps but {len(self.values)} values")
        if any(type(v) not in (float, int) or not 0 <= v <= 1 for v in self.values):
            raise ValueError(f"field 'values' must be a list of probabilities in [0, 1], got {self.values!r:.80}")


def _check_think(think: str) -> None:
    if think not in ("", "off", "short", "long") and not (think.isdecimal() and int(think) > 0):
        raise ValueError(f"field 'think' must be off, short, long or a number of tokens, got {think!r:.40}")


def _check_history(history: list[str]) -> None:
    if len(history) % 2:
        raise ValueError(
            f"field 'history' has {len(history)} turns; it must end with the assistant's, before the question"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything a source yields for a pipeline; each list becomes a file of its own name."""

    demonstrations: list[Demonstration]
    train_problems: list[Problem]
    test_problems: list[Problem]
    train_pairs: list[PreferencePair]
    heldout_pairs: list[PreferencePair]
    labelled_steps: list[LabelledSteps]
    heldout_steps: list[LabelledSteps]


Record = TypeVar("Record", Problem, Demonstration, PreferencePair, LabelledSteps)
AnyRecord = Problem | Demonstration | PreferencePair | LabelledSteps
KINDS = {
    "problems": Problem,
    "demonstrations": Demonstration,
    "preference_pairs": PreferencePair,
    "labelled_steps": LabelledSteps,
}


def parse_record(kind: type[Record], row: Any) -> Record:
    """A record from one decoded JSON row.

    Raises:
        ValueError: naming the missing, unknown or wrongly typed field.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    hints, required = _fields_of(kind)
    for name in required:
        if name not in row:
            raise ValueError(f"field {name!r} is missing (has: {', '.join(sorted(row)) or 'nothing'})")
    for name, value in row.items():
        if name not in hints:
            raise ValueError(f"unknown field {name!r}; a {kind.__name__} has {', '.join(hints)}")
        _check_type(name, value, hints[name])
    return kind(**row)


@cache
def _fields_of(kind: type) -> tuple[dict[str, Any], list[str]]:
    """(type of each field, names of those without a default)."""
    fields = dataclasses.fields(kind)
    required = [f.name for f in fields if f.default is MISSING and f.default_factory is MISSING]
    return get_type_hints(kind), required


ITEMS: dict[Any, tuple[type, ...]] = {list[str]: (str,), list[bool]: (bool,), list[float]: (float, int)}
"""What may stand in a list of each type."""


def _check_type(name: str, value: Any, hint: Any) -> None:
    if hint in ITEMS:
        # A label of -100 or 1.0 would silently count as True once cast, so nothing but a real bool passes.
        if not isinstance(value, list) or any(type(x) not in ITEMS[hint] for x in value):
            raise ValueError(f"field {name!r} must be a list of {ITEMS[hint][0].__name__}, got {value!r:.80}")
    elif hint == float | None:
        if value is not None and type(value) not in (float, int):
            raise ValueError(f"field {name!r} must be a number or null, got {value!r:.80}")
    elif type(value) is not hint:
        raise ValueError(f"field {name!r} must be {hint.__name__}, got {value!r:.80}")
    elif hint is str and name in ("question", "id") and not value.strip():
        raise ValueError(f"field {name!r} is empty")


def read_records(kind: type[Record], path: str | Path) -> list[Record]:
    """All records of a JSONL or parquet file, in order.

    Raises:
        ValueError: when the file is missing or empty, or a row is malformed; names the file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"data file {path} does not exist; run the prepare_data stage first or correct the path in the recipe"
        )
    records: list[Record] = []
    seen: dict[str, int] = {}
    for part in slices(path, bytes_per_slice=1 << 40):
        for origin, number, row in read_rows(part):
            try:
                if isinstance(row, Unreadable):
                    raise ValueError(row.reason)
                record = parse_record(kind, row)
            except ValueError as error:
                raise ValueError(f"{origin}: {error}") from None
            if record.id in seen:
                raise ValueError(
                    f"{origin}: id {record.id!r} was already used on line {seen[record.id] + 1}; ids must be unique"
                )
            seen[record.id] = number
            records.append(record)
    if not records:
        raise ValueError(f"data file {path} holds no records")
    return records


def write_records(records: Iterable[Record], path: str | Path) -> int:
    """Write records as JSONL, whole or not at all; returns how many."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with temporary.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
            count += 1
    os.replace(temporary, path)
    return count
