"""GSM8K (https://arxiv.org/abs/2110.14168) as its authors ship it: {"question", "answer": "reasoning #### number"}."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.chat import render_response
from data.records import AnyRecord, Demonstration, LabelledSteps, PreferencePair, Prepared, Problem
from data.sources import Convert, Source

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def read_gsm8k(split: str, *, path: str | None, revision: str) -> Iterator[tuple[str, str, str]]:
    """(question, scratchpad, answer) of each row of a split, calculator marks removed.

    Raises:
        ValueError: naming file and line of a row that is not as the source has it.
    """
    for origin, row in _rows(split, path=path, revision=revision):
        try:
            yield parse_row(row)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None


def parse_row(row: object) -> tuple[str, str, str]:
    """(question, scratchpad, answer), calculator marks and thousands separators removed.

    Raises:
        ValueError: when the row is not as the source has it.
    """
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in ("question", "answer")):
        raise ValueError("expected an object with the texts 'question' and 'answer'")
    scratchpad, marker, answer = row["answer"].rpartition("####")
    if not marker or not answer.strip():
        raise ValueError("'answer' has no '#### number' at its end")
    return row["question"].strip(), _CALCULATOR.sub("", scratchpad).strip(), answer.strip().replace(",", "")


def _rows(split: str, *, path: str | None, revision: str) -> Iterator[tuple[str, object]]:
    if path is None:
        from datasets import load_dataset

        try:
            rows = load_dataset("openai/gsm8k", "main", split=split, revision=revision)
        except OSError as error:  # the hub's and the network's
            raise ValueError(
                f"openai/gsm8k at {revision} could not be downloaded ({type(error).__name__}); set source.path to a folder with GSM8K's train.jsonl and "
                "test.jsonl, which https://github.com/openai/grade-school-math has"
            ) from None
        for number, row in enumerate(rows, 1):
            yield f"openai/gsm8k {split} row {number}", row
        return
    file = Path(path) / f"{split}.jsonl"
    if not file.is_file():
        raise ValueError(
            f"source.path is {path}, which has no {split}.jsonl; point it at a folder with GSM8K's train.jsonl and test.jsonl, or remove it to download"
        )
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield f"{file}:{number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from None


def to_problem(row: Mapping[str, Any], key: str) -> list[Problem]:
    question, scratchpad, answer = parse_row(row)
    return [Problem(id=key, question=question, answer=answer, solution=scratchpad)]


def to_demonstration(row: Mapping[str, Any], key: str) -> list[Demonstration]:
    question, scratchpad, answer = parse_row(row)
    return [Demonstration(id=key, question=question, scratchpad=scratchpad, answer=answer)]


def _source(name: str, kind: type[AnyRecord], convert: Convert) -> Source:
    return Source(
        name=name,
        kind=kind,
        convert=convert,
        licence="MIT",
        files={split: (f"{split}.jsonl", f"main/{split}-*.parquet") for split in ("train", "test")},
        repository="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        note=", or grade_school_math/data of openai/grade-school-math on GitHub",
    )


GSM8K = _source("gsm8k", Problem, to_problem)
GSM8K_SOLUTIONS = _source("gsm8k_solutions", Demonstration, to_demonstration)


def spoil(rng: random.Random, scratchpad: str, answer: str) -> tuple[int, str, str]:
    """A slip in the last number of a random step, and a wrong answer: (index of the wrong step, scratchpad, answer)."""
    steps = scratchpad.split("\n")
    numbered = [i for i, step in enumerate(steps) if re.search(r"\d", step)] or [0]
    wrong = rng.choice(numbered)
    slip = rng.choice((1, 2, 3, 5, 10))
    steps[wrong] = re.sub(r"\d+(?=\D*$)", lambda match: str(int(match[0]) + slip), steps[wrong])
    number = re.sub(r"\d+", lambda match: str(int(match[0]) + slip), answer, count=1)
    return wrong, "\n".join(steps), number


def prepare(
    *,
    seed: int,
    path: str | None,
    revision: str,
    demonstrations: int,
    train_problems: int,
    test_problems: int,
    train_pairs: int,
    heldout_pairs: int,
) -> Prepared:
    """All records, in the order of the source; fewer where it has fewer. Problems are those of the demonstrations."""
    rng = random.Random(f"prepare-{seed}")
    train = [(f"gsm8k-train-{i}", *row) for i, row in enumerate(read_gsm8k("train", path=path, revision=revision))]
    test = [(f"gsm8k-test-{i}", *row) for i, row in enumerate(read_gsm8k("test", path=path, revision=revision))]

    def pair(key: str, question: str, scratchpad: str, answer: str) -> PreferencePair:
        step, wrong_scratchpad, wrong_answer = spoil(rng, scratchpad, answer)
        chosen, rejected = render_response(scratchpad, answer), render_response(wrong_scratchpad, wrong_answer)
        return PreferencePair(id=key, question=question, chosen=chosen, rejected=rejected, error_step=step)

    def labelled(key: str, question: str, scratchpad: str, answer: str) -> LabelledSteps:
        wrong = len(scratchpad)
        if rng.random() < 0.5:
            wrong, scratchpad, _ = spoil(rng, scratchpad, answer)
        steps = scratchpad.split("\n")
        return LabelledSteps(id=key, question=question, steps=steps, labels=[i < wrong for i in range(len(steps))])

    return Prepared(
        demonstrations=[
            Demonstration(id=k, question=q, scratchpad=s, answer=a) for k, q, s, a in train[:demonstrations]
        ],
        train_problems=[Problem(id=k, question=q, answer=a) for k, q, _, a in train[:train_problems]],
        test_problems=[Problem(id=k, question=q, answer=a) for k, q, _, a in test[:test_problems]],
        train_pairs=[pair(*row) for row in train[:train_pairs]],
        heldout_pairs=[pair(*row) for row in test[:heldout_pairs]],
        labelled_steps=[labelled(*row) for row in train[:train_pairs]],
        heldout_steps=[labelled(*row) for row in test[:heldout_pairs]],
    )
