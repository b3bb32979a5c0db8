"""Log-probabilities of tokens under a model."""

from __future__ import annotations

from typing import Any

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


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and `token_entropy` of logits = hidden @ weight.T, of which only `chunk` rows exist at a time.

    Both have gradients. The backward pass computes each chunk's logits again: one more product with the head in exchange for never
    holding [N, V].

    Args:
        hidden: [N, D] last hidden states at the positions that predict the targets.
        weight: [V, D] of the language model head, without bias.
        targets: [N]
        temperature: of the sampler.
        chunk: rows of logits in memory.

    Returns:
        [N] log-probabilities and [N] entropies, in float32.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk)  # type: ignore[return-value]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logp = torch.log_softmax((hidden[rows] @ weight.T).float() / temperature, -1)
            logprobs[rows] = logp.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
            entropies[rows] = -(logp.exp() * logp).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_logprobs, d_entropies = gradients
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logp = torch.log_softmax((hidden[rows] @ weight.T).float() / ctx.temperature, -1)
            p = logp.exp()
            # d logp_target / d logits = onehot - p;  d H / d logits = -p (logp + H)
            d_logits = -p * d_logprobs[rows].unsqueeze(-1)
            if d_entropies[rows].any():
                entropy = -(p * logp).sum(-1, keepdim=True)
                d_logits -= p * (logp + entropy) * d_entropies[rows].unsqueeze(-1)
            d_logits.scatter_add_(-1, targets[rows].unsqueeze(-1), d_logprobs[rows].unsqueeze(-1))
            d_logits = (d_logits / ctx.temperature).to(hidden.dtype)
            d_hidden[rows] = d_logits @ weight
            d_weight += (d_logits.T @ hidden[rows]).float()
        return d_hidden, d_weight.to(weight.dtype), None, None, None
