"""Every completion that was trained on, with what each component of its reward said: one file a rollout batch, for reading and audits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.repetition import repeated_share

if TYPE_CHECKING:
    from rlhf.experience import Experience

Row = dict[str, Any]


def completion_rows(experience: Experience, batch: int) -> list[Row]:
    """One row a completion, the samples of a prompt next to each other.

    `components` are raw values and `weighted` what they add to `value`; a component that does not apply is in neither, and one without a
    value, which makes the completion undecided, is in none. `advantage` is the mean over the completion's tokens.
    """
    columns = (experience.rollouts, experience.scores, experience.advantages, experience.trained.tolist())
    return [
        {
            "batch": batch,
            "prompt": rollout.prompt.id,
            "question": rollout.prompt.question,
            "reference": rollout.prompt.reference,
            "columns": dict(rollout.prompt.columns),
            "completion": rollout.text,
            "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.token_ids),
            "repetition": repeated_share(rollout.token_ids),
            "verdict": score.verdict,
            "value": score.value,
            "components": dict(score.components),
            "weighted": score.weighted,
            "advantage": advantage.mean().item() if len(advantage) else 0.0,
            "trained": trained,
            "reason": score.reason,
        }
        for rollout, score, advantage, trained in zip(*columns, strict=True)
    ]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Whole or not at all, in ASCII, so that no terminal obeys a control character when the file is printed."""
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, file)


def batch_file(run: Path, batch: int) -> Path:
    return run / "completions" / f"batch-{batch:06d}.jsonl"


def drop_from(run: Path, batch: int) -> None:
    """Remove the files of this rollout batch and later ones, which a resumed run is about to write again."""
    for file in (run / "completions").glob("batch-*.jsonl"):
        if int(file.stem.removeprefix("batch-")) >= batch:
            file.unlink()


def read_completions(run: Path, *, first: int = 1, last: int | None = None) -> Iterator[Row]:
    """The completions of a run's rollout batches `first` to `last`.

    Raises:
        ValueError: when there are none.
    """
    files = sorted((run / "completions").glob("batch-*.jsonl"))
    numbers = {file: int(file.stem.removeprefix("batch-")) for file in files}
    wanted = [file for file in files if first <= numbers[file] and (last is None or numbers[file] <= last)]
    if not wanted:
        has = f"those of batches {numbers[files[0]]} to {numbers[files[-1]]}" if files else "none"
        raise ValueError(
            f"{run}/completions has {has}; training writes them every training.completions_every rollout batches"
        )
    for file in wanted:
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
