"""Arithmetic and pictures of scripts/benchmark_learning.py: what a run cost when, when it was good, and how that is shown."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from rlhf.report import show_estimate
from rlhf.run import write_json
from rlhf.types import Rollout, Score

THRESHOLD = 0.9
WINDOW = 2
"""Rollout batches whose mean accuracy must reach the threshold."""


def cpu_seconds() -> float:
    """CPU time of this process, of its living descendants, and of those that have ended."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])  # user, system, and the same of children that were waited for
        except psutil.NoSuchProcess:
            continue
    return total


class Clock:
    """What had been spent, and what was right, whenever a rollout batch had been scored."""

    def __init__(self) -> None:
        self.batches: list[dict[str, float]] = []
        self.training: dict[str, float] = {}
        self._started: tuple[float, float] | None = None

    def start(self) -> None:
        """Imports are done, models loaded and engines warm."""
        self.startup_cpu = cpu_seconds()
        self._started = (self.startup_cpu, time.perf_counter())

    def stop(self, *, steps: float) -> None:
        """After the last of so many optimizer steps."""
        self.training = {**self._spent(), "steps": steps}

    def scoring(self, reward_fn: Callable[[Sequence[Rollout]], list[Score]]) -> Any:
        """The same reward function, with a row in `batches` for each call."""

        def score(rollouts: Sequence[Rollout]) -> list[Score]:
            scores = reward_fn(rollouts)
            tokens = sum(len(rollout.token_ids) for rollout in rollouts)
            judged = [s for s in scores if s.value is not None]
            self.batches.append(
                {
                    **self._spent(),
                    "sampled_tokens": tokens + (self.batches[-1]["sampled_tokens"] if self.batches else 0),
                    "completions": len(rollouts),
                    "correctness": statistics.fmean(s.verdict == "correct" for s in judged),
                    "reward": statistics.fmean(s.value for s in judged if s.value is not None),
                    "length": tokens / len(rollouts),
                    "truncated": statistics.fmean(r.finish_reason == "length" for r in rollouts),
                }
            )
            return scores

        return score

    def save(self, file: Path, **more: Any) -> None:
        write_json(
            file,
            {**more, "startup_cpu": self.startup_cpu, "training": self.training, "batches": self.batches},
        )

    def _spent(self) -> dict[str, float]:
        assert self._started is not None, "the clock has not been started"
        cpu, wall = self._started
        return {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}


def reached(accuracies: Sequence[float], *, threshold: float = THRESHOLD, window: int = WINDOW) -> int | None:
    """The first batch at which the mean over it and those before it in the window is at the threshold, for good.

    For good: no later window falls below it. None when that never happens.
    """
    means = [statistics.fmean(accuracies[i - window + 1 : i + 1]) for i in range(window - 1, len(accuracies))]
    below = [i for i, mean in enumerate(means) if mean < threshold]
    first = below[-1] + 1 if below else 0
    return first + window - 1 if first < len(means) else None


def is_spent(budget: int, batches: Sequence[dict[str, float]]) -> bool:
    """Whether these batches have used up a budget of sampled completion tokens; the one that reaches it still counts."""
    return bool(batches) and batches[-1]["sampled_tokens"] >= budget


def time_to(batches: Sequence[dict[str, float]], **rule: Any) -> dict[str, float] | None:
    """The row of the batch at which the threshold was reached, with its number from 1."""
    index = reached([row["correctness"] for row in batches], **rule)
    return None if index is None else {**batches[index], "batch": index + 1}


# --------------------------------------------------------------------------------------------------------------------- tables


def mean_curve(runs: Sequence[Sequence[dict[str, float]]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Means over seeds, batch by batch, as far as the shortest run goes."""
    batches = list(zip(*runs, strict=False))
    return (
        [statistics.fmean(row[x] for row in batch) for batch in batches],
        [statistics.fmean(row[y] for row in batch) for batch in batches],
    )


def learning_table(results: dict[str, Any]) -> str:
    """Markdown: every run's pass@1 before and after on the same held-out problems, with what it cost."""
    lines = [
        "| run | seed | pass@1 before | pass@1 after | paired difference | sampled tokens | optimizer steps | CPU minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    before = show_estimate(results["before"])
    for run in results["runs"]:
        lines.append(
            f"| {run['algorithm']} | {run['seed']} | {before} | {show_estimate(run['after'])} "
            f"| {show_estimate(run['difference'], signed=True)} | {run['sampled_tokens']:,} | {run['training']['steps']} "
            f"| {run['training']['cpu'] / 60:.1f} |"
        )
    for algorithm in dict.fromkeys(run["algorithm"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["algorithm"] == algorithm]
        lines.append(
            f"\n{algorithm}: {len(runs)} seeds, mean difference {statistics.fmean(r['difference']['mean'] for r in runs):+.3f}, "
            f"lowest end of an interval {min(r['difference']['low'] for r in runs):+.3f}"
        )
    return "\n".join(lines)


def races(results: dict[str, Any], ours: str = "grpo", theirs: str = "trl") -> list[dict[str, Any]]:
    """For each seed that both have: when each reached the threshold, and what the whole budget cost."""
    by = {(run["algorithm"], run["seed"]): run for run in results["runs"]}
    found = []
    for seed in sorted(seed for algorithm, seed in by if algorithm == theirs and (ours, seed) in by):
        sides = {"ours": by[ours, seed], "theirs": by[theirs, seed]}
        found.append(
            {"seed": seed, **{name: {**run, "reached": time_to(run["batches"])} for name, run in sides.items()}}
        )
    return found


def per_token(run: dict[str, Any]) -> float:
    """CPU seconds a sampled token has cost, training included."""
    return run["training"]["cpu"] / run["sampled_tokens"]


def race_table(results: dict[str, Any]) -> str:
    """Markdown: time to the threshold, ours against TRL's, and their ratios, seed by seed."""
    lines = [
        f"| seed | GRPO by | batches to {THRESHOLD} | sampled tokens to {THRESHOLD} | CPU s to {THRESHOLD} | wall s | CPU s per 1,000 sampled tokens | held-out pass@1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios: dict[str, list[float]] = {"cpu": [], "token": []}
    for race in races(results):
        for name, side in (("ours", race["ours"]), ("TRL", race["theirs"])):
            r = side["reached"]
            when = (
                f"{r['batch']} | {r['sampled_tokens']:,} | {r['cpu']:.1f} | {r['wall']:.1f}"
                if r
                else "never | - | - | -"
            )
            lines.append(
                f"| {race['seed']} | {name} | {when} | {1000 * per_token(side):.3f} | {show_estimate(side['after'])} |"
            )
        ours, theirs = race["ours"], race["theirs"]
        ratios["token"].append(per_token(theirs) / per_token(ours))
        if ours["reached"] and theirs["reached"]:
            ratios["cpu"].append(theirs["reached"]["cpu"] / ours["reached"]["cpu"])
    for key, title in (
        ("cpu", f"TRL's CPU seconds to {THRESHOLD} over ours"),
        ("token", "TRL's CPU seconds per sampled token over ours, whole run"),
    ):
        if ratios[key]:
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios[key])
            lines.append(f"\n{title}: median **{statistics.median(ratios[key]):.2f}** ({each})")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------- picture


def draw_learning(results: dict[str, Any], picture: Path, *, algorithms: Sequence[str]) -> None:
    """Accuracy and length over sampled tokens for these algorithms; accuracy over CPU time against TRL. Thin lines are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    of: dict[str, list[list[dict[str, float]]]] = {}
    for run in results["runs"]:
        of.setdefault(run["algorithm"], []).append(run["batches"])
    ours = [name for name in algorithms if name in of]
    raced = [name for name in ("grpo", "trl") if name in of]
    panels = (
        ("sampled_tokens", "correctness", ours, "accuracy on training problems", "sampled tokens (thousands)", 1e-3),
        ("sampled_tokens", "length", ours, "completion length (tokens)", "sampled tokens (thousands)", 1e-3),
        ("cpu", "correctness", raced, "the same recipe, ours and TRL's", "CPU seconds, one core", 1.0),
    )
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    color = {name: f"C{i}" for i, name in enumerate([*algorithms, "trl"])}
    shown = {"trl": "grpo by TRL"}
    for axis, (x, y, names, title, label, scale) in zip(axes, panels, strict=True):
        for name in names:
            for batches in of[name]:
                axis.plot(
                    [row[x] * scale for row in batches],
                    [row[y] for row in batches],
                    color=color[name],
                    alpha=0.3,
                    linewidth=0.8,
                )
            xs, ys = mean_curve(of[name], x, y)
            axis.plot([value * scale for value in xs], ys, color=color[name], linewidth=2, label=shown.get(name, name))
        if y == "correctness":
            axis.set_ylim(0.45, 1.01)
            axis.axhline(THRESHOLD, color="gray", linestyle="--", linewidth=1)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=9)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def load_results(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def write_results(file: Path, results: dict[str, Any]) -> None:
    """One run a line, so that a change of one is a change of one line; numbers to six digits."""
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    runs = ",\n".join(json.dumps(run) for run in rounded.pop("runs"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{json.dumps(rounded)[:-1]}, "runs": [\n{runs}\n]}}\n', encoding="utf-8")
