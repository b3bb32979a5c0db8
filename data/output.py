"""The files of the splits, written in one pass over the shards: whole or not at all, mixed, shuffled within chunks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.files import sha256
from data.left import Left
from data.plan import Plan
from data.records import AnyRecord
from data.shards import Say, schema_of

ROWS_PER_CHUNK = 65_536
"""Rows that are mixed and shuffled among each other."""


def write_splits(
    plan: Plan,
    left: Left,
    alive: np.ndarray,
    split: np.ndarray,
    kind: type[AnyRecord],
    folder: Path,
    rates: Mapping[str, float] | None,
    say: Say,
) -> dict[str, dict[str, Any]]:
    """One parquet file a split, whole or not at all: sources interleaved in proportion, rows shuffled within chunks."""
    names = list(plan.splits)
    schema = schema_of(kind)
    temporary = [folder / f"{name}.parquet.tmp" for name in names]
    writers = [pq.ParquetWriter(path, schema, compression="zstd") for path in temporary]
    strata: list[Counter[str]] = [Counter() for _ in names]
    rows = [0] * len(names)
    buffers: list[list[pa.Table]] = [[] for _ in names]
    rng = np.random.default_rng([plan.seed, 1])

    def flush(i: int) -> None:
        if buffers[i]:
            table = pa.concat_tables(buffers[i])
            buffers[i] = []
            table = table.take(pa.array(rng.permutation(len(table))))
            if rates is not None:
                measured = pa.array([rates[name] for name in table.column("id").to_pylist()], pa.float64())
                table = table.set_column(schema.get_field_index("pass_rate"), "pass_rate", measured)
            for stratum in zip(*(table.column(name).to_pylist() for name in plan.stratify_by), strict=True):
                strata[i][" · ".join(map(str, stratum))] += 1
            rows[i] += len(table)
            writers[i].write_table(table.combine_chunks(), row_group_size=ROWS_PER_CHUNK)

    for chunk in _chunks(left, len(plan.sources)):
        for table, begin in chunk:
            kept = alive[begin : begin + len(table)]
            for i in range(len(names)):
                own = table.filter(pa.array(kept & (split[begin : begin + len(table)] == i)))
                if len(own):
                    buffers[i].append(own)
        for i in range(len(names)):
            if sum(map(len, buffers[i])) >= ROWS_PER_CHUNK:
                flush(i)
    outputs = {}
    for i, name in enumerate(names):
        flush(i)
        writers[i].close()
        os.replace(temporary[i], folder / f"{name}.parquet")
        file = folder / f"{name}.parquet"
        outputs[name] = {"file": file.name, "rows": rows[i], "sha256": sha256(file)}
        if plan.stratify_by:
            outputs[name]["strata"] = dict(sorted(strata[i].items()))
        say(f"{file.name}: {rows[i]:,} rows")
    return outputs


def _chunks(left: Left, num_sources: int) -> Iterator[list[tuple[pa.Table, int]]]:
    """Tables with the number of their first row; each chunk holds the same share of every source."""
    sizes = np.bincount(left.source, minlength=num_sources) if len(left.source) else np.zeros(num_sources, np.int64)
    num_chunks = max(1, -(-int(sizes.sum()) // ROWS_PER_CHUNK))
    readers = [_Reader(left, source) for source in range(num_sources)]
    for chunk in range(1, num_chunks + 1):
        yield [
            piece
            for reader, size in zip(readers, sizes, strict=True)
            for piece in reader.until(int(size) * chunk // num_chunks)
        ]


class _Reader:
    """The rows of one source, in order, in pieces."""

    def __init__(self, left: Left, source: int) -> None:
        self._taken = 0
        self._pieces = self._read(left, source)
        self._rest: tuple[pa.Table, int] | None = None

    @staticmethod
    def _read(left: Left, source: int) -> Iterator[tuple[pa.Table, int]]:
        for begin, task, count in zip(left.begins, left.tasks, left.counts, strict=False):
            if task.source != source or not count:
                continue
            with pq.ParquetFile(task.file("parquet")) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, use_threads=False)
                    yield table, begin
                    begin += len(table)

    def until(self, rows: int) -> Iterator[tuple[pa.Table, int]]:
        """What is between the rows taken so far and the first `rows` of the source."""
        while self._taken < rows:
            table, begin = self._rest or next(self._pieces)
            wanted = min(len(table), rows - self._taken)
            self._rest = (table.slice(wanted), begin + wanted) if wanted < len(table) else None
            self._taken += wanted
            yield table.slice(0, wanted), begin
