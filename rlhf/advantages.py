"""From the rewards of a group to the advantage of each completion."""

from __future__ import annotations

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
    if rewards.shape[1] < 2:
        raise ValueError(
            f"group_relative compares samples of one prompt and got G={rewards.shape[1]}; set rollout.samples_per_prompt to 2 or more"
        )
    centered = rewards - rewards.mean(1, keepdim=True)
    # Rounding in the mean must not turn equal rewards into a signal of size noise / 1e-4.
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    scale = rewards.std(1, keepdim=True) + STD_FLOOR if scale_by_std else 1.0
    return (centered / scale).masked_fill(equal, 0.0)


ADVANTAGES = {"group_relative": group_relative}
