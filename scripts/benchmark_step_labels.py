"""Evidence for docs/benchmarks/step_labels.md: what each estimate of the step labels costs, how true they are, and what is learnt from them.

python scripts/run_pipeline.py --config recipes/tiny/slips/pipeline.yaml
python scripts/benchmark_step_labels.py --problems 60

For each estimate it runs recipes/tiny/slips/label_steps.yaml on the same solutions, then process_reward_model.yaml on the labels; labels of the soft
estimate train twice, as booleans and as probabilities. Truth is the generator's. What is finished is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.records import LabelledSteps, read_records
from data.stories import judge_steps, read_story
from reward_models.processbench import NO_ERROR, first_wrong
from rlhf.report import show_estimate
from rlhf.run import die_with_parent, faults_as_sentences, git_revision, say, write_json

FOLDER = Path("outputs/step_labels")
RECIPES = "recipes/tiny/slips"
JSON = Path("docs/benchmarks/step_labels.json")
RUNS = (("soft", "hard"), ("soft", "soft"), ("hard", "hard"), ("binary_search", "hard"))
"""(estimate, what the process model is trained with)"""


def launch(stage: str, recipe: str, *overrides: str) -> None:
    command = [sys.executable, f"scripts/{stage}.py", "--config", f"{RECIPES}/{recipe}.yaml", *overrides]
    subprocess.run(command, check=True, env=os.environ, preexec_fn=die_with_parent)


def truth_of(records: Sequence[LabelledSteps]) -> dict[str, Any]:
    """First wrong steps that were named, against the generator's."""
    named = [first_wrong(record.labels) for record in records]
    true = [first_wrong(judge_steps(read_story(record.question), record.steps)) for record in records]
    found = sum(n == t != NO_ERROR for n, t in zip(named, true, strict=True))
    return {
        "solutions": len(records),
        "wrong": sum(t != NO_ERROR for t in true),
        "named": sum(n != NO_ERROR for n in named),
        "found": found,
        "left_alone": sum(n == t == NO_ERROR for n, t in zip(named, true, strict=True)),
    }


def one(estimate: str, labels: str, problems: int) -> dict[str, Any]:
    """Label, unless that is done, and train."""
    labelled, trained = FOLDER / f"labels-{estimate}", FOLDER / f"model-{estimate}-{labels}"
    launch(
        "label_steps", "label_steps", f"output_dir={labelled}", f"estimate={estimate}", f"num_problems={problems}",
        f"rollout.problems_per_chunk={problems}",
    )  # fmt: skip
    file = labelled / "labelled_steps.jsonl"
    launch(
        "train_process_reward_model", "process_reward_model", f"output_dir={trained}", f"train_steps={file}", f"labels={labels}"
    )  # fmt: skip
    cost, model = (json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (labelled, trained))
    return {
        "estimate": estimate,
        "labels": labels,
        "sampled_tokens": {key: cost[f"{key}_tokens"] for key in ("solution", "completion")},
        "prefixes": cost["prefixes"],
        **truth_of(read_records(LabelledSteps, str(file))),
        "f1": model["f1"],
        "commit": git_revision(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| estimate | labels | prefixes | sampled tokens of completions | first wrong step: recall | precision | right solutions left alone | F1 of the process model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        right = r["solutions"] - r["wrong"]
        lines.append(
            f"| {r['estimate']} | {r['labels']} | {r['prefixes']:,} | {r['sampled_tokens']['completion']:,} "
            f"| {r['found'] / r['wrong']:.3f} ({r['found']} of {r['wrong']}) | {r['found'] / r['named']:.3f} (of {r['named']}) "
            f"| {r['left_alone']} of {right} | {show_estimate(r['f1'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--json", type=Path, default=JSON)
    given = parser.parse_args()
    with faults_as_sentences():
        rows = [one(estimate, labels, given.problems) for estimate, labels in RUNS]
        write_json(given.json, {"problems": given.problems, "runs": rows})
        say(table(rows))


if __name__ == "__main__":
    main()
