"""What a check found, and what is known when it looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf.config import BuildModel, Config, PrepareData
from rlhf.run import finished

Level = Literal["ok", "warning", "error"]
T = TypeVar("T")
MADE_BY = {
    "prepare_data": (
        "demonstrations.jsonl", "train_problems.jsonl", "test_problems.jsonl", "train_pairs.jsonl", "heldout_pairs.jsonl",
        "labelled_steps.jsonl", "heldout_steps.jsonl",
    ),
    "make_pairs": ("pairs.jsonl", "completions.jsonl"),
    "generate_traces": ("traces.jsonl", "completions.jsonl"),
}  # fmt: skip
"""Files by stage; a stage that is not listed makes a model in its folder, or files whose names its recipe decides."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: how bad, of what, and what to do about it."""

    level: Level
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:7} {self.name}: {self.text}"


@dataclass(slots=True)
class Report:
    """Findings of a stage."""

    findings: list[Finding] = field(default_factory=list)
    show: Callable[[str], None] = print

    def add(self, level: Level, name: str, text: str) -> None:
        self.findings.append(Finding(level, name, text))
        self.show(str(self.findings[-1]))

    def attempt(self, name: str, check: Callable[[], T], describe: Callable[[T], str]) -> T | None:
        """Run a check that raises ValueError with the repair; a line either way. None when it failed."""
        try:
            value = check()
        except ValueError as error:
            self.add("error", name, str(error))
            return None
        self.add("ok", name, describe(value))
        return value

    @property
    def failed(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What surrounds a stage."""

    accelerate: dict[str, Any] | None
    """Settings of the accelerate configuration, where one is named."""
    earlier: tuple[Config, ...] = ()
    """Stages of the pipeline that run before this one."""

    @property
    def num_ranks(self) -> int:
        return int((self.accelerate or {}).get("num_processes", 1))

    @property
    def zero_stage(self) -> int:
        if (self.accelerate or {}).get("distributed_type") != "DEEPSPEED":
            return 0
        return int((self.accelerate or {}).get("deepspeed_config", {}).get("zero_stage", 2))

    def maker(self, path: str) -> Config | None:
        """The earlier stage in whose output folder a path lies, when it has not run yet.

        Raises:
            ValueError: when that stage makes no file of this name.
        """
        for stage in self.earlier:
            folder = Path(stage.output_dir)
            if Path(path) != folder and folder not in Path(path).parents:
                continue
            if finished(stage) is not None:
                return None
            name = Path(path).name
            if Path(path) == folder:
                if isinstance(stage, PrepareData):
                    raise ValueError(f"{path} is the output of the stage prepare_data, which makes no model")
            elif stage.stage in MADE_BY and name not in MADE_BY[stage.stage]:
                made = ", ".join(MADE_BY[stage.stage])
                raise ValueError(f"{path} is not among what the stage {stage.stage} makes: {made}; correct the path")
            return stage
        return None


def model_source(context: Context, path: str) -> BuildModel | None:
    """The stage that builds the model which training ends up starting from, followed back through the pipeline."""
    by_folder = {stage.output_dir: stage for stage in context.earlier}
    while (stage := by_folder.get(path)) is not None:
        if isinstance(stage, BuildModel):
            return stage
        trained = getattr(stage, "model", None) or getattr(stage, "policy", None)
        if trained is None:
            return None
        path = trained.path
    return None
