"""From a plan to parquet files and a manifest: shards in parallel, then duplicates, mix and splits over all of them.

Memory does not grow with the text: a process holds a batch, and the steps over all rows hold a few numbers a row. A run that was killed
is taken up again: shards that have their marker are not read a second time, pass rates that were measured are not measured again.

The manifest, `manifest.json`:

    {
      "version": 1, "kind": "problems", "seed": 0, "recipe_sha256": "…", "code": "<git revision>",
      "sources": [{"name", "repository", "revision", "split", "path", "licence", "files": {"name": "sha256"}, "source_rows",
                   "rows_in", "kept", "dropped": {"reason": n}}],
      "rows_in": 7474, "kept": 7100,            one row of a source may hold several records; each counts, a refused row as one
      "dropped": {"malformed": {"rows": 4, "examples": [{"row": "train.json row 887", "detail": "field 'answer' is null"}]}, …},
      "splits": {"train": {"file": "train.parquet", "rows": 6390, "sha256": "…", "strata": {"Algebra": 1500, …}}, …},
      "decontamination": {…},                   see data/decontamination.py
      "seconds": 12.3
    }

`rows_in` is `kept` plus all that was dropped, for each source and in total; a run in which it is not stops.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data.catalog import BENCHMARKS, CATALOG, find, read_benchmark
from data.decontamination import report
from data.duplicates import first_of_equal, first_of_similar
from data.files import sha256, slices
from data.left import Left
from data.output import write_splits
from data.plan import Plan
from data.records import KINDS, AnyRecord, Problem
from data.selection import Rows, assign_splits, draw, quotas, take_smallest
from data.shards import (
    Drops,
    Say,
    ShardTask,
    build_tools,
    load_strata,
    process,
    schema_of,
    start_worker,
    work,
)
from data.sources import Source, id_prefix, locate

MANIFEST, PAIRS = "manifest.json", "contamination.jsonl"

Judge = Callable[[list[Problem]], list[float | None]]
"""Pass rate of each problem under some policy; None where no sample could be judged."""


@dataclass(frozen=True, slots=True)
class Input:
    """A source of the plan with its files."""

    source: Source
    split: str
    files: dict[str, str]
    """Name to sha256."""
    paths: list[Path]


def prepare(
    plan: Plan,
    folder: Path,
    *,
    say: Say,
    code: str = "",
    judge: Judge | None = None,
    initializer: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run a plan; returns its manifest.

    Args:
        plan: what to do.
        folder: where the files go, and under `work/` what a later run takes up again.
        say: prints a line.
        code: revision of the code, for the manifest.
        judge: measures pass rates, where the plan or the recipe asks for them.
        initializer: called first in each worker process.

    Raises:
        ValueError: for anything wrong with the plan or its files.
    """
    started = time.time()
    kind, kind_name = kind_of(plan)
    inputs = [_input(plan, i) for i in range(len(plan.sources))]
    problems, checksums = _benchmarks(plan)
    known = {f"{i}/{name}": digest for i, item in enumerate(inputs) for name, digest in item.files.items()}
    key = plan.key({**known, **{f"{b}/{n}": d for b, files in checksums.items() for n, d in files.items()}})
    workplace = folder / "work" / key[:16]
    _only(workplace)
    tasks = _tasks(plan, inputs, workplace)
    flat = [(name, p.id, p.question) for name, listed in problems.items() for p in listed]
    summaries = run_shards(plan, tasks, flat, say=say, initializer=initializer)

    drops = [Drops() for _ in plan.sources]
    for summary in summaries:
        drops[summary["source"]].merge(summary["dropped"], summary["examples"])
    left = Left(
        tasks,
        [s["rows_left"] for s in summaries],
        np.repeat([t.source for t in tasks], [s["rows_left"] for s in summaries]).astype(np.int16),
    )
    alive = drop_duplicates(plan, left, drops, say)
    rates = _pass_rates(plan, left, alive, kind, judge, workplace, drops, say) if judge is not None else None
    alive, split = select(plan, left, alive, summaries, drops)
    outputs = write_splits(plan, left, alive, split, kind, folder, rates, say)

    manifest = _manifest(plan, inputs, summaries, drops, outputs, kind_name, code, key)
    pairs = [pair for summary in summaries for pair in summary["pairs"]]
    if plan.benchmarks:
        _mark_dropped(pairs, left, alive)
        with (folder / PAIRS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        scanned = manifest["rows_in"] - sum(d.counts["malformed"] for d in drops)
        manifest["decontamination"] = report(
            plan.rules, rows_scanned=scanned, benchmarks=problems, checksums=checksums, pairs=pairs
        )
    manifest["seconds"] = round(time.time() - started, 1)
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)
    shutil.rmtree(folder / "work")
    return manifest


# -------------------------------------------------------------------------------------------------------------------- inputs


def kind_of(plan: Plan) -> tuple[type[AnyRecord], str]:
    """(the kind of record all sources yield, its name).

    Raises:
        ValueError: when they yield different kinds.
    """
    kinds = {find(s.name, CATALOG).kind for s in plan.sources}
    names = {kind: name for name, kind in KINDS.items()}
    if len(kinds) > 1:
        listed = ", ".join(f"{s.name} yields {names[CATALOG[s.name].kind]}" for s in plan.sources)
        raise ValueError(f"one recipe makes one kind of record, and {listed}; split it into several recipes")
    (kind,) = kinds
    unknown = [name for name in plan.stratify_by if name not in schema_of(kind).names]
    if unknown:
        raise ValueError(
            f"split.stratify_by names {unknown[0]!r}; {names[kind]} have {', '.join(schema_of(kind).names)}"
        )
    return kind, names[kind]


def _input(plan: Plan, index: int) -> Input:
    wanted = plan.sources[index]
    source = find(wanted.name, CATALOG)
    split = wanted.split or ("train" if "train" in source.files else next(iter(source.files)))
    paths = locate(source, path=wanted.path, revision=wanted.revision, split=split)
    return Input(source, split, {path.name: sha256(path) for path in paths}, paths)


def _benchmarks(plan: Plan) -> tuple[dict[str, list[Problem]], dict[str, dict[str, str]]]:
    problems: dict[str, list[Problem]] = {}
    checksums: dict[str, dict[str, str]] = {}
    for name, place in plan.benchmarks.items():
        problems[name], _ = read_benchmark(name, path=place.path, revision=place.revision)
        source = BENCHMARKS[name]
        files = locate(source, path=place.path, revision=place.revision, split=source.default_split)
        checksums[name] = {file.name: sha256(file) for file in files}
    return problems, checksums


def _only(workplace: Path) -> None:
    """Make the folder, and remove what other recipes or other files left beside it."""
    workplace.mkdir(parents=True, exist_ok=True)
    for other in workplace.parent.iterdir():
        if other != workplace:
            shutil.rmtree(other)


def _tasks(plan: Plan, inputs: Sequence[Input], workplace: Path) -> list[ShardTask]:
    tasks: list[ShardTask] = []
    for index, item in enumerate(inputs):
        again = sum(earlier.name == plan.sources[index].name for earlier in plan.sources[:index])
        for number, path in enumerate(item.paths):
            prefix = id_prefix(item.source, item.split, number, len(item.paths)) + (f"-again{again}" if again else "")
            for part in slices(path, bytes_per_slice=plan.shard_bytes):
                tasks.append(
                    ShardTask(
                        number=len(tasks),
                        source=index,
                        name=plan.sources[index].name,
                        part=part,
                        prefix=prefix,
                        folder=workplace,
                    )
                )
    return tasks


# -------------------------------------------------------------------------------------------------------------------- shards


def run_shards(
    plan: Plan,
    tasks: Sequence[ShardTask],
    problems: list[tuple[str, str, str]],
    *,
    say: Say,
    initializer: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """The markers of all shards, in order; only those without one are worked off.

    Raises:
        ValueError: when a worker process dies.
    """
    todo = [task for task in tasks if not task.marker.is_file()]
    done = len(tasks) - len(todo)
    if done:
        say(f"{done} of {len(tasks)} shards were done by an earlier run")
    progress = Progress(len(tasks), done, say)
    if plan.processes == 1 or len(todo) <= 1:
        tools = build_tools(plan, problems) if todo else None
        for task in todo:
            assert tools is not None
            progress.step(process(task, tools)["rows_in"])
    else:
        pool = ProcessPoolExecutor(
            min(plan.processes, len(todo)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(plan, problems, initializer),
        )
        with pool:
            try:
                for future in as_completed([pool.submit(work, task) for task in todo]):
                    progress.step(future.result()["rows_in"])
            except BrokenProcessPool:
                raise ValueError(
                    "a worker process died, perhaps of too little memory; run the same command again (finished shards are kept), with fewer processes"
                ) from None
    return [json.loads(task.marker.read_text(encoding="utf-8")) for task in tasks]


def _start(plan: Plan, problems: list[tuple[str, str, str]], initializer: Callable[[], None] | None) -> None:
    if initializer is not None:
        initializer()
    start_worker(plan, problems)


class Progress:
    """A line every few seconds: shards, rows, rows a second, time left."""

    def __init__(self, total: int, done: int, say: Say, every: float = 5.0) -> None:
        self._total, self._done, self._say, self._every = total, done, say, every
        self._first, self._rows, self._started, self._said = done, 0, time.time(), time.time()

    def step(self, rows: int) -> None:
        self._done += 1
        self._rows += rows
        now = time.time()
        if now - self._said >= self._every or self._done == self._total:
            self._said = now
            passed = now - self._started
            remaining = passed / (self._done - self._first) * (self._total - self._done)
            self._say(
                f"{self._done}/{self._total} shards, {self._rows:,} rows, {self._rows / max(passed, 1e-9):,.0f} rows/s, {remaining:.0f} s left"
            )


# ------------------------------------------------------------------------------------------------------------------ all rows


def drop_duplicates(plan: Plan, left: Left, drops: Sequence[Drops], say: Say) -> np.ndarray:
    """[R] which rows are neither an exact nor a near duplicate of an earlier one."""
    alive = np.ones(len(left.source), bool)
    if plan.exact_duplicates and len(alive):
        _drop(left, alive, first_of_equal(left.hashes(0)), "exact duplicate", drops)
    if plan.near_threshold is not None and len(alive):
        similar = first_of_similar(left.band, alive.copy(), threshold=plan.near_threshold, answers=left.hashes(2))
        _drop(left, alive, similar, "near duplicate", drops)
    say(f"{len(alive):,} rows left of the shards, {int(alive.sum()):,} after duplicates")
    return alive


def _drop(left: Left, alive: np.ndarray, first: Rows, reason: str, drops: Sequence[Drops]) -> None:
    """Rows whose `first` is another one die; each is counted for its source, a few are shown."""
    dead = np.flatnonzero((first != np.arange(len(first))) & alive)
    alive[dead] = False
    for source, drop in enumerate(drops):
        own = dead[left.source[dead] == source]
        if not len(own):
            continue
        shown = own[:3].tolist()
        for row, twin in zip(left.ids(shown), left.ids(first[shown].tolist()), strict=True):
            drop.add(reason, row, f"of {twin}")
        drop.counts[reason] += len(own) - len(shown)


def _drop_rows(left: Left, alive: np.ndarray, rows: Rows, reason: str, detail: str, drops: Sequence[Drops]) -> None:
    alive[rows] = False
    for source, drop in enumerate(drops):
        own = rows[left.source[rows] == source]
        shown = own[:3].tolist()
        for row in left.ids(shown):
            drop.add(reason, row, detail)
        drop.counts[reason] += len(own) - len(shown)
        if not drop.counts[reason]:
            del drop.counts[reason]


def _pass_rates(
    plan: Plan,
    left: Left,
    alive: np.ndarray,
    kind: type[AnyRecord],
    judge: Judge,
    workplace: Path,
    drops: Sequence[Drops],
    say: Say,
) -> dict[str, float]:
    """Pass rate of each problem still there, by id; problems outside the bounds, or that could not be judged, die."""
    from data.difficulty import annotate

    if kind is not Problem:
        raise ValueError("difficulty measures problems, and these sources yield other records; remove difficulty")
    rates: dict[str, float] = {}
    rows_of: dict[str, int] = {}

    def problems() -> Iterator[Problem]:
        row = 0
        for task, count in zip(left.tasks, left.counts, strict=True):
            for record in pq.read_table(task.file("parquet")).to_pylist() if count else []:
                if alive[row]:
                    rows_of[record["id"]] = row
                    yield Problem(**record)
                row += 1

    measured = annotate(problems(), judge, workplace / "pass_rates.jsonl", say=say)
    outside: dict[str, list[int]] = {"not judged": [], "too hard": [], "too easy": []}
    for name, row in rows_of.items():
        rate = measured[name]
        if rate is None:
            outside["not judged"].append(row)
        elif rate < plan.min_pass_rate:
            outside["too hard"].append(row)
        elif rate > plan.max_pass_rate:
            outside["too easy"].append(row)
        else:
            rates[name] = rate
    details = {
        "not judged": "no sample could be judged",
        "too hard": f"pass rate below {plan.min_pass_rate}",
        "too easy": f"pass rate above {plan.max_pass_rate}",
    }
    for reason, rows in outside.items():
        if rows:
            _drop_rows(left, alive, np.asarray(rows), reason, details[reason], drops)
    return rates


def select(
    plan: Plan, left: Left, alive: np.ndarray, summaries: Sequence[Mapping[str, Any]], drops: Sequence[Drops]
) -> tuple[np.ndarray, np.ndarray]:
    """([R] which rows are used, [R] index of the split of each)."""
    groups = left.hashes(1)
    if plan.mixed:
        own = [np.flatnonzero(alive & (left.source == i)) for i in range(len(plan.sources))]
        if any(not len(rows) for rows in own):
            empty = plan.sources[[len(rows) for rows in own].index(0)].name
            raise ValueError(f"nothing is left of source {empty}, so it can have no share of the mix; see its filters")
        counts = quotas([len(rows) for rows in own], [s.weight for s in plan.sources], plan.num_rows)
        values = draw(groups, plan.seed, "mix")
        for rows, count in zip(own, counts, strict=True):
            taken = take_smallest(values, rows, count)
            _drop_rows(left, alive, np.setdiff1d(rows, taken), "mix", "beyond the source's share of the mix", drops)
        del values
    names: dict[str, int] = {}
    strata = np.zeros(len(alive), np.int32)
    for begin, task, count, summary in zip(left.begins, left.tasks, left.counts, summaries, strict=False):
        codes = np.asarray([names.setdefault(name, len(names)) for name in summary["strata"]] or [0], np.int32)
        strata[begin : begin + count] = codes[load_strata(task)] if count else 0
    split = np.zeros(len(alive), np.int8)
    rows = np.flatnonzero(alive)
    if len(plan.splits) > 1 and len(rows):
        split[rows] = assign_splits(groups[rows], strata[rows], plan.splits, seed=plan.seed)
    return alive, split


# ------------------------------------------------------------------------------------------------------------------ manifest


def _mark_dropped(pairs: list[dict[str, Any]], left: Left, alive: np.ndarray) -> None:
    """A pair that the scan let pass counts as dropped when its row was dropped later, say as a duplicate."""
    open_ids = {pair["row"] for pair in pairs if not pair["dropped"]}
    if not open_ids:
        return
    kept: set[str] = set()
    for begin, task, count in zip(left.begins, left.tasks, left.counts, strict=False):
        if count:
            ids = pq.read_table(task.file("parquet"), columns=["id"]).column("id").to_pylist()
            kept.update(name for i, name in enumerate(ids) if name in open_ids and alive[begin + i])
    for pair in pairs:
        pair["dropped"] = pair["dropped"] or pair["row"] not in kept


def _manifest(
    plan: Plan,
    inputs: Sequence[Input],
    summaries: Sequence[Mapping[str, Any]],
    drops: Sequence[Drops],
    outputs: Mapping[str, Mapping[str, Any]],
    kind: str,
    code: str,
    key: str,
) -> dict[str, Any]:
    sources = []
    total = Drops()
    for i, (item, drop) in enumerate(zip(inputs, drops, strict=True)):
        own = [summary for summary in summaries if summary["source"] == i]
        rows_in, dropped = sum(s["rows_in"] for s in own), dict(drop.counts)
        total.merge(dropped, drop.examples)
        wanted = plan.sources[i]
        sources.append(
            {
                "name": wanted.name,
                "repository": item.source.repository if wanted.path is None else None,
                "revision": (wanted.revision or item.source.revision) if wanted.path is None else None,
                "split": item.split,
                "path": wanted.path,
                "licence": item.source.licence,
                "weight": wanted.weight,
                "files": item.files,
                "source_rows": sum(s["source_rows"] for s in own),
                "rows_in": rows_in,
                "kept": rows_in - sum(dropped.values()),
                "dropped": dropped,
            }
        )
    rows_in, kept = sum(s["rows_in"] for s in sources), sum(output["rows"] for output in outputs.values())
    lost = rows_in - kept - sum(total.counts.values())
    assert lost == 0, f"{lost} rows disappeared: {rows_in} in, {kept} kept, {dict(total.counts)} dropped"
    assert kept == sum(s["kept"] for s in sources)
    return {
        "version": 1,
        "kind": kind,
        "seed": plan.seed,
        "recipe_sha256": key,
        "code": code,
        "plan": asdict(replace(plan, benchmarks={name: place for name, place in plan.benchmarks.items()})),
        "sources": sources,
        "rows_in": rows_in,
        "kept": kept,
        "dropped": {
            reason: {"rows": count, "examples": total.examples.get(reason, [])}
            for reason, count in sorted(total.counts.items(), key=lambda item: -item[1])
        },
        "splits": dict(outputs),
    }
