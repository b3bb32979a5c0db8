"""Results as people read them: a table, a picture, and problems answered before and after."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.metrics import read_jsonl


def show_estimate(e: dict[str, float], *, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return f"{e['mean']:{form}} [{e['low']:{form}}, {e['high']:{form}}]"


def printable(text: str) -> str:
    """Model output without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def headline(results: dict[str, Any]) -> str:
    """The evaluation in one line."""
    models = ", ".join(f"{label} {show_estimate(model['pass_at_1'])}" for label, model in results["models"].items())
    difference = results["paired_difference"]
    return f"pass@1: {models}" + (f"; paired difference {show_estimate(difference, signed=True)}" if difference else "")


def evaluation_table(results: dict[str, Any]) -> str:
    """All figures of an evaluation as lines of text."""
    models = results["models"]
    rows = [("", *models)] + [
        (label, *(of(m) for m in models.values())) for label, of in figures(next(iter(models.values())))
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    first = next(iter(models.values()))
    note = f"95 % intervals over {first['pass_at_1']['n']} problems, {first['samples_per_problem']} samples each, {results['rollout_engine']} engine"
    if results["paired_difference"]:
        difference = results["paired_difference"]
        note += f"\npaired difference in pass@1, {list(models)[-1]} - {next(iter(models))}: {show_estimate(difference, signed=True)}"
        note += f"\n{show_test(difference)}"
    return "\n".join([*lines, note])


def show_test(difference: dict[str, Any]) -> str:
    """The permutation test and the power of a comparison in one line."""
    detectable = difference["detectable"]
    seen = "" if detectable is None else f"; smallest difference seen 4 times in 5: {detectable:.3f}"
    return f"p = {difference['p_value']:.2g} ({difference['p_value_method']}; sign-flip permutation){seen}"


def figures(model: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """(name, how it is shown) of every figure that a model's summary has."""

    def estimate(*path: str) -> Callable[[dict[str, Any]], str]:
        def shown(summary: dict[str, Any]) -> str:
            found: Any = summary
            for key in path:
                found = found.get(key) if found else None
            return show_estimate(found) if found else "-"

        return shown

    k = model["samples_per_problem"]
    rows = [("pass@1", estimate("pass_at_1"))]
    rows += [(f"pass@{j}", estimate("pass_at_k", j)) for j in model["pass_at_k"]]
    rows.append((f"maj@{k}", estimate("majority")))
    if model["weighted_majority"]:
        rows.append((f"weighted maj@{k}", estimate("weighted_majority")))
    for split, name in (("by_level", "level"), ("by_subject", "")):
        if len(model[split]) > 1:
            rows += [(f"{name} {printable(group)}".strip(), estimate(split, group)) for group in model[split]]
    for variant in model.get("robustness", {}).get("variants", ()):
        rows.append((variant, estimate("robustness", "variants", variant, "accuracy")))
    if model.get("robustness"):
        rows.append(("worst variant", estimate("robustness", "worst")))
        rows.append(("  by chance", lambda m: f"{m['robustness']['worst_by_chance'] or 0:.3f}"))
    rows.append(("mean length", lambda m: f"{m['mean_length']:.1f} tokens"))
    rows.append(("truncated", lambda m: f"{m['truncated_share']:.1%}"))
    rows.append(("undecided", lambda m: f"{m['undecided_share']:.1%} in {m['undecided_problems']} problems"))
    return rows


def draw(metrics_file: Path, results: dict[str, Any], picture: Path, *, max_kl_sampler: float) -> None:
    """A PNG of the run: reward, accuracy, scratchpad length and KL over the steps; three problems before and after below.

    Args:
        metrics_file: of the online stage.
        results: of the evaluation.
        picture: where to.
        max_kl_sampler: the bound at which the run would have stopped, in nats per token.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_jsonl(metrics_file)
    panels = (
        ("reward/total", "mean reward"),
        ("reward/correctness", "accuracy on training problems"),
        ("rollout/length", "completion length (tokens)"),
        ("policy/kl_sampler", "KL sampler || trainer (nats per token)"),
    )
    shown = results["shown"][:3]
    figure = plt.figure(figsize=(13, 8 + 2.6 * len(shown)), layout="constrained")
    grid = figure.add_gridspec(2 + len(shown), 2, height_ratios=(4, 4, *(2.6 for _ in shown)))
    for i, (key, title) in enumerate(panels):
        axis = figure.add_subplot(grid[i // 2, i % 2])
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), color="tab:blue", linewidth=1.8)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        if key == "policy/kl_sampler":
            axis.set_yscale("log")  # what matters is how far below the bound it stays
            axis.axhline(max_kl_sampler, color="tab:red", linestyle="--", linewidth=1.2, label="the run stops here")
            axis.legend(loc="center right", fontsize=9)
        if key == "reward/correctness":
            axis.set_ylim(0, 1.02)
            for (label, model), color in zip(results["models"].items(), ("tab:gray", "tab:green"), strict=False):
                estimate = model["pass_at_1"]
                axis.axhline(
                    estimate["mean"],
                    color=color,
                    linestyle="--",
                    linewidth=1.2,
                    label=f"{label}: {estimate['mean']:.3f} on {estimate['n']} test problems",
                )
                axis.axhspan(estimate["low"], estimate["high"], color=color, alpha=0.15)
            axis.legend(loc="lower right", fontsize=9)
    for row, problem in enumerate(shown, 2):
        for column, label in enumerate(list(results["models"])[:2]):
            axis = figure.add_subplot(grid[row, column])
            axis.axis("off")
            question = (
                "\n".join(textwrap.wrap(problem["question"], 78))
                if column == 0
                else f"reference: {problem['reference']}"
            )
            written = "\n".join(printable(problem[label]).split("\n")[:10])
            texts = [
                axis.text(
                    0, 1, question, fontsize=9, weight="bold", va="top", transform=axis.transAxes, parse_math=False
                ),
                axis.text(
                    0,
                    0.76,
                    f"{label} writes\n{written}",
                    fontsize=9,
                    family="monospace",
                    va="top",
                    transform=axis.transAxes,
                    parse_math=False,
                ),
            ]
            for text in texts:
                text.set_in_layout(False)  # long lines must not squeeze the curves
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # untrained models write anything
        figure.savefig(picture, dpi=110)
    plt.close(figure)


def before_and_after(results: dict[str, Any]) -> str:
    """The shown problems with every model's first sample."""
    parts = []
    for problem in results["shown"]:
        lines = [f"Q  {printable(problem['question'])}", f"   reference: {printable(problem['reference'])}"]
        for label in results["models"]:
            written = printable(problem[label]).replace("\n", "\n" + " " * 8)
            lines.append(f"   {label}:\n        {written}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
