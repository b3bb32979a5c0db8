"""manifest.json beside data that a policy was sampled for: where it is from, what became of every problem, and the checksums of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.files import sha256
from reward_models.grading import VERSION
from rlhf.card import fingerprint
from rlhf.run import Run, git_revision, write_json

MANIFEST = "manifest.json"


def sampler_of(config: Any) -> str:
    """Where a record is from, in one line of it."""
    policy = config.policy
    return f"{policy.path} {fingerprint(policy.path)} seed {config.seed} temperature {config.rollout.temperature:g}"


def write_manifest(config: Any, run: Run, *, files: list[str], problems: dict[str, Any], **more: Any) -> None:
    """Problems in are problems used and skipped.

    Raises:
        AssertionError: when a problem disappeared.
    """
    used = next(value for name, value in problems.items() if name.startswith("with_"))
    lost = problems["in"] - used - sum(problems["skipped"].values())
    assert lost == 0, f"{lost} problems disappeared: {problems}"
    write_json(
        run.folder / MANIFEST,
        {
            "stage": config.stage,
            "policy": {**config.policy.model_dump(mode="json"), "weights": fingerprint(config.policy.path)},
            "seed": config.seed,
            "sampling": config.rollout.model_dump(mode="json"),
            "grader": {"version": VERSION, **config.grader.model_dump(mode="json")},
            "problems_file": {"path": config.problems, "sha256": sha256(Path(config.problems))},
            "problems": problems,
            **more,
            "files": {name: sha256(run.folder / name) for name in files},
            "commit": git_revision(),
        },
    )
