"""Evidence for docs/benchmarks/preference_optimisation.md: what ORPO and DPO do to the embedded task's policies.

python scripts/benchmark_preference_optimisation.py run --arms orpo dpo --seeds 0 1 2
python scripts/benchmark_preference_optimisation.py run --arms dpo --label dpo-ipo --change loss=ipo beta=0.1
python scripts/benchmark_preference_optimisation.py run --arms orpo_from_base --seeds 0 1 2
python scripts/benchmark_preference_optimisation.py report

Pairs are the policy's own: of each of 1,024 problems 4 completions, a right one against a wrong one, drawn anew for each seed. Everything starts
from what `make demo` leaves before its reward models. A finished run is not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from benchmarks.commands import run_and_report

from rlhf.evaluation import GradedProblem
from rlhf.evaluation_files import compare_evaluations, read_evaluated
from rlhf.metrics import read_jsonl
from rlhf.report import show_estimate
from rlhf.run import die_with_parent, faults_as_sentences, git_revision, say, write_json

FOLDER = Path("outputs/preferences")
JSON = Path("docs/benchmarks/preference_optimisation.json")
EVALUATION = "recipes/tiny/evaluate.yaml"
PROBLEMS, COMPLETIONS = 1_024, 4
NUM_PAIRS = 25_600
"""For ORPO from an untrained model: as many as the SFT policy saw demonstrations."""
ARMS = {
    "orpo": ("recipes/tiny/orpo.yaml", "sft"),
    "dpo": ("recipes/tiny/dpo.yaml", "sft"),
    "orpo_from_base": ("recipes/tiny/orpo_from_base.yaml", "base"),
}
"""Recipe, and what the arm starts from. An untrained model has no completions to make pairs of: it gets the pairs of the data."""


def launch(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, env=os.environ, preexec_fn=die_with_parent)


def on_policy_pairs(demo: Path, seed: int) -> Path:
    folder = FOLDER / f"pairs-{seed}"
    if not (folder / "run.json").is_file():
        launch(
            "scripts/make_pairs.py", "--config", "recipes/tiny/make_pairs.yaml", f"output_dir={folder}", f"seed={seed}", f"policy.path={demo}/sft",
            f"problems={demo}/data/train_problems.jsonl", f"num_problems={PROBLEMS}", f"first_problem={seed * PROBLEMS}",
            f"rollout.samples_per_prompt={COMPLETIONS}", "pairs_per_problem=1",
        )  # fmt: skip
    return folder / "pairs.jsonl"


def given_pairs() -> Path:
    folder = FOLDER / "data"
    if not (folder / "run.json").is_file():
        changes = [f"output_dir={folder}", f"num_preference_pairs={NUM_PAIRS}"]
        launch("scripts/prepare_data.py", "--config", "recipes/tiny/prepare_data.yaml", *changes)
    return folder / "train_pairs.jsonl"


def evaluate(demo: Path, models: dict[str, Path]) -> None:
    """500 unseen problems, 4 samples each, of every model that has not been evaluated yet."""
    missing = {name: path for name, path in models.items() if not (FOLDER / "evaluation" / name / "run.json").is_file()}
    for name, path in missing.items():
        folder = FOLDER / "evaluation" / name
        recipe = yaml.safe_load(Path(EVALUATION).read_text(encoding="utf-8"))
        recipe |= {"output_dir": str(folder), "models": {"policy": {"path": str(path)}}}
        recipe["problems"] = str(demo / "data/test_problems.jsonl")
        file = FOLDER / "evaluation" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        launch("scripts/evaluate.py", "--config", str(file))


def run(given: argparse.Namespace) -> None:
    evaluate(given.demo, {"sft": given.demo / "sft"})
    for seed in given.seeds:
        for arm in given.arms:
            name = f"{given.label or arm}-{seed}"
            folder, (recipe, start) = FOLDER / name, ARMS[arm]
            pairs = given_pairs() if start == "base" else on_policy_pairs(given.demo, seed)
            changes = [f"seed={seed}", f"model.path={given.demo / start}", f"pairs={pairs}", *given.change]
            stage = yaml.safe_load(Path(recipe).read_text(encoding="utf-8")).get("stage", "orpo")
            launch(f"scripts/train_{stage}.py", "--config", recipe, f"output_dir={folder}", *changes)
            evaluate(given.demo, {name: folder})
            record(given.json, given.label or arm, seed, start, changes)


def at_once(problems: list[GradedProblem]) -> float:
    """Share of the samples that answer without a scratchpad."""
    return statistics.fmean("<think>\n</think>" in text for problem in problems for text in problem.texts)


def record(file: Path, label: str, seed: int, start: str, changes: list[str]) -> None:
    """Put a run's figures into the JSON file, in the place of an older run of that name."""
    name = f"{label}-{seed}"
    before, after = (read_evaluated(str(FOLDER / "evaluation" / n)) for n in ("sft", name))
    difference = compare_evaluations(before, after)["difference"]
    done = json.loads((FOLDER / name / "run.json").read_text(encoding="utf-8"))
    row = {
        "label": label,
        "seed": seed,
        "start": start,
        "changes": [c for c in changes if not c.startswith(("model.path=", "pairs=", "seed="))],
        "commit": git_revision(),
        "after": after.card["scores"]["pass_at_1"],
        "difference": {key: difference[key] for key in ("mean", "low", "high", "n", "p_value")},
        "length": statistics.fmean(length for p in after.problems for length in p.lengths),
        "at_once": at_once(after.problems),
        "pairs": done["pairs"],
        "seconds": done["seconds"],
        "metrics": read_jsonl(FOLDER / name / "metrics.jsonl"),
    }
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"runs": []}
    others = [r for r in found["runs"] if (r["label"], r["seed"]) != (label, seed)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        {
            "before": {
                "pass_at_1": before.card["scores"]["pass_at_1"],
                "length": statistics.fmean(length for p in before.problems for length in p.lengths),
                "at_once": at_once(before.problems),
            },
            "hardware": before.card["hardware"],
            "runs": sorted([*others, row], key=lambda r: (r["label"], r["seed"])),
        },
    )


def table(found: dict[str, Any]) -> str:
    """Markdown: every run against the SFT policy on the same problems."""
    before = found["before"]
    lines = [
        "| run | seed | starts from | pairs | pass@1 | difference from SFT, paired | tokens | answers at once |",
        "|---|---|---|---|---|---|---|---|",
        f"| SFT | - | - | - | {show_estimate(before['pass_at_1'])} | - | {before['length']:.1f} | {before['at_once']:.2f} |",
    ]
    for r in found["runs"]:
        lines.append(
            f"| {r['label']} | {r['seed']} | {r['start']} | {r['pairs']['used']:,} | {show_estimate(r['after'])} "
            f"| {show_estimate(r['difference'], signed=True)} | {r['length']:.1f} | {r['at_once']:.2f} |"
        )
    lines += ["", "| run | seeds | mean difference from SFT | lowest end of an interval |", "|---|---|---|---|"]
    for label in dict.fromkeys(r["label"] for r in found["runs"]):
        of = [r["difference"] for r in found["runs"] if r["label"] == label]
        lines.append(
            f"| {label} | {len(of)} | {statistics.fmean(d['mean'] for d in of):+.3f} | {min(d['low'] for d in of):+.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser, _, runs, _ = run_and_report(__doc__, ARMS, JSON, picture=False)
    runs.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="what `make demo` left")
    given = parser.parse_args()
    with faults_as_sentences():
        if given.command == "run":
            run(given)
        elif given.json.is_file():
            say(table(json.loads(given.json.read_text(encoding="utf-8"))))
        else:
            raise ValueError(f"{given.json} does not exist; run `benchmark_preference_optimisation.py run` first")


if __name__ == "__main__":
    main()
