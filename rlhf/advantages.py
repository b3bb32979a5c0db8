"""From the rewards of a rollout batch to the advantage of each completion.

An estimator maps [P, G], the rewards of all ranks' decided groups, to [P, G]. Whatever it computes, a group whose rewards are all
equal and that is compared only with itself gets exactly 0: rounding in a mean must not become a signal.
"""

from __future__ import annotations

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


def normalised_components(components: Tensor, weights: Tensor) -> Tensor:
    """GDPO (https://arxiv.org/abs/2601.05242): [P, G, K], [K] -> [P, G]: each reward is compared within its group before they are added.

        A = whiten_batch( sum_k w_k (r_k - mean_group(r_k)) / (std_group(r_k) + 1e-4) )

    A component that is large, or varies a lot, no longer drowns the others.
    """
    per_component = torch.stack([group_relative(r, scale_by_std=True) for r in components.unbind(2)], 2)
    return batch_normalised((per_component * weights).sum(2), scale_by_std=True)


def _centered(rewards: Tensor, name: str) -> Tensor:
    """Rewards minus their group's mean; exactly 0 in a group of equal rewards."""
    if rewards.shape[1] < 2:
        raise ValueError(
            f"{name} compares samples of one prompt and got G={rewards.shape[1]}; set rollout.samples_per_prompt to 2 or more"
        )
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(equal, 0.0)


ADVANTAGES = {
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "batch_normalised": batch_normalised,
    "group_baseline": group_baseline,
}
