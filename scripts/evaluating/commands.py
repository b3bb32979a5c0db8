"""The commands of scripts/evaluate.py that evaluate nothing: two evaluations compared, and what a planned one will be able to show."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.benchmarks import size_of
from rlhf.evaluation import ORIGINAL
from rlhf.evaluation_files import compare_evaluations, comparison_text, read_evaluated
from rlhf.power import power_text
from rlhf.run import write_json
from rlhf.uncertainty import Spread


def compare_command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="evaluate.py compare", description="Two evaluations of the same problems.")
    parser.add_argument("baseline", metavar="FOLDER[:LABEL]")
    parser.add_argument("other", metavar="FOLDER[:LABEL]")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    given = parser.parse_args(arguments)
    compared = compare_evaluations(read_evaluated(given.baseline), read_evaluated(given.other))
    print(comparison_text(compared))
    if given.output:
        write_json(Path(given.output), compared)


def power_command(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="evaluate.py power", description="What an evaluation will be able to show.")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--benchmark", help="a published benchmark, for its number of problems")
    size.add_argument("--problems", type=int, help="a number of problems")
    parser.add_argument("--k", type=int, default=1, help="samples a problem")
    parser.add_argument("--accuracy", type=float, default=0.5, help="expected pass@1")
    parser.add_argument(
        "--concentration", type=float, default=2.0, help="a + b of the Beta distribution of difficulty; 2 is uniform"
    )
    parser.add_argument("--correlation", type=float, default=0.5, help="of what two models find hard")
    parser.add_argument(
        "--run", metavar="FOLDER[:LABEL]", help="take the variances from an evaluation with several samples"
    )
    given = parser.parse_args(arguments)
    problems = given.problems if given.problems is not None else size_of(given.benchmark)
    for name, low, value, high in (
        ("problems", 2, problems, 10**9),
        ("k", 1, given.k, 10**6),
        ("accuracy", 0, given.accuracy, 1),
        ("correlation", -1, given.correlation, 1),
        ("concentration", 1e-3, given.concentration, 1e6),
    ):
        if not low <= value <= high:
            raise ValueError(f"--{name} is {value}; give a number from {low:g} to {high:g}")
    if given.run:
        measured = [p for p in read_evaluated(given.run).problems if p.is_judged and p.variant == ORIGINAL]
        spread = Spread.measured([p.accuracy for p in measured], len(measured[0].verdicts))
        basis = f"variances measured on {len(measured)} problems of {given.run}"
    else:
        spread = Spread.assumed(given.accuracy, given.concentration)
        basis = f"difficulty assumed Beta with mean {given.accuracy:g} and a + b = {given.concentration:g}"
    print(power_text(given.benchmark or "design", problems, given.k, spread, given.correlation, basis))
