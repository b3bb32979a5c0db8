"""What a source is: where its files are, under which licence, and how a row of them becomes records."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import SUFFIXES, Slice, Unreadable, read_rows, slices
from data.records import AnyRecord

_COMMIT = re.compile("[0-9a-f]{40}")
Convert = Callable[[Mapping[str, Any], str], Sequence[AnyRecord]]
"""(row, id to give) → its records; a ValueError refuses the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A row that is not as its source has it."""

    origin: str
    """File and line (or row)."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set that can be named in a recipe."""

    name: str
    kind: type[AnyRecord]
    convert: Convert
    licence: str
    """As the publisher states it."""
    files: Mapping[str, tuple[str, ...]]
    """Split to the names its files have, as glob patterns; the hub's layout and that of the authors' own repository."""
    repository: str | None = None
    """Data set on the Hugging Face hub; None for a form of file that anyone may have."""
    revision: str | None = None
    """Commit of `repository` that is read unless the recipe names another."""
    note: str = ""
    """What else to know when the file is not there."""

    @property
    def default_split(self) -> str:
        return "test" if "test" in self.files else next(iter(self.files))

    def where(self) -> str:
        """Where to get the files, as a sentence."""
        hub = f"{self.repository} on the Hugging Face hub" if self.repository else "any file of that form"
        return f"get {' or '.join(dict.fromkeys(p for patterns in self.files.values() for p in patterns))} from {hub}{self.note}"


def locate(source: Source, *, path: str | None, revision: str | None, split: str) -> list[Path]:
    """The files of a split: a local file, those of a local folder, or downloaded at a pinned revision.

    Raises:
        ValueError: when they are not there; says where to get them.
    """
    if split not in source.files:
        raise ValueError(f"{source.name} has no split {split!r}; it has {', '.join(source.files)}")
    folder = Path(path) if path is not None else _download(source, revision, split)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"{source.name}: {folder} does not exist; {source.where()}, or correct the path")
    for pattern in source.files[split]:  # the first layout that is there, never two copies of the same rows
        found = sorted(p for p in folder.glob(pattern) if p.name.endswith(SUFFIXES))
        if found:
            return found
    raise ValueError(f"{source.name}: {folder} has no {' or '.join(source.files[split])}; {source.where()}")


def _download(source: Source, revision: str | None, split: str) -> Path:
    revision = revision or source.revision
    if source.repository is None:
        raise ValueError(f"{source.name} is a form of file, not a data set on the hub; set path to such a file")
    if revision is None:
        raise ValueError(
            f"{source.name} has no pinned revision; set revision to a commit of {source.repository}, or path to a local copy"
        )
    if not _COMMIT.fullmatch(revision):
        raise ValueError(
            f"{source.name}: revision {revision!r} may move; name a commit of {source.repository}, 40 digits and letters a to f"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(
                source.repository, repo_type="dataset", revision=revision, allow_patterns=list(source.files[split])
            )
        )
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(
            f"{source.name}: {source.repository} at {revision} could not be downloaded ({type(error).__name__}); set path to a local copy: {source.where()}"
        ) from None


def read_slice(source: Source, part: Slice, *, prefix: str) -> Iterator[tuple[str, Sequence[AnyRecord] | Refused]]:
    """(origin, records or why it was refused) of each row; ids are `prefix` and the row's number from 0."""
    for origin, number, row in read_rows(part):
        try:
            if isinstance(row, Unreadable):
                raise ValueError(row.reason)
            if not isinstance(row, Mapping):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            records = source.convert(row, f"{prefix}-{number}")
            for record in records:
                _require_unicode(record)
        except ValueError as error:
            yield origin, Refused(origin=origin, reason=str(error))
        else:
            yield origin, records


def _require_unicode(record: AnyRecord) -> None:
    """Raises a ValueError for half a surrogate pair, which JSON can spell and no file can hold."""
    for name in record.__slots__:
        value = getattr(record, name)
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, str) and not part.isascii():
                part.encode()


def read_source(
    source: Source, *, path: str | None, revision: str | None, split: str
) -> tuple[list[Any], list[Refused]]:
    """All records of a split and all rows refused, for sources that fit in memory.

    Raises:
        ValueError: when the files are not there.
    """
    records: list[Any] = []
    refused: list[Refused] = []
    files = locate(source, path=path, revision=revision, split=split)
    for index, file in enumerate(files):
        prefix = id_prefix(source, split, index, len(files))
        for part in slices(file, bytes_per_slice=1 << 40):
            for _, outcome in read_slice(source, part, prefix=prefix):
                refused.append(outcome) if isinstance(outcome, Refused) else records.extend(outcome)
    return records, refused


def id_prefix(source: Source, split: str, file: int, num_files: int) -> str:
    return f"{source.name}-{split}" + (f"-{file}" if num_files > 1 else "")


# -------------------------------------------------------------------------------------------- what converters read rows with


def text(row: Any, *names: str) -> str:
    """The first of the fields that is there, stripped.

    Raises:
        ValueError: when none is there, or it is no text or empty.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with {names[0]!r}, got {row!r:.80}")
    for name in names:
        if row.get(name) is not None:
            value = row[name]
            if not isinstance(value, str):
                raise ValueError(f"field {name!r} must be a text, got {value!r:.80}")
            if not value.strip():
                raise ValueError(f"field {name!r} is empty")
            return value.strip()
    has = f"has: {', '.join(map(str, row)) or 'nothing'}"
    if any(name in row for name in names):
        raise ValueError(f"field {' or '.join(map(repr, names))} is null")
    raise ValueError(f"field {' or '.join(map(repr, names))} is missing ({has})")


def answer_text(row: Mapping[str, Any], *names: str) -> str:
    """Like `text`, for answers: a number is written out, 27.0 as 27."""
    for name in names:
        value = row.get(name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"field {name!r} is {value}, which is no answer")
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    return text(row, *names)


def last_boxed(solution: str) -> str | None:
    """What stands in the last complete \\boxed{} (or \\framebox{}) of a text, braces matched."""
    end = len(solution)
    while (start := max(solution.rfind("\\boxed", 0, end), solution.rfind("\\framebox", 0, end))) >= 0:
        end = start
        opening = solution.find("{", start)
        if opening < 0 or solution[start:opening].strip() not in ("\\boxed", "\\framebox"):
            continue
        depth = 0
        for position in range(opening, len(solution)):
            escaped = solution[position - 1] == "\\"
            depth += ((solution[position] == "{") - (solution[position] == "}")) * (not escaped)
            if depth == 0:
                return solution[opening + 1 : position].strip()
    return None


def split_thoughts(response: str) -> tuple[str, str]:
    """(what is between `<think>` and `</think>`, what follows); no thoughts where a response has no tags."""
    thoughts, closing, rest = response.partition("</think>")
    if not closing:
        return "", response.strip()
    return thoughts.strip().removeprefix("<think>").strip(), rest.strip()
