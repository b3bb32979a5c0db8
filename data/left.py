"""All rows that shards left, as arrays over them: what the steps that need every row at once work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from data.shards import ShardTask, load_band, load_hashes
from data.words import Hashes


@dataclass(frozen=True, slots=True)
class Left:
    """All rows that shards left, as arrays over them."""

    tasks: list[ShardTask]
    counts: list[int]
    """Rows of each shard."""
    source: np.ndarray
    """[R] index of the source of each."""

    @property
    def begins(self) -> list[int]:
        return [0, *np.cumsum(self.counts).tolist()]

    def hashes(self, which: int) -> Hashes:
        """[R] hashes of the whole text (0), the question (1) or the answer (2)."""
        parts = [load_hashes(t, n, which) for t, n in zip(self.tasks, self.counts, strict=True)]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def band(self, band: int) -> Hashes:
        return np.concatenate([load_band(t, n, band) for t, n in zip(self.tasks, self.counts, strict=True)])

    def ids(self, rows: Sequence[int]) -> list[str]:
        """The ids of a few rows."""
        found = []
        begins = np.asarray(self.begins)
        for row in rows:
            shard = int(np.searchsorted(begins, row, side="right")) - 1
            column = pq.read_table(self.tasks[shard].file("parquet"), columns=["id"]).column("id")
            found.append(column[row - int(begins[shard])].as_py())
        return found
