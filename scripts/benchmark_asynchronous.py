"""Sampling ahead against waiting, on one core each for the trainer and the server (docs/benchmarks/asynchronous.md).

python scripts/benchmark_asynchronous.py --repeats 2 --json docs/benchmarks/asynchronous.json --picture docs/benchmarks/asynchronous.png

Starts from what `make demo` leaves before its GRPO stage. The runs take turns; the first batches of each, in which servers warm up, do not count.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rlhf.metrics import read_jsonl
from rlhf.run import die_with_parent, git_revision

RECIPE = "recipes/tiny/grpo_async.yaml"
FOLDER = Path("outputs/asynchronous")
TRAINER, SERVER = 0, 1
"""Cores."""
WARM_UP = 3


def run(lag: int, repeat: int, batches: int) -> list[dict[str, float]]:
    """The metrics of one run, sampling `lag` batches ahead."""
    folder = FOLDER / f"lag-{lag}-{repeat}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "scripts/train_grpo.py", "--config", RECIPE, f"training.max_staleness={lag}", f"training.num_batches={batches}",
               f"rollout.server.devices=['{SERVER}']", f"output_dir={folder}", f"seed={repeat}"]  # fmt: skip

    def on_its_core() -> None:
        os.sched_setaffinity(0, {TRAINER})
        die_with_parent()

    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=on_its_core)
    return read_jsonl(folder / "metrics.jsonl")


def seconds(row: dict[str, float]) -> float:
    """Of a rollout batch, from one to the next."""
    return sum(value for key, value in row.items() if key.startswith("seconds/"))


def summary(runs: dict[int, list[list[dict[str, float]]]]) -> dict[str, Any]:
    def mean(lag: int, key: str) -> float:
        values = [row[key] for rows in runs[lag] for row in rows[WARM_UP:]]
        return sum(values) / len(values)

    of_batch = {lag: [median(map(seconds, rows[WARM_UP:])) for rows in of_lag] for lag, of_lag in runs.items()}
    ratios = [waiting / ahead for waiting, ahead in zip(of_batch[0], of_batch[1], strict=True)]
    parts = {lag: {p: mean(lag, f"seconds/{p}") for p in ("rollout", "reward", "train", "sync")} for lag in runs}
    return {
        "ratio": median(ratios),
        "ratios": ratios,
        "seconds_of_a_batch": of_batch,
        "parts": parts,
        # sampling and training at once can at best take as long as the longer of the two
        "limit": sum(parts[0].values()) / max(parts[0]["rollout"], sum(parts[0].values()) - parts[0]["rollout"]),
        "hidden": mean(1, "rollout/hidden"),
        "kl_sampler": {lag: mean(lag, "policy/kl_sampler") for lag in runs},
        "correctness": {lag: [[row["reward/correctness"] for row in rows] for rows in of_lag] for lag, of_lag in runs.items()},
        "git": git_revision(),
    }  # fmt: skip


def draw(figures: dict[str, Any], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_batch, by_time) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for lag, colour, label in ((0, "#888888", "waits"), (1, "#1f6feb", "samples one batch ahead")):
        for curve, step in zip(figures["correctness"][lag], figures["seconds_of_a_batch"][lag], strict=True):
            by_batch.plot(range(1, len(curve) + 1), curve, color=colour, label=label)
            by_time.plot([(i + 1) * step for i in range(len(curve))], curve, color=colour)
            label = None
    by_batch.set(xlabel="rollout batches", ylabel="right answers while training", ylim=(0, 1))
    by_time.set(xlabel="seconds, of batches of median length")
    by_batch.legend(frameon=False, loc="lower right")
    for axes in (by_batch, by_time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(picture, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    runs: dict[int, list[list[dict[str, float]]]] = {0: [], 1: []}
    for repeat in range(arguments.repeats):
        for lag in runs:
            runs[lag].append(run(lag, repeat, arguments.batches))
    figures = summary(runs)
    print(json.dumps({key: value for key, value in figures.items() if key != "correctness"}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.picture:
        draw(figures, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
