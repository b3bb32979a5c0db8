"""Checkpoints that are whole or absent: written beside, synced, checksummed, renamed; and verified before anything is read from them.

A checkpoint is a folder `step-NNNNNN`. Its `manifest.json` is written last and names size and SHA-256 of every other file.
What is in them is rlhf/training_state.py's; there is no pickle among them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from rlhf.distributed import gather
from rlhf.run import say

STATE, MANIFEST = "state.json", "manifest.json"


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    *,
    step: int,
    write: Callable[[Path], Sequence[Path]],
    keep: int,
    keep_best: str | None = None,
) -> None:
    """Every rank's files, under `folder/step-N`; the newest `keep` stay, and with `keep_best` the best.

    A kill at any moment leaves the checkpoints before as they were.

    Args:
        accelerator: of the run; all ranks see the same `folder`.
        folder: of all checkpoints.
        step: optimizer steps taken.
        write: this rank's files into a folder, without any collective; returns their paths. One rank writes `state.json`.
        keep: how many checkpoints stay.
        keep_best: a key of `metrics` in `state.json`; the checkpoint with its highest value stays as well.

    Raises:
        OSError: when a rank could not write, for want of space for instance; what was written is removed again.
    """
    temporary, final = folder / f"writing-{step:06d}", folder / f"step-{step:06d}"
    main = accelerator.is_main_process

    def together(action: Callable[[], Any]) -> list[Any]:
        """What each rank's action gives, or the same error on all ranks when one's failed."""
        try:
            outcome = action(), None
        except (OSError, SafetensorError) as error:
            outcome = None, str(error)
        outcomes = gather(accelerator, [outcome])
        faults = [fault for _, fault in outcomes if fault is not None]
        if faults:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(_could_not_write(folder, step, faults[0]))
        return [result for result, _ in outcomes]

    together(lambda: _prepare(folder, temporary) if main else None)
    of_ranks = together(lambda: {path.name: _entry(sync_to_disk(path)) for path in write(temporary)})
    entries = {name: entry for of_rank in of_ranks for name, entry in of_rank.items()}
    together(lambda: _publish(temporary, final, entries) if main else None)
    if main:
        _remove_superseded(folder, keep, keep_best)
    accelerator.wait_for_everyone()


def _prepare(folder: Path, temporary: Path) -> None:
    for leftover in [*folder.glob("writing-*"), *folder.glob("deleting-*")]:
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    sync_to_disk(folder.parent)


def _publish(temporary: Path, final: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    missing = [name for name in entries if not (temporary / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} of another rank is not in {temporary}: all ranks must see one output_dir"
        )
    write_manifest(temporary, entries)
    if final.exists():
        _remove(final)
    os.rename(temporary, final)
    sync_to_disk(final.parent)


def _could_not_write(folder: Path, step: int, fault: str) -> str:
    left = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free / 2**30
    before = checkpoints(folder)
    resume = f"to resume from {before[-1].name}" if before else "to start again"
    return (
        f"the checkpoint of step {step} could not be written: {fault.rstrip('.')}; the checkpoints before it are untouched. "
        f"{left:.2f} GiB are free in {folder}: make room, or lower training.keep_checkpoints, and run the same command {resume}"
    )


# ------------------------------------------------------------------------------------------------------------------ the manifest


def sync_to_disk(path: Path) -> Path:
    """A file, or the names in a folder, onto the disk; returns its path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """The last file of a checkpoint, and its names onto the disk."""
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")
    sync_to_disk(folder / MANIFEST)
    sync_to_disk(folder)


def seal(folder: Path) -> None:
    """A manifest for files that something else wrote: from now on the checkpoint is whole."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        entries[str(path.relative_to(folder))] = _entry(sync_to_disk(path))
    write_manifest(folder, entries)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest is there with its size and its SHA-256."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and had {size:,}"
        found = _entry(path)["sha256"]
        if found != digest:
            return f"{name} has SHA-256 {found[:12]}… and had {digest[:12]}…"
    return None if expected else f"{MANIFEST} names no file"


# --------------------------------------------------------------------------------------------------------------- which ones there are


def checkpoints(folder: Path, prefix: str = "step") -> list[Path]:
    """Published checkpoints, oldest first; whether they are still whole, `fault_of` tells."""
    return sorted(folder.glob(f"{prefix}-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def newest_whole(accelerator: Accelerator, folder: Path, prefix: str = "step") -> Path | None:
    """The newest checkpoint that is as it was written, or None when there is none at all; the same on all ranks.

    Newer, damaged ones are set aside as `damaged-…` and named in a sentence.

    Raises:
        ValueError: when there are checkpoints and all are damaged.
    """
    found: tuple[Path | None, str | None] = (None, None)
    if accelerator.is_main_process:
        found = _newest_whole(folder, prefix)
    path, error = gather(accelerator, [found])[0]
    if error is not None:
        raise ValueError(error)
    return path


def _newest_whole(folder: Path, prefix: str) -> tuple[Path | None, str | None]:
    faults = []
    for checkpoint in reversed(checkpoints(folder, prefix)):
        fault = fault_of(checkpoint)
        if fault is None:
            for damaged, its_fault in faults:
                aside = folder / f"damaged-{damaged.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(damaged, aside)
                say(
                    f"checkpoint {damaged.name} is damaged, {its_fault}: it is now {aside.name} and {checkpoint.name} is used"
                )
            return checkpoint, None
        faults.append((checkpoint, fault))
    if not faults:
        return None, None
    listed = "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in faults)
    return None, f"no checkpoint in {folder} is whole ({listed}); delete that folder to train from the beginning"


def best_of(found: Sequence[Path], key: str) -> Path | None:
    """The checkpoint whose last finished rollout batch had the highest value of a metric; the newer one of equals."""
    values = [(_value(checkpoint, key), checkpoint) for checkpoint in found]
    return max((pair for pair in values if not math.isnan(pair[0])), default=(None, None))[1]


def _value(checkpoint: Path, key: str) -> float:
    try:
        return float(read_state(checkpoint)["metrics"].get(key, math.nan))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged since it was written
        return math.nan


def best_whole(accelerator: Accelerator, folder: Path, key: str) -> Path | None:
    """The best of the checkpoints that are as they were written; the same on all ranks."""
    best = None
    if accelerator.is_main_process:
        best = best_of([checkpoint for checkpoint in checkpoints(folder) if fault_of(checkpoint) is None], key)
    return gather(accelerator, [best])[0]


def _remove_superseded(folder: Path, keep: int, keep_best: str | None) -> None:
    found = checkpoints(folder)
    best = best_of(found, keep_best) if keep_best is not None else None
    for old in found[:-keep]:
        if old != best:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Under another name first: a kill half-way must not leave a checkpoint with files missing."""
    aside = checkpoint.with_name(f"deleting-{checkpoint.name}")
    os.rename(checkpoint, aside)
    shutil.rmtree(aside)
