"""Checkpoints that are whole or absent, and a resume that continues as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

STATE = "state.json"


def save_checkpoint(
    accelerators: Mapping[str, Accelerator], folder: Path, *, batch: int, keep: int, state: Mapping[str, Any]
) -> None:
    """Weights, optimizer, schedule and the random state of every rank, under `folder/batch-N`; the newest `keep` stay.

    Written under another name and renamed when complete, so a kill leaves the previous checkpoint as it was.

    Args:
        accelerators: each holds a model that is trained; the name is that of its folder in the checkpoint.
        folder: of all checkpoints.
        batch: rollout batches trained on.
        keep: how many checkpoints stay.
        state: what else a resume needs, as JSON.
    """
    accelerator = next(iter(accelerators.values()))
    temporary, final = folder / f"writing-{batch:06d}", folder / f"batch-{batch:06d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    for name, of_model in accelerators.items():
        of_model.save_state(str(temporary / name), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / STATE).write_text(json.dumps({**state, "batch": batch}), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("batch-*") if (path / STATE).is_file())


def load_newest(accelerators: Mapping[str, Accelerator], folder: Path) -> dict[str, Any] | None:
    """Restore the newest checkpoint into everything the accelerators prepared; its state, or None when there is none."""
    found = checkpoints(folder)
    if not found:
        return None
    for name, accelerator in accelerators.items():
        accelerator.load_state(str(found[-1] / name))
    return json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
