"""Per-token estimators of KL(policy || reference) from samples of the policy (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """logp - logp_ref: unbiased, can be negative, and its gradient as a loss is zero in expectation. [B, T] -> [B, T]."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(logp - logp_ref)^2 / 2: biased, low variance, and its gradient is the KL's on policy. [B, T] -> [B, T]."""
    return (logprobs - reference_logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = logp_ref - logp: unbiased and never negative (used by GRPO). [B, T] -> [B, T]."""
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


KL = {"k1": k1, "k2": k2, "k3": k3}
