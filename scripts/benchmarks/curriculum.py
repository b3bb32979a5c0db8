"""Arithmetic and pictures of scripts/benchmark_curriculum.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf.curriculum_report import draw_rates
from rlhf.metrics import PASS_RATE_BINS, POOLS

THRESHOLD = 0.9
BASELINE = "uniform"
KEPT = (
    "batch", "rollout/tokens", "reward/groups_with_signal", "replay/rescued", "curriculum/effective", *(f"curriculum/{pool}" for pool in POOLS),
    *(f"curriculum/chosen_{i}" for i in range(PASS_RATE_BINS)),
)  # fmt: skip
"""Metrics of a rollout batch that the report needs."""


def reached(measured: Sequence[Mapping[str, float]], *, threshold: float = THRESHOLD) -> Mapping[str, float] | None:
    """The first of two measurements in a row at which the accuracy is at the threshold; None without such a pair."""
    for first, second in pairwise(measured):
        if min(first["accuracy"], second["accuracy"]) >= threshold:
            return first
    return None


def load_runs(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else []


def put_run(file: Path, run: dict[str, Any]) -> None:
    """Put a run's figures into the JSON file, a line a run, in the place of an older run of that name; what a batch lacks there is 0."""
    kept = [{key: round(b[key], 4) for key in KEPT if b.get(key)} for b in run["batches"]]
    run = {**run, "batches": kept}
    others = [r for r in load_runs(file) if (r["label"], r["seed"]) != (run["label"], run["seed"])]
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(r) for r in sorted([*others, run], key=lambda r: (r["label"], r["seed"])))
    file.write_text(f'{{"runs": [\n{rows}\n]}}\n', encoding="utf-8")


def race_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: sampled tokens to the threshold, run by run, and as a share of what the baseline with the same seed needed."""
    tokens = {}
    for r in runs:
        when = reached(r["measured"])
        tokens[r["label"], r["seed"]] = when["sampled_tokens"] if when else None
    lines = [
        f"| problems by | seed | batches to {THRESHOLD} | sampled tokens to {THRESHOLD} | share of {BASELINE}'s | groups with signal until then |",
        "|---|---|---|---|---|---|",
    ]
    for r in runs:
        when, base = reached(r["measured"]), tokens.get((BASELINE, r["seed"]))
        until = r["batches"][: int(when["batch"])] if when else r["batches"]
        signal = statistics.fmean(b.get("reward/groups_with_signal", 0.0) for b in until)
        spent = when["sampled_tokens"] if when else r["measured"][-1]["sampled_tokens"]
        shown = (
            f"{when['batch']} | {spent:,.0f}"
            if when
            else f"never ({r['measured'][-1]['accuracy']:.2f} at the end) | over {spent:,.0f}"
        )
        share = f"{spent / base:.2f}" if base and when else "-"
        lines.append(f"| {r['label']} | {r['seed']} | {shown} | {share} | {signal:.0%} |")
    lines += [
        "",
        f"| problems by | seeds | mean tokens to {THRESHOLD} | mean share of {BASELINE}'s, pair by pair |",
        "|---|---|---|---|",
    ]
    for label in dict.fromkeys(r["label"] for r in runs):
        own = {seed: spent for (name, seed), spent in tokens.items() if name == label}
        pairs = [spent / tokens[BASELINE, s] for s, spent in own.items() if spent and tokens.get((BASELINE, s))]
        mean = f"{statistics.fmean(own.values()):,.0f}" if all(own.values()) else "not every seed got there"
        shares = f"{statistics.fmean(pairs):.2f} ({', '.join(f'{p:.2f}' for p in pairs)})" if pairs else "-"
        lines.append(f"| {label} | {len(own)} | {mean} | {shares} |")
    return "\n".join(lines)


def draw_race(
    runs: Sequence[Mapping[str, Any]], picture: Path, *, seen: Sequence[str] = (BASELINE, "signal_by_level_rested")
) -> None:
    """Held-out accuracy and groups with signal over sampled tokens, and whose problems are chosen in the first seed of two arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(21, 4.8), layout="constrained")
    labels = list(dict.fromkeys(r["label"] for r in runs))
    longest = 1.05 * max(r["measured"][-1]["sampled_tokens"] for r in runs if r["label"] == BASELINE) / 1e3
    for r in runs:
        color, first = (
            f"C{labels.index(r['label'])}",
            r["seed"] == min(o["seed"] for o in runs if o["label"] == r["label"]),
        )
        spent = [0.0]
        for b in r["batches"]:
            spent.append(spent[-1] + b["rollout/tokens"])
        measured = [(m["sampled_tokens"] / 1e3, m["accuracy"]) for m in r["measured"]]
        axes[0].plot(*zip(*measured, strict=True), color=color, alpha=0.8, label=r["label"] if first else None)
        smooth = [
            statistics.fmean(b.get("reward/groups_with_signal", 0.0) for b in r["batches"][max(i - 9, 0) : i + 1])
            for i in range(len(r["batches"]))
        ]
        axes[1].plot([x / 1e3 for x in spent[1:]], smooth, color=color, alpha=0.8)
    axes[0].axhline(THRESHOLD, color="gray", linestyle="--", linewidth=1)
    axes[0].set_title("pass@1 on unseen learnable problems", fontsize=11)
    axes[1].set_title("groups with signal, mean of 10 batches", fontsize=11)
    for axis in axes[:2]:
        axis.set_xlabel("sampled tokens (thousands)")
        axis.grid(alpha=0.3)
        axis.set_xlim(0, longest)
    axes[0].legend(fontsize=9)
    for axis, label in zip(axes[2:], seen, strict=True):
        of_label = next((r for r in runs if r["label"] == label), None)
        if of_label is not None:
            image = draw_rates(axis, of_label["batches"], "chosen", f"pass rates of the problems chosen: {label}")
            figure.colorbar(image, ax=axis, label="share of the batch")
    figure.savefig(picture, dpi=100)
    plt.close(figure)
