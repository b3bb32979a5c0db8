"""Speed and memory of data preparation on generated rows.

    python scripts/benchmark_data.py memory --rows 10000000     peak memory of all processes together
    python scripts/benchmark_data.py compare --rows 200000      against a plain `datasets.map`, alternating in one run

The rows are random words with a few function words, numbers and operators, about 230 characters each: 3 % are exact copies of an earlier row, 3 % copies
with one word changed, 1 % too long, 1 % in German, and 0.1 % hold one of 2,000 generated evaluation problems.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from data.decontamination import BLIND_WORDS, Rules
from data.duplicates import BANDS, PLACES, SEED
from data.files import SUFFIXES
from data.filters import FUNCTION_WORDS, Filters
from data.plan import BenchmarkPlan, Plan, SourcePlan
from data.prepare import prepare
from data.tokenizer import train_tokenizer
from rlhf.run import say

ENGLISH, GERMAN = FUNCTION_WORDS["en"].split(), FUNCTION_WORDS["de"].split()
ROWS_PER_PART = 250_000
PROBLEMS = 2_000
THRESHOLD = 0.8


def vocabulary() -> list[str]:
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "il", "on")]
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 3)))) for _ in range(20_000)]


WORDS = vocabulary()


def sentence(rng: random.Random, little: list[str] = ENGLISH, length: int = 24) -> str:
    words = rng.choices(WORDS, k=length)
    words[::4] = rng.choices(little, k=len(words[::4]))
    return f"{' '.join(words)} {rng.randint(2, 9999)} + {rng.randint(2, 99)} x = {rng.randint(2, 999)}?"


def question(rng: random.Random, earlier: list[str], problems: list[str]) -> str:
    kind = rng.random()
    if kind < 0.03 and earlier:
        return rng.choice(earlier)
    if kind < 0.06 and earlier:
        words = rng.choice(earlier).split()
        words[-1] = rng.choice(WORDS)
        return " ".join(words)
    if kind < 0.07:
        return " ".join(sentence(rng) for _ in range(4))
    if kind < 0.08:
        return f"{sentence(rng, GERMAN)} {sentence(rng, GERMAN, 8)}"
    if kind < 0.081:
        return f"{rng.choice(problems)} {sentence(rng, length=4)}"
    text = f"{sentence(rng)} {sentence(rng, length=8)}"
    if len(earlier) < 5_000:
        earlier.append(text)
    else:
        earlier[rng.randrange(5_000)] = text
    return text


def write_part(part: int, rows: int, path: Path, problems: list[str]) -> None:
    rng, earlier = random.Random(part), []
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(json.dumps({"problem": question(rng, earlier, problems), "answer": "1"}) + "\n")


def generate(folder: Path, rows: int) -> tuple[Path, Path, Path]:
    """(folder of rows, file of evaluation problems, tokenizer folder)."""
    rng = random.Random("problems")
    problems = [sentence(rng, length=30) for _ in range(PROBLEMS)]
    evaluation, parts, tokenizer = folder / "evaluation.jsonl", folder / "rows", folder / "tokenizer"
    evaluation.write_text("".join(json.dumps({"problem": p, "answer": "1"}) + "\n" for p in problems))
    parts.mkdir()
    sizes = [min(ROWS_PER_PART, rows - start) for start in range(0, rows, ROWS_PER_PART)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for i, size in enumerate(sizes):
            pool.submit(write_part, i, size, parts / f"part-{i:04}.jsonl", problems)
    train_tokenizer([sentence(rng) for _ in range(5_000)], vocab_size=4_000).save_pretrained(tokenizer)
    return parts, evaluation, tokenizer


def plan(parts: Path, evaluation: Path, tokenizer: Path, *, max_tokens: int, processes: int) -> Plan:
    return Plan(
        sources=(SourcePlan(name="jsonl", path=str(parts)),),
        filters=Filters(tokenizer=str(tokenizer), max_tokens=max_tokens, languages=("en",), min_letter_share=0.5),
        near_threshold=THRESHOLD,
        benchmarks={"jsonl": BenchmarkPlan(path=str(evaluation))},
        processes=processes,
    )


class PeakMemory:
    """Largest sum of resident memory over this process and all below it, in GiB. Pages that processes share count in each."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.2):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total / 2**30)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


# ------------------------------------------------------------------------------------------------- the same steps, row by row

_WORD = re.compile(r"[^\W\d_]+|\d+|[-+*/^=<>]")


def plain_steps(parts: Path, evaluation: Path, tokenizer_path: Path, output: Path, *, max_tokens: int) -> int:
    """Length, language, letters, duplicates and decontamination with `datasets.map`, one row at a time, in one process; rows kept."""
    import datasets
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]
    from transformers import AutoTokenizer
    from xxhash import xxh3_64_intdigest

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    rules = Rules()
    little = {language: set(words.split()) for language, words in FUNCTION_WORDS.items()}

    def grams(words: list[str], n: int) -> set[str]:
        return {" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}

    def blind(words: list[str]) -> list[str]:
        marked = ["#" if w.isdigit() else w for w in words if w.isalnum()]
        return [w for i, w in enumerate(marked) if w != "#" or i == 0 or marked[i - 1] != "#"]

    problems = [_WORD.findall(json.loads(line)["problem"].lower()) for line in evaluation.open()]
    plain_grams = [grams(words, rules.ngram_words) for words in problems]
    blind_grams = [grams(blind(words), BLIND_WORDS) for words in problems]
    owners: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for listed, owner in ((plain_grams, owners[0]), (blind_grams, owners[1])):
        for i, own in enumerate(listed):
            for gram in own:
                owner.setdefault(gram, []).append(i)

    def contaminated(words: list[str]) -> bool:
        for which, own in enumerate((grams(words, rules.ngram_words), grams(blind(words), BLIND_WORDS))):
            shared: dict[int, int] = {}
            for gram in own:
                for i in owners[which].get(gram, ()):
                    shared[i] = shared.get(i, 0) + 1
            for i, count in shared.items():
                if which == 0 and count >= rules.overlap * len(plain_grams[i]):
                    return True
                if which == 1 and count >= rules.similarity * (len(blind_grams[i]) + len(own) - count):
                    return True
        return False

    def step(row: dict[str, Any]) -> dict[str, Any]:
        text = row["problem"].strip()
        words = _WORD.findall(text.lower())
        found = {language: sum(w in known for w in words) for language, known in little.items()}
        best = max(found, key=lambda language: found[language])
        letters = sum(map(str.isalpha, text)) / max(len(text) - text.count(" "), 1)
        sketch = RMinHash(PLACES, SEED)
        sketch.update(list(grams(words, 5)))
        digest = [place & 0xFFFF for place in sketch.digest()]
        keep = (
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= max_tokens
            and (best == "en" or found[best] < 2)
            and letters >= 0.5
            and not contaminated(words)
        )
        return {"exact": f"{xxh3_64_intdigest(' '.join(text.split()).encode()):x}", "digest": digest, "keep": keep}

    rows: Any = datasets.load_dataset(
        "json", data_files=sorted(map(str, parts.iterdir())), split="train", cache_dir=str(output / "cache")
    )
    rows = rows.map(step).filter(lambda row: row["keep"])
    seen: set[str] = set()
    buckets: dict[tuple[int, ...], int] = {}
    digests: list[list[int]] = []
    per_band = PLACES // BANDS

    def new(row: dict[str, Any]) -> bool:
        if row["exact"] in seen:
            return False
        seen.add(row["exact"])
        digest, similar = row["digest"], False
        for band in range(BANDS):
            key = (band, *digest[band * per_band : (band + 1) * per_band])
            twin = buckets.setdefault(key, len(digests))
            if twin != len(digests) and not similar:
                equal = sum(a == b for a, b in zip(digest, digests[twin], strict=True))
                similar = equal >= THRESHOLD * PLACES
        digests.append(digest)
        return not similar

    rows = rows.filter(new).remove_columns(["exact", "digest", "keep"])
    rows.to_parquet(str(output / "train.parquet"))
    return len(rows)


# ------------------------------------------------------------------------------------------------------------------ measuring


def timed(run: Callable[[], int]) -> tuple[float, int]:
    start = time.perf_counter()
    kept = run()
    return time.perf_counter() - start, kept


def fresh(folder: Path, number: Iterator[int]) -> Path:
    path = folder / f"out-{next(number)}"
    path.mkdir()
    return path


def compare(folder: Path, rows: int, rounds: int, max_tokens: int, processes: int) -> None:
    made = generate(folder, rows)
    ours_plan = plan(*made, max_tokens=max_tokens, processes=processes)
    numbers, ratios = iter(range(1000)), []
    for number in range(rounds):
        out = fresh(folder, numbers)
        ours, kept = timed(lambda out=out: prepare(ours_plan, out, say=lambda _: None)["kept"])
        out = fresh(folder, numbers)
        plain, kept_plain = timed(lambda out=out: plain_steps(*made, out, max_tokens=max_tokens))
        ratios.append(plain / ours)
        say(
            f"round {number + 1}: {rows / ours:,.0f} rows/s against {rows / plain:,.0f}, {ratios[-1]:.2f} x; {kept:,} and {kept_plain:,} rows kept"
        )
    say(f"median of {rounds}: {statistics.median(ratios):.2f} x with {processes} processes, max_tokens {max_tokens}")


def memory(folder: Path, rows: int, max_tokens: int, processes: int) -> None:
    start = time.perf_counter()
    made = generate(folder, rows)
    size = sum(p.stat().st_size for p in made[0].iterdir() if p.name.endswith(SUFFIXES))
    say(f"{rows:,} rows generated, {size / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s")
    out = folder / "out"
    out.mkdir()
    with PeakMemory() as watch:
        seconds, kept = timed(
            lambda: prepare(plan(*made, max_tokens=max_tokens, processes=processes), out, say=say)["kept"]
        )
    manifest = json.loads((out / "manifest.json").read_text())
    say(json.dumps({reason: drop["rows"] for reason, drop in manifest["dropped"].items()}))
    say(
        f"{rows:,} rows in {seconds:.0f} s ({rows / seconds:,.0f} rows/s), {kept:,} kept, {watch.peak:.2f} GiB at most in all processes together"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "compare"))
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="benchmark-data-"))
    try:
        if arguments.what == "memory":
            memory(folder, arguments.rows, arguments.max_tokens, arguments.processes)
        else:
            compare(folder, arguments.rows, arguments.rounds, arguments.max_tokens, arguments.processes)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
