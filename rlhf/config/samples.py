"""The stages that sample a policy to make data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.models import Weights
from rlhf.config.sections import Chat, Grader, PositiveInt, Rollout, Section, Share


class LabellingRollout(Rollout):
    """Of the solutions; their completions differ in number and temperature only."""

    completions_per_prefix: PositiveInt = 8
    completion_temperature: Annotated[float, Field(gt=0)] = 1.0
    problems_per_chunk: PositiveInt = 64
    """Labelled together and stored together: what a kill costs at most. Part of the seed, so another value draws other samples."""

    @model_validator(mode="after")
    def _a_solved_problem_has_two_samples(self) -> LabellingRollout:
        if self.samples_per_prompt < 2:
            raise ValueError(
                "samples_per_prompt is 1; a wrong solution is labelled only where another one shows that the policy can solve the problem: set it to 2 or more"
            )
        return self


class LabelSteps(Section):
    """Labels the steps of a policy's own solutions by what becomes of completions from each prefix (reward_models/step_labels.py)."""

    stage: Literal["label_steps"]
    output_dir: str
    seed: int = 0
    policy: Weights
    chat: Chat = Chat()
    problems: str
    num_problems: PositiveInt | None = None
    """The first so many; all by default."""
    separator: Annotated[str, Field(min_length=1)] = "\n"
    """What ends a step (reward_models/steps.py); that of the process model."""
    estimate: Literal["soft", "hard", "binary_search"] = "soft"
    """Share of right completions after every step; whether there is one; or the same, up to the first wrong step, found with log2(steps) prefixes."""
    correct_share: Share | None = 0.5
    """Of the solutions of a chunk that are labelled; the others are left out. Null labels all."""
    min_steps: PositiveInt = 2
    """Solutions of fewer steps are left out."""
    rollout: LabellingRollout
    grader: Grader = Grader()
    script: ClassVar[str] = "scripts/label_steps.py"
