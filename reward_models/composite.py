"""The reward of a recipe: named components, each with its own scale, clip, weight, applicability and gates.

    raw ─ / scale ─ clip ─ gates ─▶ scaled ─ x weight ─▶ weighted ─ sum ─▶ value of the completion

Three things are kept apart: a component that is **undecided** (None: a judge that is down, a time-out) leaves the completion without a
value, and with it its group out of the update; one that does **not apply** is missing, and has no influence where samples are compared;
one whose **gate** is closed counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from accelerate import Accelerator

from reward_models.grading import Grade, GraderPool, grade
from reward_models.grading.pool import Case
from reward_models.judge import Judge
from reward_models.outcome import OutcomeModel
from reward_models.outcome_server import ServedOutcomeModel
from reward_models.process import ProcessModel, aggregate
from reward_models.verifiable import Component, Value, cosine, find_rule, overlong, target_length
from rlhf.config import (
    Applies,
    CosineReward,
    Grader,
    JudgeReward,
    ModelReward,
    Online,
    ProcessRewardModelReward,
    Reward,
    RewardComponent,
    RewardModelReward,
    RewardServerReward,
    RuleReward,
    TargetLengthReward,
    nearest,
    scheduled,
)
from rlhf.distributed import loaded_whole
from rlhf.types import Prompt, Rollout, Score, StepReward, Verdict

BatchComponent = Callable[[Sequence[Rollout]], Sequence[Value]]
"""Scores a list of rollouts, in order: what every component of a reward comes down to. None is undecided, never 0.

It is called once for each list of rollouts on every rank, be it with none, so that one whose ranks work together is in step."""


def each(rule: Component, *, prefill: str = "") -> BatchComponent:
    """A rule for single rollouts as a component; `prefill` is what the chat template writes at the start of the assistant's turn."""
    return lambda rollouts: [rule(rollout, prefill + rollout.text) for rollout in rollouts]


def judge_here(cases: Sequence[Case]) -> list[Grade]:
    """Verdicts from this very process, for tests and short lists of known text."""
    return [grade(completion, reference) for completion, reference in cases]


@dataclass(frozen=True, slots=True)
class Part:
    """A component and how it enters the sum."""

    options: RewardComponent
    component: BatchComponent | None = None
    """None for correctness, which is the grader's verdict."""


@dataclass(frozen=True, slots=True)
class CompositeReward:
    """The reward function of a recipe.

    A rollout whose correctness is undecided, or for which a component that counts has no value, is undecided as a whole.
    """

    parts: Mapping[str, Part]
    prefill: str = ""
    """What the chat template writes at the start of the assistant's turn; part of what a reader of the completion sees."""
    truncated_is_wrong: bool = True
    """A completion cut by max_new_tokens earns no correctness, even when a boxed answer stands in it."""
    judge: Callable[[Sequence[Case]], list[Grade]] = judge_here
    batch: int = 1
    """Number of the rollout batch, which the weights' schedules go by."""

    def at(self, batch: int) -> CompositeReward:
        """The same with the weights of another rollout batch."""
        return replace(self, batch=batch)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        judged = self.judge([(self.prefill + r.text, r.prompt.reference) for r in rollouts])
        verdicts: list[Verdict] = [self._verdict(r, g) for r, g in zip(rollouts, judged, strict=True)]
        columns = {name: _values(part, rollouts, verdicts) for name, part in self.parts.items()}
        return [
            self._score(rollout, verdicts[i], judged[i], {name: of[i] for name, of in columns.items() if i in of})
            for i, rollout in enumerate(rollouts)
        ]

    def _verdict(self, rollout: Rollout, judged: Grade) -> Verdict:
        cut = self.truncated_is_wrong and rollout.finish_reason == "length" and judged.verdict == "correct"
        return "wrong" if cut else judged.verdict

    def _score(self, rollout: Rollout, verdict: Verdict, judged: Grade, values: Mapping[str, Value]) -> Score:
        weights = {
            name: scheduled(part.options.weight, part.options.schedule, self.batch) for name, part in self.parts.items()
        }
        components = {name: _total(value) for name, value in values.items() if _decided(value)}
        missing = [name for name in values if name not in components and name in self._counting(weights)]
        if verdict == "undecided" or missing:
            reason = judged.reason if verdict == "undecided" else f"{', '.join(missing)} gave no value"
            reason = f"{reason} of {rollout.prompt.id}"
            return Score(verdict="undecided", value=None, components=components, weights=weights, reason=reason)
        scaled: dict[str, float] = {}
        steps: list[StepReward] = []
        for name in components:
            value, options = values[name], self.parts[name].options
            is_open = all(components.get(g.component, -math.inf) >= g.at_least for g in options.gates)
            if isinstance(value, Sequence):
                of_steps = [(step.position, _shaped(step.value, options) if is_open else 0.0) for step in value]
                steps += [StepReward(position, weights[name] * of_step, name) for position, of_step in of_steps]
            else:
                scaled[name] = _shaped(components[name], options) if is_open else 0.0
        return Score(
            verdict=verdict,
            value=sum(weights[name] * value for name, value in scaled.items()),
            components=components,
            scaled=scaled,
            weights=weights,
            steps=tuple(steps),
            reason=judged.reason,
        )

    def _counting(self, weights: Mapping[str, float]) -> set[str]:
        """Components without which there is no reward: those of some weight, and those their gates look at."""
        weighty = {name for name in self.parts if weights[name] != 0}
        return weighty | {gate.component for name in weighty for gate in self.parts[name].options.gates}


def _values(part: Part, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> dict[int, Value]:
    """Raw values of the rollouts that a component applies to, by their place. Undecided ones are not scored: they earn nothing anyway."""
    rows = [
        i
        for i, (rollout, verdict) in enumerate(zip(rollouts, verdicts, strict=True))
        if verdict != "undecided" and applies(part.options.applies, rollout.prompt, verdict)
    ]
    if part.component is None:
        return {i: float(verdicts[i] == "correct") for i in rows}
    return dict(zip(rows, part.component([rollouts[i] for i in rows]), strict=True))


def applies(condition: Applies, prompt: Prompt, verdict: Verdict) -> bool:
    """Whether a component judges a completion of this prompt with this verdict."""
    if condition.verdict is not None and condition.verdict != verdict:
        return False
    for column, wanted in condition.columns.items():
        value = prompt.columns.get(column, "")
        if (value not in wanted) if wanted else (value == ""):
            return False
    return True


def _shaped(raw: float, options: RewardComponent) -> float:
    value = raw / options.scale
    return value if options.clip is None else min(max(value, -options.clip), options.clip)


def _total(value: Value) -> float:
    assert value is not None
    return sum(step.value for step in value) if isinstance(value, Sequence) else float(value)


def _decided(value: Value) -> bool:
    """Whether there is a value; one that is not finite is a failure of what computed it."""
    return value is not None and math.isfinite(_total(value))


def build_reward(
    config: Online, *, prefill: str, device: str, accelerator: Accelerator | None = None
) -> CompositeReward:
    """The reward function of a recipe, its models loaded: whole, or sharded over the ranks of `accelerator` where the recipe says so."""
    return build_composite(
        config.rewards,
        config.grader,
        max_new_tokens=config.rollout.max_new_tokens,
        truncated_is_wrong=config.algorithm.truncated == "wrong",
        prefill=prefill,
        device=device,
        accelerator=accelerator,
    )


def build_composite(
    rewards: Sequence[Reward],
    grader: Grader,
    *,
    max_new_tokens: int,
    truncated_is_wrong: bool,
    prefill: str,
    device: str,
    accelerator: Accelerator | None = None,
) -> CompositeReward:
    """Components of a recipe as one reward function, with graders of its own."""

    def component(reward: Reward) -> BatchComponent | None:
        if isinstance(reward, RewardModelReward):
            return _load(OutcomeModel, reward, device, accelerator).scorer(clip=math.inf, batch_size=reward.batch_size)
        if isinstance(reward, ProcessRewardModelReward):
            return process_component(_load(ProcessModel, reward, device, accelerator), reward)
        if isinstance(reward, RewardServerReward):
            return ServedOutcomeModel(reward).connect().scorer()
        if isinstance(reward, JudgeReward):
            return Judge(reward.judge, key=f"rewards.{reward.name}.judge").connect().scorer(prefill=prefill)
        return None if reward.kind == "correctness" else each(_rule(reward, max_new_tokens), prefill=prefill)

    pool = GraderPool(
        workers=grader.workers, timeout=grader.timeout_seconds, memory_mb=grader.memory_mb, accept=grader.accept
    )
    parts = {reward.name: Part(reward, component(reward)) for reward in rewards}
    return CompositeReward(parts, prefill, truncated_is_wrong, pool.grade_many)


def _rule(reward: RuleReward | CosineReward | TargetLengthReward, max_new_tokens: int) -> Component:
    if isinstance(reward, CosineReward):
        return cosine(
            max_tokens=max_new_tokens, at_zero=reward.at_zero, at_limit=reward.at_limit, exceeded=reward.exceeded
        )
    if isinstance(reward, TargetLengthReward):
        slack = 0.5 if reward.slack is None else reward.slack
        return target_length(tokens=reward.tokens, form=reward.form, per_token=reward.per_token, slack=slack)
    if reward.buffer_tokens is not None:
        return overlong(max_tokens=max_new_tokens, buffer_tokens=reward.buffer_tokens)
    return find_rule(reward.kind)


def process_component(model: ProcessModel, reward: ProcessRewardModelReward) -> BatchComponent:
    """A process model's rewards of steps, or one number for each completion."""
    probabilities = model.scorer(tokens_per_batch=reward.tokens_per_batch)

    def component(rollouts: Sequence[Rollout]) -> list[Value]:
        of_rollouts = probabilities(rollouts)
        if reward.aggregate is not None:
            return [_valued(aggregate([s.value for s in steps], reward.aggregate), reward) for steps in of_rollouts]
        return [[replace(s, value=_valued(s.value, reward)) for s in steps] for steps in of_rollouts]

    return component


def _valued(probability: float, reward: ProcessRewardModelReward) -> float:
    return 2 * probability - 1 if reward.step_value == "signed" else probability


M = TypeVar("M", OutcomeModel, ProcessModel)


def _load(kind: type[M], reward: ModelReward, device: str, accelerator: Accelerator | None) -> M:
    if accelerator is None:
        return kind.load(reward.path, device=device)
    if reward.placement == "sharded":
        return kind.load(reward.path, device=device).shard(accelerator)
    with loaded_whole(accelerator):
        return kind.load(reward.path, device=device)


def require_columns(config: Online, prompts: Sequence[Prompt]) -> None:
    """Raise when a component applies by a column that the problems do not have, or by values that none of them has.

    Raises:
        ValueError: naming the component and the column.
    """
    for reward in config.rewards:
        for column in reward.applies.columns:
            known = sorted({name for prompt in prompts for name in prompt.columns})
            if column not in known:
                raise ValueError(
                    f"rewards.{reward.name}.applies.columns names {column!r}, which the problems do not have; {nearest(column, known)}"
                )
        only_columns = reward.applies.model_copy(update={"verdict": None})
        if not any(applies(only_columns, prompt, "correct") for prompt in prompts):
            raise ValueError(
                f"rewards.{reward.name}.applies.columns is {reward.applies.columns}, and none of the {len(prompts)} problems is like that; "
                "correct the values"
            )


def require_reachable(reward: CompositeReward, references: Sequence[Rollout]) -> None:
    """Raise when a reference solution, written as the policy would write it, does not earn every rule its full value.

    A rule that a perfect completion cannot satisfy trains nothing and looks like a model that does not learn.

    Raises:
        ValueError: naming the rule and the completion.
    """
    for rollout, score in zip(references, reward(references), strict=True):
        short = {
            name: score.components.get(name)
            for name, part in reward.parts.items()
            if part.options.kind in ("correctness", "format")
            and (name in score.components or score.value is None)
            and score.components.get(name) != 1.0
        }
        if short:
            parts = ", ".join(
                f"{name} {'undecided' if value is None else f'{value:g} instead of 1'}" for name, value in short.items()
            )
            raise ValueError(
                f"the reward cannot reach its maximum: the reference solution of {rollout.prompt.id!r} gets {parts}. It reads "
                f"{(reward.prefill + rollout.text)!r:.200}; check that the chat template and the format reward agree about <think>, "
                "that the answer is boxed as the reference has it, and that rollout.max_new_tokens leaves room for it"
            )
