"""Put completions or preference pairs before a language model as judge. `python scripts/judge.py --config recipes/judge/llmbar.yaml`

Leaves judgements.jsonl, one line a row, and the figures in run.json: of completions the mean score; of pairs the agreement with the
people who labelled them, and how much the order decides. A run that was interrupted, or whose server went away, asks only for what is missing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.catalog import PAIRS
from data.files import Unreadable, read_rows, slices
from data.records import PreferencePair
from data.sources import read_source, text
from reward_models.judge import Judge, Judgement, Progress, agreement, position_bias, status_counts
from reward_models.judge_protocol import Case
from rlhf.config import Judging
from rlhf.report import show_estimate
from rlhf.run import Run, format_table, run_stage, say
from rlhf.uncertainty import share

SECONDS_BETWEEN_LINES = 5.0


def judge_rows(config: Judging, run: Run) -> None:
    cache = config.judge.cache or str(run.folder / "verdicts.sqlite")
    judge, progress = Judge(config.judge.model_copy(update={"cache": cache})), progress_lines()
    if config.pairs is not None:
        pairs = read_pairs(config)
        ids = [id for id, _ in pairs]
        judged = judge.connect().compare([pair for _, pair in pairs], progress)
        figures = pair_figures(judged)
    else:
        completions = read_completions(config)
        ids = [id for id, _ in completions]
        judged = judge.connect().grade([case for _, case in completions], progress)
        figures = score_figures(judged)
    write_judgements(run.folder / "judgements.jsonl", ids, judged)
    say(format_table(shown(figures)))
    unanswered = figures["status"]["endpoint"]
    if unanswered:
        reason = next(j.reason for j in judged if j.status == "endpoint")
        raise ValueError(
            f"{unanswered} of {len(ids)} rows got no answer from {config.judge.url} ({reason}); run the same command again, which asks for these alone"
        )
    run.finish(**figures, requests=judge.num_asked, retried=judge.num_retried)


def read_pairs(config: Judging) -> list[tuple[str, tuple[Case, Case]]]:
    """(id, (preferred answer, other answer)); which of them is shown first is no matter, both orders are."""
    records, refused = read_source(PAIRS, path=config.pairs, revision=None, split="train")
    if refused:
        say(
            f"{len(refused)} rows of {config.pairs} are no pairs, the first at {refused[0].origin}: {refused[0].reason}"
        )
    return [
        (r.id, (Case(conversation(r), r.chosen), Case(conversation(r), r.rejected))) for r in records[: config.num_rows]
    ]


def conversation(pair: PreferencePair) -> str:
    """What the answers reply to: the question, after the turns before it where there are some."""
    turns = [*pair.history, pair.question]
    if len(turns) == 1 and not pair.system:
        return pair.question
    said = [f"{('User', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns)]
    return "\n\n".join([f"System: {pair.system}", *said] if pair.system else said)


def read_completions(config: Judging) -> list[tuple[str, Case]]:
    """(id, case) of each row.

    Raises:
        ValueError: when the file is not there or a row lacks a field; names the line.
    """
    path = Path(config.completions or "")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"completions is {path}, where there are no JSON lines; correct the path")
    found: list[tuple[str, Case]] = []
    for origin, row in (row for file in files for row in _rows(file)):
        try:
            if isinstance(row, Unreadable):
                raise ValueError(row.reason)
            case = Case(text(row, "question"), str(row.get("completion", "")), str(row.get("reference") or ""))
            if "completion" not in row:
                raise ValueError("field 'completion' is missing")
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
        found.append((str(row.get("id", origin)), case))
        if len(found) == config.num_rows:
            break
    return found


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    for part in slices(file, bytes_per_slice=1 << 40):
        yield from ((origin, row) for origin, _, row in read_rows(part))


def write_judgements(path: Path, ids: Sequence[str], judged: Sequence[Judgement]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    lines = (json.dumps({"id": id, **asdict(j)}) + "\n" for id, j in zip(ids, judged, strict=True))
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


def score_figures(judged: Sequence[Judgement]) -> dict[str, Any]:
    values = [j.value for j in judged if j.value is not None]
    return {"rows": len(judged), "status": status_counts(judged), "score": asdict(share(values)) if values else None}


def pair_figures(judged: Sequence[Judgement]) -> dict[str, Any]:
    return {
        "rows": len(judged),
        "status": status_counts(judged),
        **agreement(judged),
        "position_bias": position_bias(judged),
    }


def shown(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Figures as (quantity, value) rows."""
    bias = figures.get("position_bias", {})
    estimates = {
        "mean score, 0 to 1": figures.get("score"),
        "agreement where decided": figures.get("agreement"),
        "agreement, undecided half": figures.get("agreement_undecided_half"),
        "pairs whose order decides": bias.get("flipped"),
        "wins of the first position": bias.get("first_wins"),
    }
    rows = [("rows", f"{figures['rows']:,}")]
    rows += [(status, f"{count:,}") for status, count in figures["status"].items() if count]
    return rows + [(name, f"{show_estimate(e)} over {e['n']:,}") for name, e in estimates.items() if e is not None]


def progress_lines() -> Progress:
    """Prints a line now and then, with the time that is left."""
    started, last, first_done = time.monotonic(), 0.0, -1

    def progress(done: int, total: int) -> None:
        nonlocal last, first_done
        now = time.monotonic()
        if first_done < 0:
            first_done = done
            say(f"{total:,} verdicts to have, {done:,} of them are there already")
        elif now - last > SECONDS_BETWEEN_LINES or done == total:
            rate = (done - first_done) / (now - started)
            say(f"{done:,} of {total:,} verdicts, {rate:.1f}/s, {(total - done) / rate:.0f} s left")
            last = now

    return progress


if __name__ == "__main__":
    run_stage(Judging, judge_rows)
