"""Evidence for docs/benchmarks/evaluation.md.

python scripts/benchmark_evaluation.py outputs ../shared/data/outputs [--disagreements FILE]
python scripts/benchmark_evaluation.py coverage
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from reward_models.grading import Grade, GraderPool
from reward_models.grading.extraction import Accept
from rlhf import uncertainty
from rlhf.report import printable
from rlhf.run import faults_as_sentences
from rlhf.uncertainty import bootstrap, difference, share, standard_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample of a public file."""

    completion: str
    reference: str
    label: bool | None = None
    """What the file says of it, where it does."""
    extracted: str | None = None
    """The answer its authors found in it."""
    their_reference: str | None = None
    """The reference as their harness rewrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """A file of public model outputs."""

    file: str
    rows: Callable[[dict[str, Any]], Iterator[Row]]
    accept: Accept
    published: float | None
    """Accuracy as its authors state it."""
    problems: int | None = None
    """What the published accuracy is a share of, where the file holds only some of it."""


def harness(row: dict[str, Any]) -> Iterator[Row]:
    labels = row.get("score", [None] * len(row["code"]))
    for completion, label, extracted in zip(row["code"], labels, row["pred"], strict=True):
        yield Row(
            completion=completion,
            reference=row.get("answer", row["gt"]),  # `gt` went through string rules that lose words and letters
            label=label,
            extracted=extracted,
            their_reference=row["gt"],
        )


def nemo(row: dict[str, Any]) -> Iterator[Row]:
    yield Row(
        completion=row["generation"],
        reference=row["expected_answer"],
        label=row["symbolic_correct"],
        extracted=row["predicted_answer"],
    )


def rasbt(row: dict[str, Any]) -> Iterator[Row]:
    yield Row(completion=row["prediction"] or "", reference=row["answer"])


def mathcoder(row: dict[str, Any]) -> Iterator[Row]:
    written = [m["content"] for m in row["debug_result"] if m["role"] == "text"]
    reference = row["ground_truth"]["answer"]
    yield Row(completion="\n".join(written), reference=reference, label=True, extracted=row["completion"])


FILES = (
    Outputs(file="rho-math-1b-v0.1_minerva.jsonl", rows=harness, accept="marked", published=0.156),
    Outputs(file="rho-math-7b-v0.1_minerva.jsonl", rows=harness, accept="marked", published=0.310),
    Outputs(file="rho-math-1b-interpreter-v0.1_minerva.jsonl", rows=harness, accept="marked", published=0.406),
    Outputs(file="rho-math-7b-interpreter-v0.1_minerva.jsonl", rows=harness, accept="marked", published=0.518),
    Outputs(file="tora70b_gsm8k.jsonl", rows=harness, accept="marked", published=0.843),
    Outputs(file="mathcoder_l7b_math_correct.jsonl", rows=mathcoder, accept="bare", published=None, problems=5000),
    Outputs(file="qwen_math_cot_100.jsonl", rows=harness, accept="boxed", published=None),
    Outputs(file="nemo_output_rs0.jsonl", rows=nemo, accept="boxed", published=None),
    Outputs(file="nemo_output_rs1.jsonl", rows=nemo, accept="boxed", published=None),
    Outputs(file="nemo_output_rs2.jsonl", rows=nemo, accept="boxed", published=None),
    Outputs(file="rasbt_math500_gpt.json", rows=rasbt, accept="boxed", published=None),
    Outputs(file="rasbt_math500_qwen3.json", rows=rasbt, accept="boxed", published=None),
)


def read(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; point this at the folder with the published outputs")
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def outputs(folder: Path, disagreements: Path | None) -> None:
    """Accuracy of every file under our grader, beside what was published and what its labels say."""
    print(
        "| file | samples | published | labelled | ours | ours on the answer they extracted | ours right, label wrong | ours wrong, label right | undecided |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for source in FILES:
        rows = [row for raw in read(folder / source.file) for row in source.rows(raw)]
        with GraderPool(workers=2, accept=source.accept) as pool:
            grades = pool.grade_many([(row.completion, row.reference) for row in rows])
            theirs = pool.grade_many(
                [(f"\\boxed{{{row.extracted or ''}}}", row.their_reference or row.reference) for row in rows]
            )
        right = [g.verdict == "correct" for g in grades]
        of = source.problems or len(rows)
        labels = [row.label for row in rows if row.label is not None]
        extracted = sum(g.verdict == "correct" for g in theirs) / of if any(row.extracted for row in rows) else None
        more = [i for i, row in enumerate(rows) if row.label is False and right[i]]
        fewer = [i for i, row in enumerate(rows) if row.label is True and not right[i]]
        found += [_shown(source.file, i, rows[i], grades[i]) for i in (*more, *fewer)]
        print(
            f"| {source.file} | {len(rows)} | {'-' if source.published is None else f'{source.published:.1%}'} "
            f"| {f'{sum(labels) / of:.1%}' if labels else '-'} | {sum(right) / of:.1%} "
            f"| {'-' if extracted is None else f'{extracted:.1%}'} "
            f"| {len(more) if labels else '-'} | {len(fewer) if labels else '-'} "
            f"| {sum(g.verdict == 'undecided' for g in grades)} |",
            flush=True,
        )
    if disagreements is not None:
        disagreements.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def _shown(file: str, index: int, row: Row, grade: Grade) -> dict[str, Any]:
    return {
        "file": file,
        "row": index,
        "label": row.label,
        "verdict": grade.verdict,
        "reason": grade.reason,
        "reference": printable(row.reference),
        "extracted": printable(str(grade.extracted)),
        "end": printable(row.completion[-200:]),
    }


def coverage(runs: int) -> None:
    """How often each interval holds the truth, over populations of problems with Beta difficulty."""
    print(
        "| problems | samples | difficulty | mean ± z se | mean ± t se | Wilson, clustered (shown) | bootstrap percentiles | expanded (shown) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    uncertainty.RESAMPLES = 2000  # enough to count how often an interval holds
    rng = np.random.default_rng(0)
    populations = {
        "uniform": (1, 1),
        "easy or hard": (0.5, 0.5),
        "alike": (5, 5),
        "mean 0.1": (0.3, 2.7),
        "mean 0.9": (2.7, 0.3),
    }
    for n in (30, 40, 500):
        for k in (1, 4, 64):
            for name, (a, b) in populations.items():
                truth = a / (a + b)
                accuracies = rng.binomial(k, rng.beta(a, b, (runs, n))) / k
                held = [hits(row, k, truth, seed=i) for i, row in enumerate(accuracies)]
                print(
                    f"| {n} | {k} | {name} | "
                    + " | ".join(f"{np.mean(c):.1%}" for c in zip(*held, strict=True))
                    + " |",
                    flush=True,
                )
    print("\n| problems | samples | paired difference, mean ± t se (shown) | bootstrap, expanded |\n|---|---|---|---|")
    for n in (30, 40, 500):
        for k in (1, 8, 64):
            p = rng.beta(1, 1, (runs, n))
            drawn = (rng.binomial(k, p + 0.5 * p * (1 - p)) - rng.binomial(k, p)) / k
            held = [
                [(e := difference(row)).low <= 1 / 12 <= e.high, (e := bootstrap(row, seed=i)).low <= 1 / 12 <= e.high]
                for i, row in enumerate(drawn)
            ]
            print(
                f"| {n} | {k} | " + " | ".join(f"{np.mean(c):.1%}" for c in zip(*held, strict=True)) + " |", flush=True
            )


def hits(accuracies: np.ndarray, k: int, truth: float, *, seed: int) -> list[bool]:
    """Whether each of the five intervals holds the truth."""
    values = accuracies.tolist()
    n, mean, error = len(values), float(np.mean(values)), standard_error(values)
    shown, expanded = share(values, samples=k), bootstrap(values, seed=seed)
    t = difference(values)
    generator = np.random.default_rng(seed)
    plain = np.quantile(accuracies[generator.integers(0, n, (2000, n))].mean(1), (0.025, 0.975))
    z = NormalDist().inv_cdf(0.975)
    return [
        math.fabs(mean - truth) <= z * error,
        t.low <= truth <= t.high,
        shown.low <= truth <= shown.high,
        bool(plain[0] <= truth <= plain[1]),
        expanded.low <= truth <= expanded.high,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    graded = commands.add_parser("outputs", help="accuracy of public model outputs under our grader")
    graded.add_argument("folder", type=Path)
    graded.add_argument("--disagreements", type=Path, metavar="FILE")
    simulated = commands.add_parser("coverage", help="how often the intervals hold the truth")
    simulated.add_argument("--runs", type=int, default=1000)
    given = parser.parse_args()
    started = time.perf_counter()
    with faults_as_sentences():
        outputs(given.folder, given.disagreements) if given.command == "outputs" else coverage(given.runs)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
