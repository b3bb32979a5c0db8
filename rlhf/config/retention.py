"""What keeps a policy from forgetting while reinforcement learning teaches it something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.evaluation import Benchmark, EvaluationRollout
from rlhf.config.models import Weights
from rlhf.config.sections import Chat, PositiveInt, Rollout, Section, Share

if TYPE_CHECKING:
    from rlhf.config.online import Online


class Elastic(Section):
    """Elastic weight consolidation (https://arxiv.org/abs/1612.00796): coefficient / 2 sum F (weight - weight before)^2."""

    fisher: str
    """Folder that scripts/estimate_fisher.py wrote, of the weights at policy.path."""
    coefficient: Annotated[float, Field(gt=0)]


class PTX(Section):
    """The loss of supervised fine-tuning on demonstrations, mixed into every optimizer step (https://arxiv.org/abs/2203.02155, eq. 2)."""

    demonstrations: str
    coefficient: Annotated[float, Field(gt=0)]
    """Of the mean over the tokens of their responses."""
    tokens_per_step: PositiveInt
    """Response tokens of an optimizer step, over all ranks, at most; one demonstration is the least."""


class Adaptive(Section):
    """One control's coefficient, steered by what is left of an ability: up while it has fallen by more than `max_fall`, down again after."""

    steers: Literal["kl", "elastic", "ptx"]
    problems: str
    """Held-out problems of the ability; sampled before the first rollout batch and then every so many."""
    num_problems: PositiveInt = 128
    every_batches: PositiveInt = 2
    max_fall: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Of accuracy, below what was measured before training."""
    rate: Annotated[float, Field(gt=0)] = 1.0
    """Largest change of the coefficient's logarithm at one measurement."""
    max_factor: Annotated[float, Field(gt=1)] = 100.0
    """How far the coefficient may rise above the recipe's, below which it never falls."""


class Retention(Section):
    """Controls of forgetting, besides a KL to the reference."""

    elastic: Elastic | None = None
    ptx: PTX | None = None
    adaptive: Adaptive | None = None


def require_controls(config: Online) -> None:
    """Check the controls against the rest of the recipe.

    Raises:
        ValueError: when adaptive steers a coefficient that is not there, or that follows a target of its own.
    """
    retention, algorithm = config.retention, config.algorithm
    if retention.adaptive is None:
        return
    steers = retention.adaptive.steers
    there = {
        "kl": algorithm.kl_coefficient > 0,
        "elastic": retention.elastic is not None,
        "ptx": retention.ptx is not None,
    }
    if not there[steers]:
        key = "algorithm.kl_coefficient" if steers == "kl" else f"retention.{steers}"
        raise ValueError(f"retention.adaptive.steers is {steers} but {key} is not set; set it, or steer another")
    if steers == "kl" and algorithm.kl_target is not None:
        raise ValueError(
            "retention.adaptive.steers is kl and algorithm.kl_target steers the same coefficient; remove one of them"
        )


def require_whole_weights(retention: Retention, zero_stage: int) -> None:
    """Refuse elastic weight consolidation where no rank holds a whole weight.

    Raises:
        ValueError: under ZeRO-3.
    """
    if retention.elastic is not None and zero_stage == 3:
        raise ValueError(
            "retention.elastic needs whole weights beside its Fisher information and ZeRO-3 leaves each rank a piece of them; take an accelerate "
            "configuration with zero_stage 2, or retention.ptx, which ZeRO-3 shards"
        )


class EstimateFisher(Section):
    """The diagonal of the Fisher information of a model's completions: which weights an ability rests on (see rlhf/elastic.py)."""

    stage: Literal["estimate_fisher"]
    output_dir: str
    seed: int = 0
    model: Weights
    """A folder; the weights that elastic weight consolidation will hold on to."""
    chat: Chat = Chat()
    problems: str | None = None
    """Problems that the model completes itself: an estimate of the true Fisher information. Either this or `demonstrations`."""
    demonstrations: str | None = None
    """Completions that are given: the empirical Fisher information, another matrix unless the model would write them just so."""
    num_sequences: PositiveInt = 512
    """Completions whose squared gradients are averaged."""
    rollout: Rollout
    script: ClassVar[str] = "scripts/estimate_fisher.py"

    @model_validator(mode="after")
    def _one_kind(self) -> EstimateFisher:
        if (self.problems is None) == (self.demonstrations is None):
            raise ValueError(
                "give either problems, for the true Fisher information, or demonstrations, for the empirical one"
            )
        if self.rollout.temperature != 1:
            raise ValueError(
                f"rollout.temperature is {self.rollout.temperature}; the expectation is over the model's own completions: set it to 1"
            )
        return self


class Suite(Section):
    """Problems that stand for an ability."""

    problems: str | None = None
    """Record file. Either this or `benchmark`."""
    benchmark: Benchmark | None = None
    num_problems: PositiveInt | None = None
    """The first so many; all by default."""


class ForgettingGate(Section):
    """When a model has forgotten too much."""

    max_fall: Share
    """Of accuracy, on any suite."""
    decided_by: Literal["interval", "point"] = "interval"
    """`interval`: the 95 % interval of the paired difference must lie above the bound, so too few problems refuse a model; `point`: the difference
    itself, which noise may help over the bound."""


class Forgetting(Section):
    """Accuracy on named suites before and after training: per suite, and the worst of them."""

    stage: Literal["forgetting"]
    output_dir: str
    seed: int = 0
    before: Weights
    after: Weights
    suites: Annotated[dict[str, Suite], Field(min_length=1)]
    chat: Chat = Chat()
    rollout: EvaluationRollout
    accept: Literal["boxed", "marked", "bare", "last_number"] = "boxed"
    """As in the stage evaluate."""
    gate: ForgettingGate | None = None
    """What the exit code is for: 3 refuses the model."""
    script: ClassVar[str] = "scripts/evaluate_forgetting.py"
