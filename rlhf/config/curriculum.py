"""Which problems come next, and what comes back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.sections import PositiveInt, Section, Share


class UniformCurriculum(Section):
    """Endless epochs, each in a fresh order."""

    kind: Literal["uniform"] = "uniform"
    measure: bool = False
    """Keep the pass rates all the same, to be seen in metrics.jsonl and drawn by scripts/plot_curriculum.py."""


class Pacing(Section):
    """Share of the problems, from the easiest on, that may come: start + (1 - start) ((batch - 1) / batches)^power, at most 1."""

    start: Annotated[float, Field(gt=0, le=1)] = 0.1
    batches: PositiveInt
    """Rollout batches until every problem may come."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """1 is linear; 0.5 opens up early, 2 late."""


class DifficultyCurriculum(Section):
    """From easy to hard, as the data says (https://arxiv.org/abs/1904.03626)."""

    kind: Literal["difficulty"]
    column: str = "level"
    """Of the problems: a number that is higher the harder they are."""
    pacing: Pacing


class Pools(Section):
    """Problems that are set aside, and come back."""

    solved_at: Share = 1.0
    """A problem with this pass rate or a higher one is retired."""
    impossible_at: Share = 0.0
    """A problem with this pass rate or a lower one is shelved."""
    min_completions: Annotated[float, Field(gt=0)] = 8.0
    """Judged completions of a problem before it is put aside; older ones count as half_life says."""
    revisit_batches: PositiveInt = 50
    """Rollout batches after which a problem set aside may come again."""

    @model_validator(mode="after")
    def _apart(self) -> Pools:
        if self.impossible_at >= self.solved_at:
            raise ValueError(
                f"impossible_at is {self.impossible_at} and solved_at is {self.solved_at}; leave problems between them"
            )
        return self


class MeasuredCurriculum(Section):
    """What curricula by measured pass rate share: for each problem a Beta posterior of its pass rate p, and from it E[p (1 - p)]."""

    prior_rate: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Pass rate that is expected of a problem before it was sampled."""
    prior_strength: Annotated[float, Field(gt=0)] = 0.2
    """Completions that this expectation is worth. The less, the more a problem is expected to be always right or always wrong, and the more one
    that was found to be neither is worth against one never sampled."""
    prior_column: str | None = None
    """Column of the problems, such as level or subject: problems with the same value share their expectation, which then follows what
    was measured on any of them. It is what helps where a problem is seldom sampled twice."""
    half_life: Annotated[float, Field(gt=0)] | None = 50.0
    """Rollout batches after which a measurement counts half, because the policy moves; null: for ever."""
    floor: Share = 0.1
    """Share of the choices that go to any problem, whatever was measured."""
    importance: Share = 0.0
    """Exponent of a weight 1 / (N q)^importance, scaled to at most 1, of what a problem chosen with probability q teaches: 1 undoes the choice's
    bias (https://arxiv.org/abs/1511.05952, section 3.4), 0 keeps it."""
    rest_batches: Annotated[int, Field(ge=0)] = 5
    """Rollout batches after which a problem that was sampled may come again, but by `floor`: a few that come all the time are learnt by heart."""
    pools: Pools | None = None


class SignalCurriculum(MeasuredCurriculum):
    """Problems in proportion to their learning signal."""

    kind: Literal["signal"]
    sharpness: Annotated[float, Field(gt=0)] = 3.0
    """Exponent of the signal."""
    band: tuple[Share, Share] | None = None
    """Expected pass rates outside which only `floor` chooses a problem."""

    @model_validator(mode="after")
    def _band_in_order(self) -> SignalCurriculum:
        if self.band is not None and self.band[0] >= self.band[1]:
            raise ValueError(f"band is {list(self.band)}; give the lower pass rate first")
        return self


class ReplayCurriculum(MeasuredCurriculum):
    """Prioritised level replay (https://arxiv.org/abs/2010.03934) with the learning signal as score: by rank, and by how long ago."""

    kind: Literal["replay"]
    importance: Share = 0.4
    rank_temperature: Annotated[float, Field(gt=0)] = 0.5
    """Of the probability (1 / rank)^(1 / rank_temperature)."""
    stale_share: Share = 0.1
    """Share of the replayed problems that go by the rollout batches since they were sampled last."""
    new_share: Share = 0.3
    """Share of the choices that go to problems never sampled, as long as there are any."""


Curriculum = Annotated[
    UniformCurriculum | DifficultyCurriculum | SignalCurriculum | ReplayCurriculum, Field(discriminator="kind")
]


class Replay(Section):
    """Past correct completions for groups that are wrong from end to end (rlhf/replay.py)."""

    capacity: PositiveInt = 1024
    """Completions kept over all problems, on every rank."""
    per_problem: PositiveInt = 2
    per_group: PositiveInt = 1
    """Completions of a group that are replaced at most."""
    max_age_batches: PositiveInt = 20
    """Rollout batches after which a completion is not used any more."""
