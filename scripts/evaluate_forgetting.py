"""Accuracy on named suites before and after training, and a gate. `python scripts/evaluate_forgetting.py --config recipes/tiny/forgetting/evaluate.yaml`

The exit code is 3 when `gate` refuses the model.
"""

import json
import sys
from pathlib import Path
from typing import Any

from evaluate import evaluate

from rlhf.config import Evaluate, EvaluatedModel, Forgetting
from rlhf.forgetting import forgetting_table, refusals, worst_suite
from rlhf.models import check_model_path
from rlhf.run import Run, finished, is_main_process, open_run, run_stage, say, write_json

REFUSED = 3


def suite_recipe(config: Forgetting, name: str) -> Evaluate:
    """The evaluation of both models on one suite."""
    suite = config.suites[name]
    models = {
        label: EvaluatedModel(path=model.path, revision=model.revision)
        for label, model in (("before", config.before), ("after", config.after))
    }
    return Evaluate(
        stage="evaluate",
        output_dir=str(Path(config.output_dir) / name),
        seed=config.seed,
        models=models,
        chat=config.chat,
        problems=suite.problems,
        benchmark=suite.benchmark,
        num_problems=suite.num_problems,
        rollout=config.rollout,
        accept=config.accept,
    )


def evaluate_forgetting(config: Forgetting, run: Run) -> None:
    for key, model in (("before", config.before), ("after", config.after)):
        check_model_path(model.path, f"{key}.path")
    suites: dict[str, Any] = {}
    for name in config.suites:
        recipe = suite_recipe(config, name)
        if finished(recipe) is None:
            say(f"\nsuite {name}")
            evaluate(recipe, open_run(recipe))
        found = json.loads((Path(recipe.output_dir) / "results.json").read_text(encoding="utf-8"))
        suites[name] = {
            "before": found["models"]["before"]["pass_at_1"],
            "after": found["models"]["after"]["pass_at_1"],
            "change": found["paired_difference"],
        }
    changes = {name: found["change"] for name, found in suites.items()}
    reasons = refusals(changes, config.gate) if config.gate is not None else []
    table = forgetting_table(suites)
    results = {"suites": suites, "worst": worst_suite(changes), "refused": reasons}
    say(f"\n{table}")
    if is_main_process():
        (run.folder / "forgetting.md").write_text(f"{table}\n", encoding="utf-8")
        write_json(run.folder / "forgetting.json", results)
    if reasons:
        say("refused by gate.max_fall: " + "; ".join(reasons))
        sys.exit(REFUSED)
    run.finish(**results)


if __name__ == "__main__":
    run_stage(Forgetting, evaluate_forgetting)
