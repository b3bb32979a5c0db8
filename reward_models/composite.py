"""Several reward components added up, with the weights of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from reward_models.grading import Grade, GraderPool, grade
from reward_models.grading.pool import Case
from reward_models.outcome import OutcomeModel
from reward_models.verifiable import Component, find_rule, overlong
from rlhf.config import Online, RewardModelReward
from rlhf.distributed import loaded_whole
from rlhf.types import Rollout, Score, StepReward


def judge_here(cases: Sequence[Case]) -> list[Grade]:
    """Verdicts from this very process, for tests and short lists of known text."""
    return [grade(completion, reference) for completion, reference in cases]


@dataclass(frozen=True, slots=True)
class CompositeReward:
    """The reward function of a recipe.

    A rollout whose correctness is undecided, or for which any component has no value, is undecided as a whole.
    """

    rules: dict[str, tuple[Component, float]]
    """Name to (component, weight)."""
    models: dict[str, tuple[Callable[[Sequence[Rollout]], list[float]], float]]
    """Name to (batch scorer, weight)."""
    prefill: str = ""
    """What the chat template writes at the start of the assistant's turn; part of what a reader of the completion sees."""
    truncated_is_wrong: bool = True
    """A completion cut by max_new_tokens earns no correctness, even when a boxed answer stands in it."""
    judge: Callable[[Sequence[Case]], list[Grade]] = judge_here

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        learned = {name: score(rollouts) for name, (score, _) in self.models.items()}
        judged = self.judge([(self.prefill + r.text, r.prompt.reference) for r in rollouts])
        return [
            self._score(rollout, judged[i], {name: values[i] for name, values in learned.items()})
            for i, rollout in enumerate(rollouts)
        ]

    def _score(self, rollout: Rollout, judged: Grade, learned: dict[str, float]) -> Score:
        text = self.prefill + rollout.text
        verdict = (
            "wrong"
            if self.truncated_is_wrong and rollout.finish_reason == "length" and judged.verdict == "correct"
            else judged.verdict
        )
        if verdict == "undecided":
            return Score(verdict="undecided", value=None, reason=f"{judged.reason} of {rollout.prompt.id}")
        values = {
            name: float(verdict == "correct") if name == "correctness" else rule(rollout, text)
            for name, (rule, _) in self.rules.items()
        }
        missing = [name for name, value in values.items() if value is None]
        if missing:
            return Score(
                verdict="undecided", value=None, reason=f"{', '.join(missing)} gave no value for {rollout.prompt.id}"
            )
        given = {name: value for name, value in values.items() if value is not None} | learned
        weights = {name: weight for name, (_, weight) in (self.rules | self.models).items()}
        return Score(
            verdict=verdict,
            value=sum(weights[name] * value for name, value in given.items() if isinstance(value, float | int)),
            components={
                name: float(value) if isinstance(value, float | int) else sum(step.value for step in value)
                for name, value in given.items()
            },
            steps=tuple(
                StepReward(step.position, weights[name] * step.value)
                for name, value in given.items()
                if not isinstance(value, float | int)
                for step in value
            ),
            reason=judged.reason,
        )


def build_reward(
    config: Online, *, prefill: str, device: str, accelerator: Accelerator | None = None
) -> CompositeReward:
    """The reward function of a recipe, its models loaded: whole, or sharded over the ranks of `accelerator` where the recipe says so."""
    rules: dict[str, tuple[Component, float]] = {}
    models: dict[str, tuple[Callable[[Sequence[Rollout]], list[float]], float]] = {}
    for reward in config.rewards:
        if isinstance(reward, RewardModelReward):
            model = _load(reward, device, accelerator)
            models[reward.name] = (model.scorer(clip=reward.clip, batch_size=reward.batch_size), reward.weight)
        elif reward.buffer_tokens is not None:
            rule = overlong(max_tokens=config.rollout.max_new_tokens, buffer_tokens=reward.buffer_tokens)
            rules[reward.name] = (rule, reward.weight)
        else:
            rules[reward.name] = (find_rule(reward.name), reward.weight)
    pool = GraderPool(
        workers=config.grader.workers,
        timeout=config.grader.timeout_seconds,
        memory_mb=config.grader.memory_mb,
        accept=config.grader.accept,
    )
    return CompositeReward(rules, models, prefill, config.algorithm.truncated == "wrong", pool.grade_many)


def _load(reward: RewardModelReward, device: str, accelerator: Accelerator | None) -> OutcomeModel:
    if accelerator is None:
        return OutcomeModel.load(reward.path, device=device)
    if reward.placement == "sharded":
        return OutcomeModel.load(reward.path, device=device).shard(accelerator)
    with loaded_whole(accelerator):
        return OutcomeModel.load(reward.path, device=device)


def require_reachable(reward: CompositeReward, references: Sequence[Rollout]) -> None:
    """Raise when a reference solution, written as the policy would write it, does not earn every rule its full value.

    A rule that a perfect completion cannot satisfy trains nothing and looks like a model that does not learn.

    Raises:
        ValueError: naming the rule and the completion.
    """
    for rollout, score in zip(references, reward(references), strict=True):
        short = {
            name: score.components.get(name)
            for name in reward.rules
            if name in ("correctness", "format") and score.components.get(name) != 1.0
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
