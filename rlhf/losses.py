"""Policy losses of one token. Masking and averaging happen elsewhere (rlhf/masking.py)."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped surrogate of PPO (https://arxiv.org/abs/1707.06347, eq. 7), also used by GRPO.

        L = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)    r = exp(logp - logp_old)

    Args:
        logprobs: [B, T] under the policy being trained; the only input with a gradient.
        old_logprobs: [B, T] under the policy that sampled.
        advantages: [B, T]
        clip_low: how far below 1 the ratio may move.
        clip_high: how far above 1 the ratio may move.

    Returns:
        [B, T] loss of each target, neither masked nor averaged.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def is_clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """[B, T] True where the clip took the gradient away: the ratio has left the trust region in the direction of its advantage."""
    ratio = torch.exp(logprobs - old_logprobs)
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
