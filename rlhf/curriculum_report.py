"""What a curriculum did, for people: pool sizes as a table, pass rates over time as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.metrics import PASS_RATE_BINS, POOLS

Rows = Sequence[Mapping[str, float]]
"""Of metrics.jsonl."""


def require_measured(rows: Rows, source: str) -> None:
    """Raise when a run kept no pass rates.

    Raises:
        ValueError: naming the key that makes it keep them.
    """
    if not rows or f"curriculum/{POOLS[0]}" not in rows[-1]:
        raise ValueError(
            f"{source} holds no pass rates of problems; set curriculum.measure to true, or curriculum.kind to another than uniform"
        )


def pool_table(rows: Rows, *, num_lines: int = 10) -> str:
    """Markdown: pool sizes and what was chosen, in evenly spaced rollout batches, the first and the last among them."""
    places = np.unique(np.linspace(0, len(rows) - 1, num_lines).round().astype(int)).tolist()
    lines = [
        f"| batch | {' | '.join(POOLS)} | mean pass rate | effective number | groups with signal |",
        "|" + "---|" * (len(POOLS) + 4),
    ]
    for row in (rows[place] for place in places):
        sizes = " | ".join(f"{row[f'curriculum/{pool}']:.0f}" for pool in POOLS)
        signal = f"{row['reward/groups_with_signal']:.0%}" if "reward/groups_with_signal" in row else "-"
        rate = f"{row['curriculum/pass_rate']:.2f}" if "curriculum/pass_rate" in row else "-"
        lines.append(f"| {row['batch']:.0f} | {sizes} | {rate} | {row['curriculum/effective']:.0f} | {signal} |")
    return "\n".join(lines)


def draw_rates(axis: Any, rows: Rows, key: str, title: str) -> Any:
    """The histogram of pass rates, a column a rollout batch; `key` is `rates` (all problems sampled so far) or `chosen`."""
    shares = np.array([[row.get(f"curriculum/{key}_{i}", 0.0) for i in range(PASS_RATE_BINS)] for row in rows])
    image = axis.imshow(
        shares.T, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=(0.5, len(rows) + 0.5, 0, 1)
    )
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("rollout batch")
    axis.set_ylabel("measured pass rate")
    return image


def draw_curriculum(rows: Rows, picture: Path) -> None:
    """A PNG: pool sizes, the pass rates of the problems sampled so far, and those of the problems chosen, batch by batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    batches = [row["batch"] for row in rows]
    axes[0].stackplot(batches, [[row[f"curriculum/{pool}"] for row in rows] for pool in POOLS], labels=POOLS, alpha=0.8)
    axes[0].set_title("problems in each pool", fontsize=11)
    axes[0].set_xlabel("rollout batch")
    axes[0].legend(fontsize=9, loc="lower left")
    draw_rates(axes[1], rows, "rates", "pass rates of the problems sampled so far")
    image = draw_rates(axes[2], rows, "chosen", "pass rates of the problems chosen")
    figure.colorbar(image, ax=axes[2], label="share of the problems")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
