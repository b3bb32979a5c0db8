"""From the rewards of a rollout batch to the advantage of each completion, step or token.

An estimator maps [P, G], the rewards of all ranks' decided groups, to [P, G]. Whatever it computes, a group whose rewards are all
equal and that is compared only with itself gets exactly 0: rounding in a mean must not become a signal. `normalised_steps` does the
same for rewards of steps.

Rewards of tokens come flat: [N] trained tokens of [B] sequences laid end to end, of which `lengths` [B] says how many are whose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to the standard deviation, as in TRL and the reference implementation of GRPO."""


def group_relative(rewards: Tensor, *, scale_by_std: bool) -> Tensor:
    """GRPO (https://arxiv.org/abs/2402.03300, section 4.1.2): [P, G] -> [P, G].

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    with the sample standard deviation of the group (divisor G - 1), or without the division (Dr. GRPO,
    https://arxiv.org/abs/2503.20783). A group whose rewards are all equal gets exactly 0.

    Raises:
        ValueError: when a group has a single sample, which has nothing to be compared with.
    """
    centered = _centered(rewards, "group_relative")
    return centered / (rewards.std(1, keepdim=True) + STD_FLOOR) if scale_by_std else centered


def leave_one_out(rewards: Tensor, *, scale_by_std: bool) -> Tensor:
    """RLOO (https://arxiv.org/abs/2402.14740): [P, G] -> [P, G], the baseline is the mean of the others.

        A_i = r_i - 1/(G-1) sum_{j != i} r_j = (r_i - mean(r)) G / (G - 1)

    `scale_by_std` divides by the group's standard deviation, which the paper does not.
    """
    num_samples = rewards.shape[1]
    return group_relative(rewards, scale_by_std=scale_by_std) * (num_samples / (num_samples - 1))


def batch_normalised(rewards: Tensor, *, scale_by_std: bool) -> Tensor:
    """REINFORCE++ (https://arxiv.org/abs/2501.03262): [P, G] -> [P, G], whitened over the whole rollout batch.

    A = (r - mean_batch(r)) / (std_batch(r) + 1e-4)
    """
    centered = (rewards - rewards.mean()).masked_fill((rewards == rewards.flatten()[0]).all(), 0.0)
    return centered / (rewards.std() + STD_FLOOR) if scale_by_std else centered


def group_baseline(rewards: Tensor, *, scale_by_std: bool) -> Tensor:
    """REINFORCE++ with baseline (https://arxiv.org/abs/2501.03262): [P, G] -> [P, G].

        A = (r - mean_group(r)) / (std_batch(r - mean_group(r)) + 1e-4)

    The scale is shared by all groups, so easy and hard problems keep their proportions.
    """
    centered = _centered(rewards, "group_baseline")
    return centered / (centered.std() + STD_FLOOR) if scale_by_std else centered


def pass_at_k(rewards: Tensor, *, scale_by_std: bool, k: int) -> Tensor:
    """Pass@k training (https://arxiv.org/abs/2508.10751, section 2.4): [P, G] -> [P, G], what a sample adds to the best of k.

        R_S = max of the rewards of a subset S of k samples
        A_i = (mean of R_S over the subsets that hold i  -  mean of R_S over all) / (std of R_S over all + 1e-4)

    over all C(G, k) subsets, in closed form. For rewards 0 and 1 it is the paper's: with w of the G wrong, the mean over all is
    1 - C(w, k) / C(G, k), over those that hold a right sample 1, over those that hold a wrong one 1 - C(w - 1, k - 1) / C(G - 1, k - 1). A
    group with fewer than k wrong samples gets exactly 0: any k of its samples hold a right one. The mean of A is 0. k = 1 is
    `group_relative` with divisor G in the standard deviation.

    Raises:
        ValueError: when k is more than G.
    """
    num_samples = rewards.shape[1]
    _require_companions(num_samples, "pass_at_k")
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"pass_at_k compares {k} of G={num_samples} samples; set algorithm.pass_at to at most rollout.samples_per_prompt"
        )
    # The j-th smallest (from 0) is the largest of C(j, k - 1) subsets, and of C(j - 1, k - 2) of those that hold a certain smaller one.
    of_all = rewards.new_tensor([math.comb(j, k - 1) / math.comb(num_samples, k) for j in range(num_samples)])
    of_own = rewards.new_tensor([math.comb(j, k - 1) / math.comb(num_samples - 1, k - 1) for j in range(num_samples)])
    of_smaller = rewards.new_tensor(
        [
            math.comb(j - 1, k - 2) / math.comb(num_samples - 1, k - 1) if j and k > 1 else 0.0
            for j in range(num_samples)
        ]
    )
    smallest_first, order = rewards.sort(1)
    mean = (smallest_first * of_all).sum(1, keepdim=True)
    above = smallest_first * of_smaller
    holding = smallest_first * of_own + above.flip(1).cumsum(1).flip(1) - above
    # With at most k - 1 samples below the best, every subset is as good.
    solved = smallest_first[:, k - 1 : k] == smallest_first[:, -1:]
    advantages = torch.zeros_like(rewards).scatter(1, order, (holding - mean).masked_fill(solved, 0.0))
    variance = ((smallest_first - mean).square() * of_all).sum(1, keepdim=True)
    return advantages / (variance.sqrt() + STD_FLOOR) if scale_by_std else advantages


def normalised_components(components: Tensor, weights: Tensor, applies: Tensor | None = None) -> Tensor:
    """GDPO (https://arxiv.org/abs/2601.05242): [P, G, K], [K], [P, G, K] -> [P, G]: each reward is compared within its group before they
    are added.

        A = whiten_batch( sum_k w_k normalised_deviations_k )

    A component that is large, or varies a lot, no longer drowns the others: A does not depend on its unit.
    """
    return batch_normalised((normalised_deviations(components, applies) * weights).sum(2), scale_by_std=True)


def normalised_deviations(components: Tensor, applies: Tensor | None = None) -> Tensor:
    """[P, G, K], [P, G, K] -> [P, G, K]: how many standard deviations of its group a component is above the group's mean.

        d = (r - mean(r)) / (std(r) + 1e-4 max|r|)    mean and std (divisor n - 1) over the completions it applies to, max over the batch

    The papers add 1e-4 as it is, which makes the result depend on the component's unit; here a component that varies by less than a ten
    thousandth of its size is rounding. For components in [0, 1] it is the same.
    """
    applies = torch.ones_like(components, dtype=torch.bool) if applies is None else applies
    deviations = component_deviations(components, applies)
    others = (applies.sum(1, keepdim=True) - 1).clamp(min=1)
    largest = components.masked_fill(~applies, 0.0).abs().amax((0, 1))
    return deviations / (
        (deviations.square().sum(1, keepdim=True) / others).sqrt() + STD_FLOOR * largest.where(largest > 0, 1.0)
    )


def component_deviations(components: Tensor, applies: Tensor) -> Tensor:
    """[P, G, K], [P, G, K] -> [P, G, K]: each value minus the mean of those of its group that the component applies to.

    0 where it does not apply, and exactly 0 where these values are all equal.
    """
    count = applies.sum(1, keepdim=True).clamp(min=1)
    values = components.masked_fill(~applies, 0.0)
    lowest = components.masked_fill(~applies, torch.inf).amin(1, keepdim=True)
    highest = components.masked_fill(~applies, -torch.inf).amax(1, keepdim=True)
    return (values - values.sum(1, keepdim=True) / count).masked_fill(~applies | (lowest == highest), 0.0)


def filled_components(components: Tensor, applies: Tensor, *, over_batch: bool = False) -> Tensor:
    """[P, G, K], [P, G, K] -> [P, G, K]: where a component does not apply, the mean of the values it has in the group, or in the batch.

    So it neither helps nor harms there when completions are compared with these. 0 where it has none.
    """
    dims = (0, 1) if over_batch else (1,)
    values = components.masked_fill(~applies, 0.0)
    means = values.sum(dims, keepdim=True) / applies.sum(dims, keepdim=True).clamp(min=1)
    return torch.where(applies, components, means)


def variance_shares(contributions: Tensor) -> tuple[Tensor, Tensor]:
    """Which component drives an update: [P, G, K] -> [K], [], to be divided after both were summed over ranks.

        share_k = sum c_k t / sum t²    t = sum_k c_k

    the covariance of a component's deviations with their total over the total's variance, within groups. The shares add up to 1; one that
    works against the others is negative.
    """
    total = contributions.sum(2, keepdim=True)
    return (contributions * total).sum((0, 1)), total.square().sum()


def _centered(rewards: Tensor, name: str) -> Tensor:
    """Rewards minus their group's mean; exactly 0 in a group of equal rewards."""
    _require_companions(rewards.shape[1], name)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(equal, 0.0)


def normalised_steps(
    rewards: Tensor, samples: Tensor, *, shape: tuple[int, int], advantage: str, scale_by_std: bool
) -> Tensor:
    """Process supervision of GRPO (https://arxiv.org/abs/2402.03300, section 4.1.3), for every estimator: [S], [S] -> [S].

        group_relative      (r - mean over all steps of the group) / (std over them + 1e-4)
        leave_one_out       (r - mean over all steps of the group's other samples) / the same
        batch_normalised    (r - mean over all steps of the batch) / (std over them + 1e-4)
        group_baseline      (r - mean over all steps of the group) / (std over the batch of this difference + 1e-4)

    Where every sample has one step, it is the estimator itself. Steps that are all equal where they are compared get exactly 0, and
    so does a sample none of whose companions has a step, which has nothing to be compared with. What a token gets of it is
    `sum_of_future`.

    Args:
        rewards: [S] of the steps of all ranks' decided groups, in any order.
        samples: [S] sample of each step, prompt * G + number of the sample.
        shape: (P, G)
        advantage: name in ADVANTAGES.
        scale_by_std: divide, or leave the difference as it is.

    Raises:
        ValueError: when a group has a single sample and the estimator compares samples of a group.
    """
    num_prompts, num_samples = shape
    if advantage == "batch_normalised":
        groups, num_groups = torch.zeros_like(samples), 1
    else:
        _require_companions(num_samples, advantage)
        groups, num_groups = samples // num_samples, num_prompts
    sums, counts = _sums(rewards, groups, num_groups), torch.bincount(groups, minlength=num_groups)
    centered = rewards - (sums / counts.clamp(min=1))[groups]
    spread = _sums(centered.square(), groups, num_groups) / (counts - 1).clamp(min=1)
    if advantage == "group_baseline":
        spread = (_sums(centered.square(), groups, num_groups).sum() / max(len(rewards) - 1, 1)).expand(num_groups)
    if advantage == "leave_one_out":
        own = torch.bincount(samples)[samples]
        others = counts[groups] - own
        own_sums = _sums(rewards, samples, num_prompts * num_samples)[samples]
        centered = rewards - (sums[groups] - own_sums) / others.clamp(min=1)
        centered = centered.masked_fill(others == 0, 0.0)
    lowest = rewards.new_zeros(num_groups).scatter_reduce(0, groups, rewards, "amin", include_self=False)
    highest = rewards.new_zeros(num_groups).scatter_reduce(0, groups, rewards, "amax", include_self=False)
    centered = centered.masked_fill((lowest == highest)[groups], 0.0)
    return centered / (spread.sqrt()[groups] + STD_FLOOR) if scale_by_std else centered


def sum_of_future(steps: Tensor, samples: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    """What a token is responsible for (https://arxiv.org/abs/2402.03300, section 4.1.3): [S], [S], [S], [B] -> [N].

        A_t = sum of the steps of its sequence that end at t or later

    Args:
        steps: [S] normalised reward of each step.
        samples: [S] sequence of each step, a place in `lengths`.
        positions: [S] place of the step's last token among the trained tokens of its sequence, from 0.
        lengths: [B] trained tokens of every sequence.
    """
    assert (positions < lengths[samples]).all(), "a step ends behind the last trained token of its sequence"
    starts = lengths.cumsum(0) - lengths
    ends = steps.new_zeros(int(lengths.sum())).index_add(0, starts[samples] + positions, steps)
    return _laid_end_to_end(_padded(ends, lengths).flip(1).cumsum(1).flip(1), lengths)


def of_own_step(steps: Tensor, samples: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    """What a token is responsible for when steps do not answer for each other: [S], [S], [S], [B] -> [N].

        A_t = the step that t lies in, the sum of them where several end at one token; 0 behind the last one

    It is `sum_of_future` discounted by 0 from step to step: without the noise of later steps, and blind to what a step makes of them.
    Arguments are those of `sum_of_future`.
    """
    at = (lengths.cumsum(0) - lengths)[samples] + positions
    num_tokens = int(lengths.sum())
    ends = steps.new_zeros(num_tokens + 1).index_add(0, at, steps)
    none = torch.full((num_tokens + 1,), num_tokens, device=at.device)
    next_end = none.scatter(0, at, at).flip(0).cummin(0).values.flip(0)[:num_tokens]
    of_tokens = torch.repeat_interleave(torch.arange(len(lengths), device=at.device), lengths)
    of_ends = torch.cat([of_tokens, of_tokens.new_full((1,), -1)])
    return torch.where(of_ends[next_end] == of_tokens, ends[next_end], 0.0)


def softmin_rewards(rewards: Tensor, samples: Tensor, num_samples: int, *, temperature: float) -> Tensor:
    """PURE (https://arxiv.org/abs/2504.15275): the rewards of steps whose sum is the least of them, softly: [S], [S] -> [S].

        r*_i = r_i exp(-r_i / T) / sum_j exp(-r_j / T)             over the steps j of the same sample

    As T goes to 0 only the worst step keeps its reward: the sum of the future (`sum_of_future`) is then that reward for every token
    up to it, and 0 behind it.

    Args:
        rewards: [S] of the steps.
        samples: [S] sample of each step.
        num_samples: one more than the last of them.
        temperature: T, in units of the rewards.
    """
    lowest = rewards.new_zeros(num_samples).scatter_reduce(0, samples, rewards, "amin", include_self=False)
    weights = torch.exp((lowest[samples] - rewards) / temperature)
    return rewards * weights / _sums(weights, samples, num_samples)[samples]


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, *, coefficient: float) -> Tensor:
    """The reward of PPO for language models (https://arxiv.org/abs/2203.02155, eq. 2; 1909.08593, eq. 2): [B], [N], [B] -> [N].

        r_t = -coefficient kl_t + (score where t is the last token of its sequence)

    Args:
        scores: [B] of the completions; that of a sequence without trained tokens is not read.
        kl: [N] estimate for each token (rlhf/kl.py), of the policy that sampled.
        lengths: [B] trained tokens of every sequence.
        coefficient: what a nat costs.
    """
    trained = lengths > 0
    last = lengths.cumsum(0)[trained] - 1
    return (-coefficient * kl.detach()).index_add(0, last, scores[trained].to(kl.dtype))


def generalised_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, discount: float, trace: float
) -> Tensor:
    """GAE (https://arxiv.org/abs/1506.02438, eq. 11 and 16), of each sequence for itself: [N], [N], [B] -> [N], no gradient.

        delta_t = r_t + discount V_{t+1} - V_t              V = 0 after the last token of a sequence
        A_t     = delta_t + discount trace A_{t+1}

    The returns that the critic learns are A + V. `trace` (lambda in the paper) 1 is return minus value, 0 is delta.

    Args:
        rewards: [N] of the trained tokens.
        values: [N] the critic's prediction before each of these tokens, of what is still to come.
        lengths: [B] trained tokens of every sequence.
        discount: gamma in the paper.
        trace: lambda in the paper.
    """
    rewards, values = _padded(rewards.detach(), lengths), _padded(values.detach(), lengths)
    # Padding holds zeros: that is the value after the last token, and no advantage comes out of it.
    following = torch.cat([values[:, 1:], values.new_zeros(len(lengths), 1)], 1)
    advantages = rewards + discount * following - values
    for t in range(advantages.shape[1] - 2, -1, -1):
        advantages[:, t] += discount * trace * advantages[:, t + 1]
    return _laid_end_to_end(advantages, lengths)


def whitened(advantages: Tensor, *, mean: float, std: float) -> Tensor:
    """(A - mean) / (std + 1e-4): [N] -> [N], with the floor of every estimator here (TRL's PPO takes sqrt(var + 1e-8), as small).

    Mean and standard deviation are those of the real tokens of all ranks, which the caller adds up: whitening a micro-batch or a
    rank by itself would make the gradient depend on how the batch is split.
    """
    return (advantages - mean) / (std + STD_FLOOR)


def _sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, index, values)


def _real(lengths: Tensor) -> Tensor:
    """[B, longest] True on the tokens a sequence has."""
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)


def _padded(flat: Tensor, lengths: Tensor) -> Tensor:
    """[N] -> [B, longest], zeros behind the end of each sequence."""
    real = _real(lengths)
    return flat.new_zeros(real.shape).masked_scatter(real, flat)


def _laid_end_to_end(padded: Tensor, lengths: Tensor) -> Tensor:
    return padded[_real(lengths)]


def _require_companions(num_samples: int, name: str) -> None:
    if num_samples < 2:
        raise ValueError(
            f"{name} compares samples of one prompt and got G={num_samples}; set rollout.samples_per_prompt to 2 or more"
        )


ADVANTAGES = {
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "batch_normalised": batch_normalised,
    "group_baseline": group_baseline,
}
