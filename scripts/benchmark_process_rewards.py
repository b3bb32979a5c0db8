"""Evidence for docs/benchmarks/process_rewards.md: what rewards of steps do to the tokens that GRPO samples until it is good.

python scripts/benchmark_process_rewards.py run --variants outcome sum min --seeds 0 1 2 --process-model outputs/demo/process_reward_model
python scripts/benchmark_process_rewards.py run --variants sum --label sum-heavy --change 'algorithm.clip_high=0.2' ...
python scripts/benchmark_process_rewards.py report

Every run is recipes/tiny/grpo.yaml from the demo's SFT policy with other rewards; a finished run is not repeated.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.learning import THRESHOLD, time_to

from rlhf.run import die_with_parent, faults_as_sentences, git_revision, say, write_json

RECIPE = "recipes/tiny/grpo.yaml"
FOLDER = Path("outputs/process_rewards")
JSON = Path("docs/benchmarks/process_rewards.json")
COMPLETIONS = 256
"""Whose mean accuracy must reach the threshold, and not fall below it again."""
VARIANTS = {"outcome": "", "sum": "algorithm.step_credit=sum", "min": "algorithm.step_credit=min"}
"""What a token is responsible for; `outcome` has no process rewards."""


def rewards_of(variant: str, process_model: str, weight: float, step_value: str) -> str:
    """The override of `rewards`."""
    process = f", {{name: process, kind: process_reward_model, path: {process_model}, weight: {weight}, step_value: {step_value}}}"
    return f"rewards=[{{name: correctness}}, {{name: format, weight: 0.1}}{process if variant != 'outcome' else ''}]"


def run(given: argparse.Namespace) -> None:
    for seed in given.seeds:
        for variant in given.variants:
            label = given.label or variant
            folder = FOLDER / f"{label}-{seed}"
            changes = [rewards_of(variant, given.process_model, given.weight, given.step_value), *given.change]
            changes += [VARIANTS[variant]] if VARIANTS[variant] else []
            command = ["scripts/train_grpo.py", "--config", RECIPE, f"output_dir={folder}", f"seed={seed}", *changes]
            subprocess.run([sys.executable, *command], check=True, env=os.environ, preexec_fn=die_with_parent)
            record(given.json, label, seed, changes, folder)


def record(file: Path, label: str, seed: int, changes: list[str], folder: Path) -> None:
    """Put a run's figures into the JSON file, in the place of an older run of that name."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    batches: list[dict[str, float]] = []
    completions = completions_of(folder)
    for row in rows:
        before = batches[-1]["sampled_tokens"] if batches else 0
        tokens = round(row["rollout/length"] * completions)
        batches.append(
            {
                "sampled_tokens": before + tokens,
                "correctness": row["reward/correctness"],
                "length": row["rollout/length"],
            }
        )
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"runs": []}
    others = [r for r in found["runs"] if (r["label"], r["seed"]) != (label, seed)]
    row = {
        "label": label,
        "seed": seed,
        "changes": changes,
        "completions": completions,
        "commit": git_revision(),
        "batches": batches,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"runs": sorted([*others, row], key=lambda r: (r["label"], r["seed"]))})


def completions_of(folder: Path) -> int:
    """Completions of a rollout batch."""
    import yaml

    rollout = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["rollout"]
    return rollout["prompts_per_batch"] * rollout["samples_per_prompt"]


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: tokens to the threshold, run by run and in the mean."""
    lines = [
        f"| run | seed | batches to {THRESHOLD} | sampled tokens to {THRESHOLD} | accuracy of the last {COMPLETIONS} completions |",
        "|---|---|---|---|---|",
    ]
    tokens: dict[str, list[float]] = {}
    for r in runs:
        window = max(COMPLETIONS // r["completions"], 1)
        when = time_to(r["batches"], window=window)
        last = statistics.fmean(b["correctness"] for b in r["batches"][-window:])
        shown = f"{when['batch']} | {when['sampled_tokens']:,}" if when else "never | -"
        lines.append(f"| {r['label']} | {r['seed']} | {shown} | {last:.3f} |")
        tokens.setdefault(r["label"], []).append(when["sampled_tokens"] if when else float("inf"))
    lines += ["", f"| run | mean sampled tokens to {THRESHOLD} | seeds |", "|---|---|---|"]
    for label, of in tokens.items():
        mean = statistics.fmean(of)
        lines.append(
            f"| {label} | {f'{mean:,.0f}' if math.isfinite(mean) else 'not every seed got there'} | {len(of)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train with each kind of reward and each seed")
    runs.add_argument("--variants", nargs="+", choices=list(VARIANTS), required=True)
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.add_argument("--process-model", default="outputs/demo/process_reward_model")
    runs.add_argument("--weight", type=float, default=0.3, help="of the process rewards; correctness has 1")
    runs.add_argument("--step-value", choices=("probability", "signed"), default="probability")
    runs.add_argument("--label", help="name of what was changed; the variant's by default")
    runs.add_argument("--change", nargs="+", default=[], metavar="key.sub=value")
    runs.add_argument("--json", type=Path, default=JSON)
    shown = commands.add_parser("report", help="the table of what has been recorded")
    shown.add_argument("--json", type=Path, default=JSON)
    given = parser.parse_args()
    with faults_as_sentences():
        if given.command == "run":
            run(given)
        elif given.json.is_file():
            say(table(json.loads(given.json.read_text(encoding="utf-8"))["runs"]))
        else:
            raise ValueError(f"{given.json} does not exist; run `benchmark_process_rewards.py run` first")


if __name__ == "__main__":
    main()
