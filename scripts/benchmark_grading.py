"""This grader and math-verify on the same labelled rows, alternating. `python scripts/benchmark_grading.py --cases ../shared/data/grading_dev.jsonl`"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from reward_models.grading import GraderPool, grade
from reward_models.grading.audit import read_cases

MATHEMATICS = ("\\boxed", "$", "\\(", "\\[")


def math_verify_grader() -> Callable[[str, str], bool]:
    """math-verify at its best use: the reference between dollar signs, a bare answer in a box."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def judge(completion: str, reference: str) -> bool:
        gold = reference if any(sign in reference for sign in MATHEMATICS) else f"${reference}$"
        bare = len(completion) < 60 and not any(sign in completion for sign in MATHEMATICS) and " is" not in completion
        return verify(parse(gold), parse(f"\\boxed{{{completion}}}" if bare else completion))

    return judge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = [r for r in read_cases(arguments.cases) if isinstance(r.get("expected"), bool) and not r.get("ambiguous")]
    pairs = [(r["completion"] or "", r["reference"] or "") for r in rows]
    math_verify = math_verify_grader()
    pool = GraderPool(workers=2, accept="bare")
    contestants: dict[str, Callable[[], list[bool]]] = {
        "ours": lambda: [grade(c, r, accept="bare").verdict == "correct" for c, r in pairs],
        "ours, 2 workers": lambda: [g.verdict == "correct" for g in pool.grade_many(pairs)],
        "math-verify": lambda: [math_verify(c, r) for c, r in pairs],
    }
    pool.grade_many(pairs[:8])
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    verdicts: dict[str, list[bool]] = {}
    for number in range(arguments.rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            verdicts[name] = run()
            seconds[name].append(time.perf_counter() - started)
        print(f"round {number + 1}/{arguments.rounds}", file=sys.stderr)
    pool.close()
    print(f"{len(rows)} rows, {arguments.rounds} rounds, alternating")
    for name, given in verdicts.items():
        wrong = [(g, r["expected"]) for g, r in zip(given, rows, strict=True) if g != r["expected"]]
        ratios = [base / own for base, own in zip(seconds["math-verify"], seconds[name], strict=True)]
        print(
            f"{name:16} agreement {1 - len(wrong) / len(rows):.4f}  false positives {sum(g for g, _ in wrong):3}  false negatives "
            f"{sum(e for _, e in wrong):3}  {len(rows) / statistics.median(seconds[name]):8,.0f} rows/s  {statistics.median(ratios):6.1f} x math-verify"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
