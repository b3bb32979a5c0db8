"""The problems that an evaluation asks, and where they are from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.benchmarks import read_problems
from data.perturbation import Variant, perturb
from data.records import Problem, read_records
from data.sources import Refused
from rlhf.config import Evaluate
from rlhf.evaluation import ORIGINAL
from rlhf.report import printable
from rlhf.run import say


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Everything that is asked, and where it is from."""

    problems: list[Problem]
    variants: list[Variant]
    refused: list[Refused]
    name: str

    @property
    def all(self) -> list[tuple[Problem, str, str]]:
        """(problem, variant, id of the problem it is a variant of)"""
        return [(p, ORIGINAL, "") for p in self.problems] + [(v.problem, v.kind, v.origin) for v in self.variants]

    def block(self) -> dict[str, Any]:
        """For the card."""
        text = json.dumps([[p.id, p.question, p.answer] for p, _, _ in self.all])
        return {
            "name": self.name,
            "problems": len(self.problems),
            "perturbed": dict(Counter(v.kind for v in self.variants)),
            "refused_rows": len(self.refused),
            "refused_examples": [f"{row.origin}: {row.reason}" for row in self.refused[:3]],
            "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        }


def ask(config: Evaluate) -> Asked:
    """The recipe's problems with their perturbed variants; rows that cannot be read are refused, named and counted."""
    refused: list[Refused] = []
    if config.benchmark is not None:
        b = config.benchmark
        problems, refused = read_problems(b.name, path=b.path, revision=b.revision)
        name = b.name
    else:
        assert config.problems is not None
        problems, name = read_records(Problem, config.problems), Path(config.problems).name
    if refused:
        shown = "; ".join(f"{row.origin}: {row.reason}" for row in refused[:3])
        say(f"{len(refused)} of {len(refused) + len(problems)} rows refused: {printable(shown)}")
    problems = problems[: config.num_problems]
    variants = perturb(problems, config.perturbations, seed=config.seed)
    if config.perturbations:
        made = Counter(v.kind for v in variants)
        say(
            f"told differently: {', '.join(f'{kind} {made[kind]:,} of {len(problems):,}' for kind in config.perturbations)}"
        )
    return Asked(problems=problems, variants=variants, refused=refused, name=name)
