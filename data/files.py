"""Rows of the files that sources ship: JSON lines, JSON arrays, several JSON objects in a row, parquet; plain or gzipped."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 24
"""Bytes read at once."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".txt")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands in a row's place where the file's own format is broken."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a file that one process reads by itself."""

    path: Path
    start: int
    """First byte (JSON lines), first row group (parquet), or 0 for a file that is read whole."""
    end: int
    first_row: int
    """Number of the rows (lines, where the file has them) before it."""


def open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8", errors="replace")


def is_lines(path: Path) -> bool:
    """Whether a file is JSON lines, whatever its name: its first line is a whole JSON value, and an object."""
    if ".jsonl" in path.name:
        return True
    with open_text(path) as file:
        first = file.readline(BLOCK).strip()
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def slices(path: Path, *, bytes_per_slice: int) -> list[Slice]:
    """Cuts of a file that can be read in parallel: JSON lines at line ends, parquet at row groups, anything else whole.

    Raises:
        ValueError: when a parquet file cannot be opened.
    """
    if path.suffix == ".parquet":
        return _parquet_slices(path, bytes_per_slice)
    if path.suffix == ".gz" or path.stat().st_size <= bytes_per_slice or not is_lines(path):
        return [Slice(path=path, start=0, end=path.stat().st_size, first_row=0)]
    cuts, lines = [(0, 0)], 0
    with path.open("rb") as file:
        while block := file.read(bytes_per_slice):
            rest = b"" if block.endswith(b"\n") else file.readline()
            lines += block.count(b"\n") + rest.count(b"\n")
            cuts.append((file.tell(), lines))
    return [
        Slice(path=path, start=start, end=end, first_row=row) for (start, row), (end, _) in itertools.pairwise(cuts)
    ]


def _parquet_slices(path: Path, bytes_per_slice: int) -> list[Slice]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.ParquetFile(path).metadata
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    found: list[Slice] = []
    start = row = rows = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= bytes_per_slice or group == metadata.num_row_groups - 1:
            found.append(Slice(path=path, start=start, end=group + 1, first_row=row))
            start, row, size = group + 1, rows, 0
    return found


def read_rows(part: Slice) -> Iterator[tuple[str, int, Any]]:
    """(origin, number, row) of each row of a slice; an `Unreadable` where a row is no JSON. Numbers count from 0.

    The origin is `file:line` where the file has lines, `file row n` elsewhere, counted from 1 as editors do. Empty lines are skipped.
    """
    path = part.path
    if path.suffix == ".parquet":
        yield from _parquet_rows(part)
    elif path.suffix != ".gz" and not is_lines(path):
        yield from _values(path)
    elif path.suffix == ".gz":
        with open_text(path) as lines:
            yield from _lines(path, lines, 0)
    else:
        with path.open("rb") as file:
            file.seek(part.start)
            yield from _lines(path, _until(file, part.end), part.first_row)


def _until(file: IO[bytes], end: int) -> Iterator[bytes]:
    while file.tell() < end and (line := file.readline()):
        yield line


def _lines(path: Path, lines: Any, first_row: int) -> Iterator[tuple[str, int, Any]]:
    for number, line in enumerate(lines, first_row):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = Unreadable(f"not valid JSON: {error}")
        yield f"{path}:{number + 1}", number, row


def _values(path: Path) -> Iterator[tuple[str, int, Any]]:
    with open_text(path) as file:
        text = file.read()
    decoder, position, number = json.JSONDecoder(), 0, 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield f"{path} value {number + 1}", number, Unreadable(f"not valid JSON: {error}")
            return
        for row in value if isinstance(value, list) else [value]:
            yield f"{path} row {number + 1}", number, row
            number += 1


def _parquet_rows(part: Slice) -> Iterator[tuple[str, int, Any]]:
    import pyarrow.parquet as pq

    number = part.first_row
    with pq.ParquetFile(part.path) as file:
        for batch in file.iter_batches(batch_size=2048, row_groups=list(range(part.start, part.end))):
            for row in batch.to_pylist():
                yield f"{part.path} row {number + 1}", number, row
                number += 1
