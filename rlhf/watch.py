"""Signs that a policy games its reward, in the metrics of the rollout batches so far.

A window is `window` batches in a row. The newest one is compared with the first one, with the one before it, and with the best one: that
of highest correctness, which the grader measures whatever is rewarded.

    divergence   reward/total is above what it was in the best window, and correctness is below
    surface      format and length make up more than a share of the variance that the advantages come from
    repetition   completions repeat themselves, more than they did in the first window
    kl           policy/kl_reference grows faster than a slope
    collapse     groups have lost their spread since the first window, and correctness is not at its ceiling
    length       completions have grown by more than a factor since the first window
    sameness     the samples of a prompt have become alike since the first window

The last six are alarms only while correctness neither rises nor is at its ceiling: a policy that learns may move in any of these ways.
Differences of means must be larger than chance makes them from batch to batch (`significance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf.completions import Row as Completion
from rlhf.completions import write_rows
from rlhf.config import Online
from rlhf.config import Watch as Thresholds
from rlhf.metrics import append_jsonl

MetricRow = Mapping[str, float]

SURFACE = "watch/surface"
"""Share of the variance that components of form, and not of substance, make up."""
KEYS = (
    "batch", "step", "reward/total", "reward/correctness", "reward/group_std", "rollout/length", "rollout/repetition", "rollout/distinct_scratchpads",
    "policy/kl_reference", SURFACE,
)  # fmt: skip
SURFACE_KINDS = ("format", "length", "overlong", "repetition", "cosine", "target_length")
NUM_COMPLETIONS = 10
"""Completions that an alarm shows."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """What was seen, where."""

    name: str
    metric: str
    batch: int
    step: int
    sentence: str

    def file(self, run: Path) -> Path:
        return run / "alarms" / f"step-{self.step:06d}-{self.name}.jsonl"

    def line(self, run: Path) -> str:
        """For the console."""
        return f"watch: {self.metric} {self.sentence} (step {self.step}, batch {self.batch}); the completions that show it best: {self.file(run)}"


def mean(rows: Sequence[MetricRow], key: str) -> float:
    """Over the rows that have the key; nan without any."""
    values = [row[key] for row in rows if key in row]
    return fmean(values) if values else math.nan


def standard_error(rows: Sequence[MetricRow], key: str) -> float:
    """Of the mean, from the differences of neighbours, which a trend hardly changes (von Neumann 1941).

    se² = sum (x_{i+1} - x_i)² / (2 (n - 1)) / n
    """
    values = [row[key] for row in rows if key in row]
    if len(values) < 2:
        return math.inf
    differences = [(b - a) ** 2 for a, b in pairwise(values)]
    return math.sqrt(sum(differences) / (2 * len(differences)) / len(values))


def rise(now: Sequence[MetricRow], then: Sequence[MetricRow], key: str) -> tuple[float, float]:
    """(difference of the means, what chance makes of it: its standard error)."""
    error = math.hypot(standard_error(now, key), standard_error(then, key))
    return mean(now, key) - mean(then, key), error


def slope(rows: Sequence[MetricRow], key: str) -> float:
    """Least squares, per optimizer step; nan for fewer than two rows that have the key."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    if len(points) < 2:
        return math.nan
    x, y = (fmean(column) for column in zip(*points, strict=True))
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread if spread else math.nan


def best_window(history: Sequence[MetricRow], window: int) -> Sequence[MetricRow]:
    """That of highest mean correctness, the earliest of equals."""
    windows = [history[i : i + window] for i in range(len(history) - window + 1)]
    measured = [rows for rows in windows if not math.isnan(mean(rows, "reward/correctness"))]
    return max(measured or windows, key=lambda rows: mean(rows, "reward/correctness"))


@dataclass(frozen=True, slots=True)
class Windows:
    """What a sign looks at."""

    now: Sequence[MetricRow]
    before: Sequence[MetricRow]
    """The window before `now`."""
    first: Sequence[MetricRow]
    best: Sequence[MetricRow]
    limits: Thresholds

    def rose(self, key: str, since: Sequence[MetricRow]) -> bool:
        """By more than chance."""
        difference, error = rise(self.now, since, key)
        return difference > self.limits.significance * error

    def learns(self, since: Sequence[MetricRow]) -> bool:
        return self.rose("reward/correctness", since) or mean(self.now, "reward/correctness") >= self.limits.ceiling


def divergence(w: Windows) -> str | None:
    loss, error = rise(w.best, w.now, "reward/correctness")
    if not w.rose("reward/total", w.best) or loss <= max(w.limits.significance * error, w.limits.max_correctness_loss):
        return None
    paid_then, paid = mean(w.best, "reward/total"), mean(w.now, "reward/total")
    right_then, right = mean(w.best, "reward/correctness"), mean(w.now, "reward/correctness")
    return f"rose from {paid_then:.3f} to {paid:.3f} while correctness fell from {right_then:.1%} to {right:.1%}: what is rewarded is not what is wanted"


def surface(w: Windows) -> str | None:
    share = mean(w.now, SURFACE)
    if not share > w.limits.max_surface_share or w.learns(w.before):
        return None
    return f"is {share:.0%}: so much of the variance behind the advantages is form and length, and correctness does not rise"


def repetition(w: Windows) -> str | None:
    then, now = mean(w.first, "rollout/repetition"), mean(w.now, "rollout/repetition")
    if not now > max(w.limits.max_repetition, 2 * then) or w.learns(w.before):
        return None
    return f"rose from {then:.1%} to {now:.1%}: completions say the same again and again"


def kl(w: Windows) -> str | None:
    steep = slope(w.now, "policy/kl_reference")
    if not steep > w.limits.max_kl_slope or w.learns(w.before):
        return None
    return f"grows by {steep:.2g} nats per token with every optimizer step, and correctness does not rise"


def collapse(w: Windows) -> str | None:
    then, now = mean(w.first, "reward/group_std"), mean(w.now, "reward/group_std")
    if not now < w.limits.min_spread * then or w.learns(w.before):
        return None
    right = mean(w.now, "reward/correctness")
    return f"fell from {then:.3g} to {now:.3g} at a correctness of {right:.1%}: the samples of a prompt hardly differ any more"


def length(w: Windows) -> str | None:
    then, now = mean(w.first, "rollout/length"), mean(w.now, "rollout/length")
    if not now > w.limits.max_length_growth * then or w.learns(w.first):
        return None
    return f"grew from {then:.0f} to {now:.0f} tokens, and correctness did not rise with it"


def sameness(w: Windows) -> str | None:
    key = "rollout/distinct_scratchpads"
    then, now = mean(w.first, key), mean(w.now, key)
    if not now < w.limits.min_distinct * then or w.learns(w.before):
        return None
    return f"fell from {then:.2f} to {now:.2f}: the samples of a prompt think the same, and correctness does not rise"


SIGNS: dict[str, tuple[str, Callable[[Windows], str | None]]] = {
    "divergence": ("reward/total", divergence),
    "surface": (SURFACE, surface),
    "repetition": ("rollout/repetition", repetition),
    "kl": ("policy/kl_reference", kl),
    "collapse": ("reward/group_std", collapse),
    "length": ("rollout/length", length),
    "sameness": ("rollout/distinct_scratchpads", sameness),
}
"""Alarm to the metric it is about and the function that sees it. A metric that is missing is nan and trips nothing."""


def find_alarms(history: Sequence[MetricRow], limits: Thresholds) -> list[Alarm]:
    """Every sign that the newest window shows; none before there are two windows.

    Args:
        history: rows of `metrics.jsonl` from the first batch on, those of KEYS at least.
        limits: section `watch` of the recipe.
    """
    size = limits.window
    if len(history) < 2 * size:
        return []
    best = best_window(history, size)
    windows = Windows(history[-size:], history[-2 * size : -size], history[:size], best, limits)
    batch, step = int(history[-1]["batch"]), int(history[-1]["step"])
    seen = {name: (metric, sign(windows)) for name, (metric, sign) in SIGNS.items()}
    return [Alarm(name, metric, batch, step, text) for name, (metric, text) in seen.items() if text is not None]


def most_telling(alarm: Alarm, completions: Sequence[Completion], surface: Sequence[str]) -> list[Completion]:
    """The ten completions of a batch that show best what an alarm is about, the plainest first."""

    def of_surface(c: Completion) -> float:
        return sum(c["weighted"].get(name, 0.0) for name in surface)

    def paid_and_wrong(c: Completion) -> tuple[bool, float]:
        return c["verdict"] == "wrong", c["value"] or 0.0

    order: dict[str, Callable[[Completion], Any]] = {
        "surface": of_surface,
        "repetition": lambda c: c["repetition"],
        "length": lambda c: c["tokens"],
    }
    return sorted(completions, key=order.get(alarm.name, paid_and_wrong), reverse=True)[:NUM_COMPLETIONS]


def record_alarms(run: Path, watch: Watch, alarms: Sequence[Alarm], completions: Sequence[Completion]) -> None:
    """A row in `alarms.jsonl` for each alarm, and a file with its completions."""
    for alarm in alarms:
        write_rows(alarm.file(run), most_telling(alarm, completions, watch.surface))
        append_jsonl(run / "alarms.jsonl", {**asdict(alarm), "completions": str(alarm.file(run).relative_to(run))})


@dataclass(slots=True)
class Watch:
    """Looks at each rollout batch of a run; an alarm is raised again only after a window without it or with it."""

    limits: Thresholds
    surface: tuple[str, ...]
    """Names of the components of form."""
    history: list[dict[str, float]] = field(default_factory=list)
    raised: dict[str, int] = field(default_factory=dict)
    """Alarm to the batch it was last raised in."""

    @classmethod
    def of(cls, config: Online) -> Watch:
        return cls(config.watch, tuple(r.name for r in config.rewards if r.kind in SURFACE_KINDS))

    def measure(self, row: MetricRow) -> dict[str, float]:
        """What the watch adds to the metrics of a rollout batch."""
        shares = [row[key] for name in self.surface if (key := f"variance_share/{name}") in row]
        return {SURFACE: sum(shares)} if shares else {}

    def look(self, row: MetricRow) -> list[Alarm]:
        """The alarms of a rollout batch, given its metrics, with those of `measure`."""
        self.history.append({key: row[key] for key in KEYS if key in row})
        due = [
            alarm
            for alarm in find_alarms(self.history, self.limits)
            if alarm.batch - self.raised.get(alarm.name, -self.limits.window) >= self.limits.window
        ]
        self.raised |= {alarm.name: alarm.batch for alarm in due}
        return due

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"history": self.history, "raised": self.raised}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.history, self.raised = list(state["history"]), dict(state["raised"])
