"""Verdicts of a judge on disk, so that a completion is judged once, over restarts and by several processes."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

LOCK_SECONDS = 60.0
"""To wait for another process that writes."""


def request_key(model: str, prompt_version: int, body: dict[str, Any]) -> str:
    """What a reply depends on: the model, how its reply is read, and the request (messages and parameters)."""
    what = json.dumps([model, prompt_version, body], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()


class ReplyCache:
    """Replies by key in an SQLite file; without a file, nothing is kept.

    Raises:
        ValueError: when the file is something else or cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        if path is None:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                # With a write-ahead log readers never wait for writers.
                database.execute("PRAGMA journal_mode = WAL")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
                )
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"judge.cache {path} cannot be used as a cache ({error}); name another file") from None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # A connection a call: it belongs to the thread that made it, and rollouts are scored in several.
        with closing(sqlite3.connect(self._path or "", timeout=LOCK_SECONDS, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = NORMAL")
            yield database

    def find(self, keys: Iterable[str]) -> dict[str, str]:
        """The replies there are."""
        if self._path is None:
            return {}
        with self._open() as database:
            rows = (database.execute("SELECT key, reply FROM replies WHERE key = ?", (key,)).fetchone() for key in keys)
            return {row[0]: row[1] for row in rows if row is not None}

    @contextmanager
    def writer(self) -> Iterator[Any]:
        """A function (key, reply) that keeps a reply, on disk when it returns."""
        if self._path is None:
            yield lambda key, reply: None
            return
        with self._open() as database:
            yield lambda key, reply: database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))
