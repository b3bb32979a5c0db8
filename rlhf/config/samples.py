"""The stages that sample a policy to make data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.evaluation import EvaluatedModel
from rlhf.config.rewards import ModelReward, Reward
from rlhf.config.sections import PositiveInt, Rollout, Section, Share
from rlhf.config.stages import SamplingStage


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


class LabelSteps(SamplingStage):
    """Labels the steps of a policy's own solutions by what becomes of completions from each prefix (reward_models/step_labels.py)."""

    stage: Literal["label_steps"]
    separator: Annotated[str, Field(min_length=1)] = "\n"
    """What ends a step (reward_models/steps.py); that of the process model."""
    estimate: Literal["soft", "hard", "binary_search"] = "soft"
    """Share of right completions after every step; whether there is one; or the same, up to the first wrong step, found with log2(steps) prefixes."""
    correct_share: Share | None = 0.5
    """Of the solutions of a chunk that are labelled; the others are left out. Null labels all."""
    min_steps: PositiveInt = 2
    """Solutions of fewer steps are left out."""
    rollout: LabellingRollout
    script: ClassVar[str] = "scripts/label_steps.py"


class SampledRollout(Rollout):
    problems_per_chunk: PositiveInt = 256
    """Sampled, graded and stored together: what a kill costs at most. Part of the seed, so another value draws other samples."""


class MakePairs(SamplingStage):
    """Preference pairs from a policy's own completions, graded or scored (reward_models/pairing.py)."""

    stage: Literal["make_pairs"]
    first_problem: Annotated[int, Field(ge=0)] = 0
    """How many problems of the file to pass over, so that rounds see different ones."""
    pairing: Literal["correct_wrong", "best_worst"] = "correct_wrong"
    """A random correct completion against a random wrong one, or the one with the highest value of `rewards` against the one with the lowest."""
    rewards: tuple[Reward, ...] = ()
    """For best_worst."""
    pairs_per_problem: PositiveInt = 1
    """At most; with correct_wrong no completion is in two pairs, with best_worst there is one."""
    min_margin: Annotated[float, Field(ge=0)] = 0.0
    """With best_worst: difference of the two values below which a problem gives no pair."""
    truncated: Literal["reject", "leave_out"] = "reject"
    """A completion cut by rollout.max_new_tokens is never chosen. It may be rejected, then without a stop token, or is in no pair."""
    rollout: SampledRollout
    script: ClassVar[str] = "scripts/make_pairs.py"

    @model_validator(mode="after")
    def _relations(self) -> MakePairs:
        if (self.pairing == "best_worst") != bool(self.rewards):
            problem = (
                "rewards is empty, so nothing says which completion is the best"
                if not self.rewards
                else "rewards is set, which nothing would read"
            )
            raise ValueError(f"pairing is {self.pairing} and {problem}; give rewards to best_worst and only to it")
        if self.pairing == "best_worst" and self.pairs_per_problem > 1:
            raise ValueError(
                f"pairing is best_worst and pairs_per_problem is {self.pairs_per_problem}; a problem has one best and one worst: set it to 1"
            )
        if self.pairing == "correct_wrong" and self.min_margin > 0:
            raise ValueError(
                f"pairing is correct_wrong and min_margin is {self.min_margin}, which only best_worst reads; remove it"
            )
        if self.rollout.samples_per_prompt < 2:
            raise ValueError("rollout.samples_per_prompt is 1 and a pair has two; set it to 2 or more")
        if any(isinstance(r, ModelReward) and r.placement == "sharded" for r in self.rewards):
            raise ValueError("rewards has a model with placement sharded, which is for training; set it to whole")
        return self


class TraceJudge(Section):
    """A process model that has a say in which completions become traces."""

    path: str
    """Folder of scripts/train_process_reward_model.py."""
    aggregate: Literal["min", "product", "mean", "last"] = "min"
    """What of its steps' probabilities is the score of a completion."""
    min_score: Share = 0.5


class GenerateTraces(SamplingStage):
    """Demonstrations from a stronger policy's completions: what the grader accepts, without duplicates (data/traces.py)."""

    stage: Literal["generate_traces"]
    policy: EvaluatedModel  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    """Loaded by rollout.engine, or asked where policy.server says; then only the tokenizer at `path` is read."""
    first_problem: Annotated[int, Field(ge=0)] = 0
    """How many problems of the file to pass over."""
    process_model: TraceJudge | None = None
    require_thoughts: bool = True
    """Leave out what answers at once."""
    near_threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Least estimated Jaccard similarity of near duplicates, among the traces of one problem; null keeps them. Equal ones always count once."""
    shingle_words: PositiveInt = 5
    """Words of the n-grams that are compared."""
    max_per_problem: PositiveInt = 1
    prefer: Literal["shortest", "random"] = "shortest"
    """Which of a problem's traces stay where there are more."""
    rollout: SampledRollout
    """A completion cut by max_new_tokens is never a trace."""
    script: ClassVar[str] = "scripts/generate_traces.py"
