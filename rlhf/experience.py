"""From scored rollouts to what each token is trained with: its advantage and, with a critic, its return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf.advantages import (
    ADVANTAGES,
    component_deviations,
    filled_components,
    generalised_advantages,
    normalised_components,
    normalised_deviations,
    normalised_steps,
    of_own_step,
    pass_at_k,
    softmin_rewards,
    sum_of_future,
    token_rewards,
    variance_shares,
    whitened,
)
from rlhf.config import GRPO, PPO, Online
from rlhf.diversity import distinct_share, self_bleu, thought_and_answer
from rlhf.metrics import Metrics
from rlhf.repetition import repeated_share
from rlhf.types import Rollout, Score

PerRollout = tuple[Tensor, ...]
"""One tensor [T] for each rollout, with an entry for each of its tokens."""


@dataclass(frozen=True, slots=True)
class Experience:
    """A scored rollout batch of this rank: `rollouts` lists the G samples of each prompt next to each other."""

    rollouts: list[Rollout]
    scores: list[Score]
    advantages: PerRollout
    """0 in what stays out of the loss."""
    trained: Tensor
    """[B] False for what stays out of the loss: undecided groups, masked truncated completions."""
    values: PerRollout | None = None
    """The critic's predictions before the update."""
    returns: PerRollout | None = None
    """What the critic learns to predict."""
    old_logprobs: PerRollout | None = None
    """Of the trainer's policy at the time of sampling, of rollouts that are computed; only in an update under way."""
    entropies: PerRollout | None = None
    """At that time, where top_entropy_share asks for them."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """What an estimator must know of the other ranks; all of them have the same number of rollouts."""

    gather: Callable[[list], list] = list
    """All ranks' items in rank order."""
    rank: int = 0


def estimate(
    rollouts: Sequence[Rollout],
    scores: Sequence[Score],
    config: Online,
    *,
    ranks: Ranks = Ranks(),
    kl: PerRollout | None = None,
    kl_coefficient: float = 0.0,
    values: PerRollout | None = None,
) -> Experience:
    """Advantages of whole groups over all ranks, computed before anything is left out.

    A group with an undecided completion is dropped as a whole: a grader's failure is neither a 0 nor a smaller group.

    Args:
        rollouts: of this rank.
        scores: of these rollouts.
        config: the recipe.
        ranks: how to see the other ranks' scores.
        kl: estimates for each token, when the KL penalty is part of the reward.
        kl_coefficient: what a nat of them costs.
        values: the critic's predictions, for PPO.
    """
    size = config.rollout.samples_per_prompt
    undecided = torch.tensor([score.value is None for score in scores]).view(-1, size)
    trained = ~undecided.any(1, keepdim=True).expand(-1, size)
    if config.algorithm.truncated == "mask":
        trained = trained & torch.tensor([r.finish_reason == "stop" for r in rollouts]).view(-1, size)
    trained = trained.reshape(-1)
    returns = None
    if isinstance(config, PPO):
        assert values is not None
        advantages, returns = _of_tokens(scores, trained, config, ranks, kl, kl_coefficient, values)
    else:
        assert isinstance(config, GRPO)
        penalties = [kl_coefficient * k.sum().item() for k in kl] if kl is not None else [0.0] * len(scores)
        everyone = ranks.gather(list(zip(scores, penalties, (len(r.token_ids) for r in rollouts), strict=True)))
        own = slice(ranks.rank * len(scores), (ranks.rank + 1) * len(scores))
        of_sequences = sequence_advantages([s for s, _, _ in everyone], config, [p for _, p, _ in everyone])[own]
        of_steps = step_advantages([s for s, _, _ in everyone], [n for _, _, n in everyone], config)[own]
        advantages = tuple(a + steps for a, steps in zip(of_sequences, of_steps, strict=True))
    return Experience(
        list(rollouts),
        list(scores),
        tuple(
            a * r.weight if t else torch.zeros_like(a) for a, t, r in zip(advantages, trained, rollouts, strict=True)
        ),
        trained,
        values,
        returns,
    )


@dataclass(frozen=True, slots=True)
class ComponentTable:
    """The components of whole completions of P groups of G."""

    names: tuple[str, ...]
    scaled: Tensor
    """[P, G, K] before the weights; 0 where a component does not apply."""
    weights: Tensor
    """[K]"""
    applies: Tensor
    """[P, G, K] False where a component is missing."""

    @classmethod
    def of(cls, scores: Sequence[Score], size: int) -> ComponentTable:
        """Of scores that lie group by group; those of undecided completions are missing."""
        weights = {name: score.weights[name] for score in scores for name in score.scaled}
        rows = [[score.scaled.get(name, 0.0) for name in weights] for score in scores]
        applies = [[name in score.scaled for name in weights] for score in scores]
        shape = (-1, size, len(weights)) if weights else (len(scores) // size, size, 0)
        return cls(
            tuple(weights),
            torch.tensor(rows).view(shape),
            torch.tensor(list(weights.values())),
            torch.tensor(applies, dtype=torch.bool).view(shape),
        )


def _decided(scores: Sequence[Score], size: int) -> Tensor:
    """[P] True for groups in which every completion was judged."""
    return ~torch.tensor([score.value is None for score in scores]).view(-1, size).any(1)


def sequence_advantages(scores: Sequence[Score], config: GRPO, penalties: Sequence[float] | None = None) -> Tensor:
    """[B] advantages of the scores of all ranks; 0 in groups that hold an undecided completion.

    Such a group is left out of the batch's mean and standard deviation as well. `penalties` [B] are subtracted from the rewards.
    """
    algorithm, size = config.algorithm, config.rollout.samples_per_prompt
    decided = _decided(scores, size)
    advantages = torch.zeros(len(scores)).view(-1, size)
    if not decided.any():
        return advantages.flatten()
    table = ComponentTable.of(scores, size)
    if algorithm.normalise_components:
        if not table.names:
            raise ValueError(
                "algorithm.normalise_components compares components and the reward function's scores have none (Score.scaled, Score.weights); "
                "set it to false"
            )
        advantages[decided] = normalised_components(table.scaled[decided], table.weights, table.applies[decided])
    else:
        rewards = torch.tensor([score.value or 0.0 for score in scores])
        if not table.applies[decided].all():  # a sum that lacks a part is no smaller reward
            over_batch = algorithm.advantage == "batch_normalised"
            weighted = filled_components(table.scaled * table.weights, table.applies, over_batch=over_batch)
            rewards = weighted.sum(2).flatten()
        rewards = (rewards - torch.tensor(penalties) if penalties is not None else rewards).view(-1, size)
        if algorithm.pass_at is not None:
            estimator = partial(pass_at_k, k=algorithm.pass_at)
        else:
            estimator = ADVANTAGES[algorithm.advantage]
        advantages[decided] = estimator(rewards[decided], scale_by_std=algorithm.scale_by_std)
    return advantages.flatten()


def step_advantages(scores: Sequence[Score], lengths: Sequence[int], config: GRPO) -> PerRollout:
    """What the rewards of steps add to each token of every rollout, those of each component compared by themselves, then weighted.

    Args:
        scores: [B] of all ranks.
        lengths: [B] tokens of each rollout.
        config: the recipe.
    """
    decided = _decided(scores, config.rollout.samples_per_prompt)
    added = torch.zeros(sum(lengths))
    names = dict.fromkeys(step.component for score in scores for step in score.steps)
    if names and config.algorithm.normalise_components:
        raise ValueError(
            "algorithm.normalise_components compares components of whole completions and a reward judges steps, which would count twice; "
            "set it to false"
        )
    for name in names:
        # Dividing by a standard deviation would undo a weight that is in the rewards already.
        weight = abs(next((score.weights[name] for score in scores if name in score.weights), 1.0))
        steps = [
            (i, step.position, step.value / weight)
            for i, score in enumerate(scores)
            if decided[i // config.rollout.samples_per_prompt] and weight > 0
            for step in score.steps
            if step.component == name
        ]
        if steps:
            samples, positions, rewards = (torch.tensor(column) for column in zip(*steps, strict=True))
            added += weight * credited(rewards, samples, positions, torch.tensor(lengths), config)
    return added.split(list(lengths))


def credited(rewards: Tensor, samples: Tensor, positions: Tensor, lengths: Tensor, config: GRPO) -> Tensor:
    """[N] advantages of the tokens of B rollouts from the rewards of S steps: [S], [S], [S], [B] -> [N].

    With the sum, steps are compared and their future added up; with `own`, they are compared and stand for themselves. With the minimum it is the returns of the tokens that are compared, those
    of the completions that have a step: the paper's baseline, the mean over the other samples' tokens, but over as many as
    they have, where it divides by the longest length allowed.
    """
    algorithm, size = config.algorithm, config.rollout.samples_per_prompt
    compared = {
        "shape": (len(lengths) // size, size),
        "advantage": algorithm.advantage,
        "scale_by_std": algorithm.scale_by_std,
    }
    if algorithm.step_credit != "min":
        credit = sum_of_future if algorithm.step_credit == "sum" else of_own_step
        return credit(normalised_steps(rewards, samples, **compared), samples, positions, lengths)
    worst = softmin_rewards(rewards, samples, len(lengths), temperature=algorithm.step_temperature)
    returns = sum_of_future(worst, samples, positions, lengths)
    of_tokens = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    judged = torch.isin(of_tokens, samples)
    advantages = torch.zeros_like(returns)
    advantages[judged] = normalised_steps(returns[judged], of_tokens[judged], **compared)
    return advantages


def _of_tokens(
    scores: Sequence[Score],
    trained: Tensor,
    config: PPO,
    ranks: Ranks,
    kl: PerRollout | None,
    kl_coefficient: float,
    values: PerRollout,
) -> tuple[PerRollout, PerRollout]:
    """Advantages and returns of PPO, from the rewards of tokens and the critic's values."""
    lengths = torch.tensor([len(v) for v in values])
    flat_values = torch.cat(values)
    flat_kl = torch.cat(kl) if kl is not None else torch.zeros_like(flat_values)
    totals = torch.tensor([score.value or 0.0 for score in scores])
    rewards = token_rewards(totals, flat_kl, lengths, coefficient=kl_coefficient)
    starts = lengths.cumsum(0) - lengths
    for i, score in enumerate(scores):
        for step, value in zip(score.steps, _credited_steps(score, config), strict=True):
            rewards[starts[i] + step.position] += value
    advantages = generalised_advantages(
        rewards, flat_values, lengths, discount=config.algorithm.discount, trace=config.algorithm.trace
    )
    returns = advantages + flat_values
    if config.algorithm.whiten:
        real = advantages[trained.repeat_interleave(lengths)].double()
        sums = ranks.gather([(len(real), real.sum().item(), real.square().sum().item())])
        count, total, squares = (sum(column) for column in zip(*sums, strict=True))
        mean = total / max(count, 1)
        variance = max(squares / max(count, 1) - mean**2, 0.0)
        advantages = whitened(advantages, mean=mean, std=variance**0.5)
    return advantages.split(lengths.tolist()), returns.split(lengths.tolist())


def _credited_steps(score: Score, config: PPO) -> Sequence[float]:
    """The rewards of a completion's steps, so that their sum is what a token is responsible for."""
    values = [step.value for step in score.steps]
    if config.algorithm.step_credit == "sum" or not values:
        return values
    names = list(dict.fromkeys(step.component for step in score.steps))
    of_component = torch.tensor([names.index(step.component) for step in score.steps])
    weights = torch.tensor([abs(score.weights.get(name, 1.0)) for name in names])[of_component].clamp(min=1e-12)
    raw = torch.tensor(values) / weights
    soft = softmin_rewards(raw, of_component, len(names), temperature=config.algorithm.step_temperature)
    return (soft * weights).tolist()


def has_signal(scores: Sequence[Score]) -> bool:
    """Whether the scores of one group tell its samples apart; an undecided one makes the group useless."""
    if any(score.value is None for score in scores):
        return False
    return any(score.value != scores[0].value or score.steps != scores[0].steps for score in scores)


def describe(rollouts: Sequence[Rollout], scores: Sequence[Score], metrics: Metrics, *, group_size: int) -> None:
    """Metrics of everything sampled and of its rewards, whatever becomes of it."""
    for rollout, score in zip(rollouts, scores, strict=True):
        metrics.add("rollout/length", total=len(rollout.token_ids), count=1)
        metrics.add("rollout/repetition", total=repeated_share(rollout.token_ids), count=1)
        metrics.add("rollout/truncated", total=rollout.finish_reason == "length", count=1)
        metrics.add("rollout/undecided", total=score.value is None, count=1)
        if score.value is not None:
            metrics.add("reward/total", total=score.value, count=1)
            metrics.add("reward/correctness", total=score.verdict == "correct", count=1)
            for name, value in score.components.items():
                if name != "correctness":
                    metrics.add(f"reward/{name}", total=value, count=1)
            for name, value in score.weighted.items():
                metrics.add(f"weighted/{name}", total=value, count=1)
    for start in range(0, len(scores), group_size):
        group = scores[start : start + group_size]
        if group_size > 1:
            _describe_diversity(rollouts[start : start + group_size], metrics)
        values = [score.value for score in group if score.value is not None]
        if len(values) == group_size > 1:
            metrics.add("reward/group_std", total=torch.tensor(values).std().item(), count=1)
            metrics.add("reward/groups_with_signal", total=has_signal(group), count=1)


def _describe_diversity(group: Sequence[Rollout], metrics: Metrics) -> None:
    """How different the samples of one prompt are."""
    thoughts, answers = zip(*(thought_and_answer(rollout.text) for rollout in group), strict=True)
    metrics.add("rollout/distinct_scratchpads", total=distinct_share(thoughts), count=1)
    metrics.add("rollout/distinct_answers", total=distinct_share(answers), count=1)
    metrics.add("rollout/self_bleu", total=self_bleu([rollout.token_ids for rollout in group]), count=1)


def describe_advantages(experience: Experience, metrics: Metrics, config: Online) -> None:
    """Metrics of what is trained on: the advantages, and which component of the reward they come from."""
    trained = [a for a, t in zip(experience.advantages, experience.trained, strict=True) if t]
    flat = torch.cat([torch.zeros(0), *trained])
    metrics.add("advantage/magnitude", total=flat.abs().sum().item(), count=len(flat))
    metrics.add("advantage/positive", total=(flat > 0).sum().item(), count=len(flat))
    # with a critic, completions are compared with all others
    size = config.rollout.samples_per_prompt if isinstance(config, GRPO) else max(len(experience.scores), 1)
    table = ComponentTable.of(experience.scores, size)
    kept = _decided(experience.scores, size)
    applies, scaled = table.applies[kept], table.scaled[kept]
    if isinstance(config, GRPO) and config.algorithm.normalise_components:
        contributions = normalised_deviations(scaled, applies) * table.weights
    else:
        contributions = component_deviations(scaled * table.weights, applies)
    shares, whole = variance_shares(contributions)
    for name, share in zip(table.names, shares.tolist(), strict=True):
        metrics.add(f"variance_share/{name}", total=share, count=whole.item())
