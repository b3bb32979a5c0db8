"""Per-token estimators of KL(policy || reference) from samples of the policy (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """logp - logp_ref: unbiased, can be negative, and its gradient as a loss is zero in expectation. [N] -> [N]."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(logp - logp_ref)^2 / 2: biased, low variance, and its gradient is the KL's on policy. [N] -> [N]."""
    return (logprobs - reference_logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = logp_ref - logp: unbiased and never negative (used by GRPO). [N] -> [N]."""
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


def off_policy(kl: Tensor, ratio: Tensor) -> Tensor:
    """An estimate weighted by the ratio of the policy to the one that sampled (https://arxiv.org/abs/2512.02556): [N], [N] -> [N].

        E_old[ratio kl] = E_policy[kl]

    Both factors keep their gradient: then that of the weighted k1 or k3 is, in expectation, the gradient of KL(policy || reference),
    on policy too, where the ratio is 1 and the estimate alone has another gradient (0 for k1, that of KL(reference || policy) for k3).
    """
    return ratio * kl


KL = {"k1": k1, "k2": k2, "k3": k3}
