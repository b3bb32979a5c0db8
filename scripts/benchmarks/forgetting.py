"""The two tasks of scripts/benchmark_forgetting.py, and what its runs come to: tables and a picture."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from data.records import Demonstration, Problem, write_records
from data.stories import DAYS, Story, generate_stories, to_demonstration, to_problem, write_steps
from rlhf.report import show_estimate
from rlhf.uncertainty import difference, share

TASKS = ("stories", "interim")
"""A: how many are there in the end, which takes the whole scratchpad. B: how many were there after the first day, which takes its first line."""
SAMPLES = 2
"""Of each test problem."""
MIN_LEVEL, MAX_LEVEL = 3, 5


def to_interim(story: Story) -> Problem:
    """Task B: the same story, asked for the day after the first."""
    question = story.question.replace(" have?", f" have on {DAYS[1]}?")
    return Problem(id=f"interim-{story.key()[:16]}", question=question, answer=str(story.values[1]), level=story.level)


def to_interim_demonstration(story: Story, *, stops: bool) -> Demonstration:
    """The first line and its result; or, as task A would have it and wrong here, all of them."""
    problem, n = to_interim(story), 1 if stops else story.level
    steps = "\n".join(write_steps(story.events, story.values)[:n])
    return Demonstration(id=problem.id, question=problem.question, scratchpad=steps, answer=str(story.values[n]))


def write_tasks(folder: Path, *, seed: int = 0) -> None:
    """All records: a mixture of demonstrations in which task B is done rightly every other time, problems of B to train on, problems and
    demonstrations of A for the controls, and test problems of both. No story is in two files."""

    def stories(split: Any) -> Iterator[Story]:
        return generate_stories(split, seed=seed, min_level=MIN_LEVEL, max_level=MAX_LEVEL)

    rng = random.Random(f"forgetting-{seed}")
    train, validation, test = stories("train"), stories("validation"), stories("test")
    mixture = [
        to_demonstration(story, answers_at_once=False)
        if rng.random() < 0.5
        else to_interim_demonstration(story, stops=rng.random() < 0.5)
        for story in islice(train, 12_800)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Sequence[Any]] = {
        "demonstrations": mixture,
        "interim": [to_interim(story) for story in islice(train, 4000)],
        "interim_demonstrations": [to_interim_demonstration(story, stops=True) for story in islice(train, 64)],
        "stories": [to_problem(story) for story in islice(train, 1000)],
        "stories_demonstrations": [to_demonstration(s, answers_at_once=False) for s in islice(train, 2000)],
        "stories_heldout": [to_problem(story) for story in islice(validation, 128)],
        "stories_test": [to_problem(story) for story in islice(test, 300)],
        "interim_test": [to_interim(story) for story in islice(test, 300)],
    }
    for name, records in files.items():
        write_records(records, folder / f"{name}.jsonl")


# ------------------------------------------------------------------------------------------------------------------- tables

Counts = str
"""Right answers of each test problem, a digit each."""


def shares(counts: Counts) -> list[float]:
    return [int(c) / SAMPLES for c in counts]


def change(before: Counts, after: Counts) -> dict[str, Any]:
    """Paired over problems."""
    return asdict(difference([b - a for a, b in zip(shares(before), shares(after), strict=True)]))


def verdicts(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Of each seed: the fall of A as a part of that without control, and the distance of B from that without control."""
    by = {(run["arm"], run["seed"]): run for run in results["runs"]}
    before, found = results["before"], []
    for (arm, seed), run in sorted(by.items()):
        free = by.get((run["against"], seed))
        if arm != name or free is None:
            continue
        fall = change(before["stories"], run["after"]["stories"])
        fall_without = change(before["stories"], free["after"]["stories"])
        gap = change(free["after"]["interim"], run["after"]["interim"])
        found.append(
            {
                "seed": seed,
                "a": fall,
                "b": gap,
                "part": fall["mean"] / fall_without["mean"] if fall_without["mean"] else 0.0,
            }
        )
    return found


def forgetting_tables(results: Mapping[str, Any]) -> str:
    """Markdown: every run, and every control over the seeds."""
    before = results["before"]
    start = {task: show_estimate(asdict(share(shares(before[task]), samples=SAMPLES))) for task in TASKS}
    lines = [
        f"Before: A {start['stories']}, B {start['interim']} (pass@1 on {len(before['stories'])} unseen problems each, {SAMPLES} samples).",
        "",
        "| run | seed | A after | change of A | B after | B against no control |",
        "|---|---|---|---|---|---|",
    ]
    arms = list(dict.fromkeys(run["arm"] for run in results["runs"]))
    for run in results["runs"]:
        after = {task: statistics.fmean(shares(run["after"][task])) for task in TASKS}
        paired = next((v for v in verdicts(results, run["arm"]) if v["seed"] == run["seed"]), None)
        against = show_estimate(paired["b"], signed=True) if paired and run["arm"] != run["against"] else "-"
        fall = show_estimate(change(before["stories"], run["after"]["stories"]), signed=True)
        lines.append(
            f"| {run['arm']} | {run['seed']} | {after['stories']:.3f} | {fall} | {after['interim']:.3f} | {against} |"
        )
    lines += [
        "",
        "| control | seeds | mean change of A (lowest) | as a part of that without control (largest) | mean B against no control (lowest) |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        found = verdicts(results, arm)
        if not found:
            continue
        a, part, b = ([v["a"]["mean"] for v in found], [v["part"] for v in found], [v["b"]["mean"] for v in found])
        lines.append(
            f"| {arm} | {len(found)} | {statistics.fmean(a):+.3f} ({min(a):+.3f}) | {statistics.fmean(part):.2f} ({max(part):.2f}) "
            f"| {statistics.fmean(b):+.3f} ({min(b):+.3f}) |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------ picture


def draw_forgetting(results: Mapping[str, Any], picture: Path) -> None:
    """Accuracy on both tasks over the rollout batches, mean over seeds; thin lines are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained", sharey=True)
    arms = list(dict.fromkeys(run["arm"] for run in results["runs"]))
    titles = {"stories": "task A, not trained on", "interim": "task B, trained on"}
    for axis, task in zip(axes, TASKS, strict=True):
        for i, arm in enumerate(arms):
            curves = [run["curve"] for run in results["runs"] if run["arm"] == arm]
            for curve in curves:
                axis.plot(
                    [c["batch"] for c in curve], [c[task] for c in curve], color=f"C{i}", alpha=0.25, linewidth=0.8
                )
            points = list(zip(*curves, strict=True))
            means = [statistics.fmean(c[task] for c in point) for point in points]
            axis.plot(
                [point[0]["batch"] for point in points],
                means,
                color=f"C{i}",
                linestyle="-" if i < 10 else "--",
                linewidth=2,
                label=arm,
            )
        axis.set_title(titles[task], fontsize=11)
        axis.set_xlabel("rollout batches of GRPO on task B")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("pass@1 on 100 unseen problems, one sample")
    axes[0].legend(loc="lower left", fontsize=9)
    figure.savefig(picture, dpi=100)
    plt.close(figure)
