"""Grade answers. `python scripts/grade.py --cases IN.jsonl --output OUT.jsonl [--workers N] [--audit]`"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from reward_models.grading import GraderPool
from reward_models.grading.audit import audit, read_cases
from reward_models.grading.extraction import ACCEPT


def graded(rows: list[dict], pool: GraderPool) -> Iterator[dict]:
    for i, (row, judged) in enumerate(
        zip(rows, pool.stream((r["completion"], r["reference"]) for r in rows), strict=True), 1
    ):
        if sys.stderr.isatty() and (i % 500 == 0 or i == len(rows)):
            print(f"\r{i:,}/{len(rows):,}", end="" if i < len(rows) else "\n", file=sys.stderr, flush=True)
        yield {
            "id": row["id"],
            "verdict": judged.verdict,
            "reason": judged.reason,
            "extracted": judged.extracted,
            "seconds": round(judged.seconds, 6),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--accept", choices=ACCEPT, default="bare", help="how plainly a completion must say its answer")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--audit", action="store_true", help="compare with the rows' `expected`")
    arguments = parser.parse_args()
    try:
        rows = read_cases(arguments.cases)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with GraderPool(workers=arguments.workers, timeout=arguments.timeout, accept=arguments.accept) as pool:
        results = list(graded(rows, pool))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results), encoding="utf-8", errors="backslashreplace"
    )
    if arguments.audit:
        print(audit(rows, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
