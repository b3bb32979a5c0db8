"""Accuracy against thinking tokens as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.report import printable, show_estimate


def thinking_table(results: dict[str, Any]) -> str:
    """Markdown: a line a model and condition, then what each budget adds to the one before it."""
    lines = [
        "| model | condition | accuracy | thinking tokens | completion tokens | thoughts cut | truncated |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["conditions"]:
        lines.append(
            f"| {row['model']} | {row['name']} | {show_estimate(row['accuracy'])} | {row['thinking_tokens']:.1f} | "
            f"{row['completion_tokens']:.1f} | {row['was_cut']:.0%} | {row['truncated']:.1%} |"
        )
    lines += ["", "| model | from | to | gain, problem by problem |", "|---|---|---|---|"]
    for gain in results["gains"]:
        lines.append(f"| {gain['model']} | {gain['from']} | {gain['to']} | {show_estimate(gain, signed=True)} |")
    return "\n".join(lines)


def draw_thinking(results: dict[str, Any], picture: Path) -> None:
    """A point with its interval for each budget in the prompt, and a line through the limits of budget forcing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, label in enumerate(results["models"]):
        rows = [row for row in results["conditions"] if row["model"] == label]
        for of, style, name in (
            ([r for r in rows if r["limit"] is None], "o", "budget in the prompt"),
            ([r for r in rows if r["limit"] is not None], "x--", "thoughts cut"),
        ):
            if not of:
                continue
            means = [r["accuracy"]["mean"] for r in of]
            below = [r["accuracy"]["mean"] - r["accuracy"]["low"] for r in of]
            above = [r["accuracy"]["high"] - r["accuracy"]["mean"] for r in of]
            axis.errorbar(
                [r["thinking_tokens"] for r in of], means, yerr=[below, above], fmt=style, capsize=3, color=f"C{i}",
                alpha=1.0 if style == "o" else 0.6, label=f"{printable(label)}: {name}",
            )  # fmt: skip
        for row in rows:
            if row["limit"] is None:
                axis.annotate(
                    row["think"], (row["thinking_tokens"], row["accuracy"]["mean"]), xytext=(6, -10),
                    textcoords="offset points", fontsize=8, color=f"C{i}",
                )  # fmt: skip
    axis.set_xlabel("mean thinking tokens")
    axis.set_ylabel("accuracy")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
