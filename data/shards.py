"""One slice of one source: read, refuse, filter, scan for evaluation problems, and leave what later steps need.

A shard is three files: the records kept (parquet), their hashes and signatures (npy), and last its marker (JSON), whose being there means that
the shard is done.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from data.catalog import CATALOG
from data.decontamination import TEXT_SHOWN, EvaluationIndex, Match
from data.duplicates import BANDS, signatures
from data.files import Slice
from data.filters import TokenCounter, refusals
from data.plan import Plan
from data.records import AnyRecord, Demonstration, PreferencePair, Problem
from data.sources import Refused, read_slice
from data.words import Hashes, split_words, text_hashes

ROWS_PER_BATCH = 512
"""So that a batch's arrays stay in the processor's cache."""
ROWS_PER_GROUP = 16_384
HASHES = 3
"""Of each row: the whole text, the question's words, the answer."""
Say = Callable[[str], None]
EXAMPLES = 3
"""Of each reason, in a shard and in the manifest."""
ARROW = {
    str: pa.string(),
    int: pa.int64(),
    float | None: pa.float64(),
    list[str]: pa.list_(pa.string()),
    list[bool]: pa.list_(pa.bool_()),
    list[float]: pa.list_(pa.float64()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    number: int
    source: int
    """Index into the plan's sources."""
    name: str
    part: Slice
    prefix: str
    """Of the ids it gives."""
    folder: Path

    def file(self, kind: str) -> Path:
        return self.folder / f"shard-{self.number:05}.{kind}"

    @property
    def marker(self) -> Path:
        return self.file("json")


@dataclass(slots=True, kw_only=True)
class Drops:
    """How many rows were dropped for each reason, and the first few of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, reason: str, row: str, detail: str) -> None:
        self.counts[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append({"row": row, "detail": detail})

    def merge(self, counts: dict[str, int], examples: dict[str, list[dict[str, str]]]) -> None:
        self.counts.update(counts)
        for reason, rows in examples.items():
            shown = self.examples.setdefault(reason, [])
            shown.extend(rows[: EXAMPLES - len(shown)])


@dataclass(frozen=True, slots=True)
class Tools:
    """What every shard needs and is expensive to build."""

    plan: Plan
    index: EvaluationIndex | None
    problems: list[tuple[str, str, str]]
    """(benchmark, id, question) of each problem of the index."""
    counter: TokenCounter | None


def build_tools(plan: Plan, problems: list[tuple[str, str, str]]) -> Tools:
    index = EvaluationIndex([question for _, _, question in problems], plan.rules) if problems else None
    return Tools(plan, index, problems, TokenCounter(plan.filters.tokenizer) if plan.filters.tokenizer else None)


def schema_of(kind: type[AnyRecord]) -> pa.Schema:
    hints = get_type_hints(kind)
    return pa.schema([(f.name, ARROW[hints[f.name]]) for f in fields(kind)])


def to_table(kind: type[AnyRecord], records: Sequence[AnyRecord]) -> pa.Table:
    schema = schema_of(kind)
    return pa.table({name: [getattr(r, name) for r in records] for name in schema.names}, schema=schema)


def whole_text(record: AnyRecord) -> str:
    """Everything a record says, for duplicates, filters and the search for evaluation problems."""
    if isinstance(record, Problem):
        return record.question
    if isinstance(record, Demonstration):
        said = [record.response or f"{record.scratchpad}\n{record.answer}"]
    elif isinstance(record, PreferencePair):
        said = [record.chosen, record.rejected]
    else:
        return "\n".join([record.question, *record.steps])
    return "\n".join([record.system, *record.history, record.question, *said]).strip()


class ShardWriter:
    """Collects what a shard leaves and writes it; the marker comes last."""

    def __init__(self, task: ShardTask, kind: type[AnyRecord], plan: Plan) -> None:
        self._task, self._kind, self._plan = task, kind, plan
        self._parquet = pq.ParquetWriter(task.file("parquet"), schema_of(kind), compression="zstd", compression_level=1)
        self._tables: list[pa.Table] = []
        self._buffered = 0
        self._hashes: list[Hashes] = []
        self._signatures: list[Hashes] = []
        self._strata: dict[str, int] = {}
        self._codes: list[int] = []

    def add(self, records: Sequence[AnyRecord], hashes: Sequence[Hashes], signature: Hashes | None) -> None:
        if not records:
            return
        self._tables.append(to_table(self._kind, records))
        self._buffered += len(records)
        self._hashes.append(np.stack(hashes))
        if signature is not None:
            self._signatures.append(signature)
        for record in records:
            stratum = " · ".join(str(getattr(record, name)) for name in self._plan.stratify_by)
            self._codes.append(self._strata.setdefault(stratum, len(self._strata)))
        if self._buffered >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._tables:
            self._parquet.write_table(pa.concat_tables(self._tables).combine_chunks())
        self._tables, self._buffered = [], 0

    def close(self, summary: dict[str, Any]) -> dict[str, Any]:
        self._flush()
        self._parquet.close()
        _save(self._task.file("hashes"), self._hashes, HASHES)
        if self._plan.near_threshold is not None:
            _save(self._task.file("signatures"), self._signatures, BANDS)
        np.asarray(self._codes, np.int32).tofile(self._task.file("strata"))
        summary = {**summary, "rows_left": len(self._codes), "strata": list(self._strata)}
        temporary = self._task.marker.with_suffix(".tmp")
        temporary.write_text(json.dumps(summary), encoding="utf-8")
        os.replace(temporary, self._task.marker)
        return summary


def _save(path: Path, arrays: list[Hashes], rows: int) -> None:
    np.ascontiguousarray(np.concatenate(arrays, axis=1) if arrays else np.empty((rows, 0), np.uint64)).tofile(path)


def process(task: ShardTask, tools: Tools) -> dict[str, Any]:
    """Work a shard off; returns its marker: rows in and left, drops by reason with examples, pairs with evaluation problems."""
    source = CATALOG[tools.plan.sources[task.source].name]
    writer = ShardWriter(task, source.kind, tools.plan)
    drops, pairs = Drops(), []
    source_rows = rows_in = 0
    for outcomes in _batches(read_slice(source, task.part, prefix=task.prefix)):
        records: list[AnyRecord] = []
        origins: list[str] = []
        for origin, outcome in outcomes:
            source_rows += 1
            if isinstance(outcome, Refused):
                rows_in += 1
                drops.add("malformed", origin, outcome.reason)
            else:
                rows_in += len(outcome)
                records.extend(outcome)
                origins.extend([origin] * len(outcome))
        if records:
            _process_batch(records, origins, tools, writer, drops, pairs)
    return writer.close(
        {
            "source": task.source,
            "source_rows": source_rows,
            "rows_in": rows_in,
            "dropped": dict(drops.counts),
            "examples": drops.examples,
            "pairs": pairs,
        }
    )


def _batches(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        yield batch


def _process_batch(
    records: list[AnyRecord], origins: list[str], tools: Tools, writer: ShardWriter, drops: Drops, pairs: list[Any]
) -> None:
    plan = tools.plan
    questions = [record.question for record in records]
    wholes = questions if isinstance(records[0], Problem) else [whole_text(record) for record in records]
    words = split_words(wholes)
    asked = words if wholes is questions else split_words(questions)
    dropped = refusals(plan.filters, tools.counter, wholes, words)
    for i in np.flatnonzero(asked.counts == 0).tolist():
        dropped.setdefault(i, ("no words", repr(questions[i])[:80]))
    for match in tools.index.scan(asked, words) if tools.index else []:
        if match.row in dropped and dropped[match.row][0] != "contaminated":
            continue
        drop = plan.rules.drops(match.rule)
        pairs.append(_pair(match, records[match.row], origins[match.row], tools, dropped=drop))
        if drop:
            benchmark, problem, _ = tools.problems[match.problem]
            dropped.setdefault(
                match.row, ("contaminated", f"{match.rule} {match.score:.2f} with {problem} of {benchmark}")
            )
    for i, (reason, detail) in dropped.items():
        drops.add(reason, origins[i], detail)
    kept = np.ones(len(records), bool)
    kept[list(dropped)] = False
    signature = (
        signatures(words, shingle_words=plan.shingle_words)[:, kept] if plan.near_threshold is not None else None
    )
    exact = exact_hashes([text for i, text in enumerate(wholes) if i not in dropped])
    left = [record for i, record in enumerate(records) if i not in dropped]
    answers = exact_hashes([re.sub(r"[\s$]", "", getattr(record, "answer", "")) for record in left])
    writer.add(left, [exact, text_hashes(asked)[kept], answers], signature)


def exact_hashes(texts: Sequence[str]) -> Hashes:
    """[R] equal for texts that differ in nothing but white space: `2 (3 + x)` and `2 3 + x` are two problems."""
    return np.fromiter(
        (xxh3_64_intdigest(" ".join(text.split()).encode("utf-8", "replace")) for text in texts), np.uint64, len(texts)
    )


def _pair(match: Match, record: AnyRecord, origin: str, tools: Tools, *, dropped: bool) -> dict[str, Any]:
    benchmark, problem, question = tools.problems[match.problem]
    return {
        "row": record.id,
        "origin": origin,
        "benchmark": benchmark,
        "problem": problem,
        "rule": match.rule,
        "score": round(match.score, 4),
        "dropped": dropped,
        "row_text": record.question[:TEXT_SHOWN],
        "problem_text": question[:TEXT_SHOWN],
    }


# ------------------------------------------------------------------------------------------------------ reading shards again


def load_hashes(task: ShardTask, rows: int, which: int) -> Hashes:
    """One of the hashes of a shard's rows: exact (0), question (1), answer (2)."""
    return np.fromfile(task.file("hashes"), np.uint64, count=rows, offset=which * rows * 8)


def load_band(task: ShardTask, rows: int, band: int) -> Hashes:
    return np.fromfile(task.file("signatures"), np.uint64, count=rows, offset=band * rows * 8)


def load_strata(task: ShardTask) -> NDArray[np.int32]:
    return np.fromfile(task.file("strata"), np.int32)


# ------------------------------------------------------------------------------------------------------------ worker processes

_tools: Tools | None = None


def start_worker(plan: Plan, problems: list[tuple[str, str, str]]) -> None:
    """What a worker process does first. One thread each: the processes are the parallelism."""
    global _tools
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    _tools = build_tools(plan, problems)


def work(task: ShardTask) -> dict[str, Any]:
    assert _tools is not None
    return process(task, _tools)
