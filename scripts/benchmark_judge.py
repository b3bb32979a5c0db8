"""Verdicts a second of a judge with 1, 8 and 64 requests in flight, and out of the cache. `python scripts/benchmark_judge.py --url http://127.0.0.1:8500/v1`"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from reward_models.judge import Judge, status_counts
from reward_models.judge_protocol import Case
from rlhf.config import JudgeModel
from rlhf.run import faults_as_sentences


def cases(count: int, label: str) -> list[Case]:
    """Questions that no other call asks."""
    return [Case(f"What is {n} + {n}? ({label})", f"It is {2 * n}.", str(2 * n)) for n in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument(
        "--rows", type=int, default=192, help="verdicts per measurement, 16 times those in flight at most"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--explanation-chars", type=int, default=40)
    arguments = parser.parse_args()

    def judge(concurrency: int, cache: str | None = None) -> Judge:
        c = arguments.explanation_chars
        config = JudgeModel(
            url=arguments.url,
            concurrency=concurrency,
            cache=cache,
            explanation_chars=c,
            max_tokens=64 + 4 * c,
            temperature=1.0,
        )
        return Judge(config)

    with faults_as_sentences():
        judge(1).connect()
    per_second: dict[int, list[float]] = {n: [] for n in arguments.in_flight}
    client: dict[int, list[float]] = {n: [] for n in arguments.in_flight}
    for number in range(arguments.rounds):
        for n in arguments.in_flight:
            asked, rows = judge(n), cases(min(arguments.rows, 16 * n), f"{number} {n} {time.time()}")
            started, own = time.perf_counter(), time.process_time()
            judged = asked.grade(rows)
            seconds = time.perf_counter() - started
            per_second[n].append(len(rows) / seconds)
            client[n].append(1000 * (time.process_time() - own) / len(rows))
            print(
                f"round {number + 1}, {n} in flight: {seconds:.1f} s, {status_counts(judged)}, {asked.num_retried} retried",
                file=sys.stderr,
            )
    print(
        "| in flight | verdicts a second, median (lowest to highest) | client's own time, ms a verdict |\n|---|---|---|"
    )
    for n, speeds in per_second.items():
        print(
            f"| {n} | {statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f}) | {statistics.median(client[n]):.2f} |"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "verdicts.sqlite")
        asked, rows = judge(64, path), cases(arguments.rows, f"cached {time.time()}")
        asked.grade(rows)
        again = judge(64, path)
        again.grade(rows[:1])  # asks for the list of models
        started = time.perf_counter()
        for _ in range(10):
            again.grade(rows)
        speed = 10 * len(rows) / (time.perf_counter() - started)
        print(f"\nfrom the cache: {speed:,.0f} verdicts a second, {again.num_asked} requests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
