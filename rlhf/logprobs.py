"""Log-probabilities of tokens under a model."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the targets: [..., V], [...] -> [...], in float32.

    The sampler draws from the softmax at its temperature, so the policy whose ratio is taken is that one.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def token_entropy(logits: Tensor, *, temperature: float) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): [..., V] -> [...], in float32."""
    logp = torch.log_softmax(logits.float() / temperature, -1)
    return -(logp.exp() * logp).sum(-1)
