"""What a preparation does, resolved: which sources, which rules, where to. A recipe becomes one of these."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data.decontamination import Rules
from data.filters import Filters

FORMAT = 1
"""Raised when what shards hold changes its meaning, so that those of an older version are not taken up again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """A source of the catalog and where to read it from."""

    name: str
    path: str | None = None
    revision: str | None = None
    split: str | None = None
    weight: float = 1.0
    """Share of the mix, relative to the other sources' weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkPlan:
    path: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    sources: tuple[SourcePlan, ...]
    seed: int = 0
    filters: Filters = field(default_factory=Filters)
    exact_duplicates: bool = True
    near_threshold: float | None = 0.8
    """Least similarity of near duplicates; None keeps them."""
    shingle_words: int = 5
    rules: Rules = field(default_factory=Rules)
    benchmarks: Mapping[str, BenchmarkPlan] = field(default_factory=dict)
    num_rows: int | None = None
    """Rows of the mix over all splits; None is as many as the weights allow."""
    mixed: bool = False
    """Whether weights are kept to; otherwise every row that is left is used."""
    splits: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})
    stratify_by: tuple[str, ...] = ()
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0
    processes: int = 1
    shard_bytes: int = 1 << 25

    def key(self, checksums: Mapping[str, str]) -> str:
        """A hash of everything that what a shard holds depends on: the plan, the files' contents, the format."""
        plan: dict[str, Any] = dataclasses.asdict(self)
        for name in ("processes", "num_rows", "mixed", "splits", "stratify_by", "min_pass_rate", "max_pass_rate"):
            del plan[name]  # later steps
        for source in plan["sources"]:
            del source["weight"]
        plan["stratify_by"] = self.stratify_by  # strata are written with each row
        text = json.dumps([FORMAT, plan, dict(checksums)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
