"""Everything that can be wrong and can be found without a GPU, in seconds, before a model is loaded.

python scripts/check.py recipes/gsm8k/grpo.yaml --accelerate recipes/accelerate/zero2.yaml [key.sub=value ...]

A line for each thing looked at: ok, warning, or error with its repair. Exit code 0 without errors, else 1. A pipeline is checked stage
by stage; what an earlier stage will make need not be there.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from checks import environment, inputs, shapes
from checks.findings import Context, Report

from rlhf.config import Config, Pipeline, batch_arithmetic, load_config
from rlhf.pipeline import load_stages
from rlhf.run import check_output_dir, finished, quiet_libraries

ROOT = Path(__file__).parents[1]


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("recipe", metavar="RECIPE")
    main.add_argument("overrides", nargs="*", metavar="key.sub=value")
    main.add_argument(
        "--accelerate", metavar="FILE", help="the configuration it will be launched with; a pipeline names its own"
    )
    return main


def check(recipe: str, overrides: list[str], accelerate: str | None) -> bool:
    """Check a recipe and print the findings; whether there is no error."""
    report = Report()
    config = report.attempt(
        "recipe", lambda: load_config(recipe, overrides), lambda c: f"{recipe} is a recipe for the stage {c.stage}"
    )
    if config is None:
        return False
    if not isinstance(config, Pipeline):
        settings = environment.read_accelerate(report, accelerate)
        check_stage(report, config, Context(accelerate=settings))
        return not report.failed
    report.attempt("output_dir", lambda: check_output_dir(config), lambda _: config.output_dir)
    loaded = report.attempt(
        "stages", lambda: load_stages(config), lambda s: f"{len(s)}, each valid, each with a folder of its own"
    )
    settings = environment.read_accelerate(report, config.accelerate_config)
    stages = [stage for stage, _ in loaded or ()]
    for number, stage in enumerate(stages):
        print(f"\n[{number + 1}/{len(stages)}] {stage.stage}")
        if finished(stage) is not None:
            report.add("ok", "finished", f"{stage.output_dir} holds this run, finished; it will be skipped")
            continue
        check_stage(report, stage, Context(accelerate=settings, earlier=tuple(stages[:number])))
    return not report.failed


def check_stage(report: Report, config: Config, context: Context) -> None:
    """All checks of one stage."""
    report.attempt(
        "batch",
        lambda: batch_arithmetic(config, context.num_ranks),
        lambda rows: f"divides over {context.num_ranks} ranks" if rows else "none",
    )
    report.attempt("output_dir", lambda: check_output_dir(config), lambda _: config.output_dir)
    environment.check_versions(report, config, context, pyproject=ROOT / "pyproject.toml")
    environment.check_ranks(report, context)
    environment.check_quantization(report, config, context)
    inputs.check_sources(report, config)
    inputs.check_servers(report, config)
    records = inputs.check_records(report, config, context)
    there = inputs.check_models(report, config, context)
    inputs.check_text(report, config, records, there)
    trained = shapes.trained_models(report, config, context)
    shapes.check_leaves(report, trained)
    shapes.check_routers(report, config, trained)
    environment.check_disk(report, config, shapes.checkpoint_sizes(trained))


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    arguments = parser().parse_intermixed_args()
    quiet_libraries()
    return 0 if check(arguments.recipe, arguments.overrides, arguments.accelerate) else 1


if __name__ == "__main__":
    sys.exit(main())
