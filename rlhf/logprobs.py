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
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    expected: Tensor | None = None,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and `token_entropy` of logits = hidden @ weight.T, of which only `chunk` rows exist at a time.

    Both have gradients. The backward pass computes each chunk's logits again, one more product with the head in exchange for never
    holding [N, V], unless the caller knew beforehand what the loss would ask.

    Args:
        hidden: [N, D] last hidden states at the positions that predict the targets; products are computed in its precision.
        weight: [V, D] of the language model head, without bias; its gradient is summed in float32.
        targets: [N]
        temperature: of the sampler.
        expected: [N] derivatives of the loss with respect to the log-probabilities, up to a common factor, where they are known
            before the log-probabilities are, as on policy. The gradients are then formed while the logits are there; should the
            loss ask for others, the second product is made after all.
        chunk: rows of logits in memory.

    Returns:
        [N] log-probabilities and [N] entropies, in float32.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, expected, chunk)  # type: ignore[return-value]


class _ChunkedLogprobs(torch.autograd.Function):
    """Buffers are allocated once and written in place: on a CPU fresh memory costs more than the arithmetic done in it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        expected: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        head = _Head(hidden, weight, targets, temperature, chunk)
        probabilities = torch.empty_like(head.logits)
        if expected is not None:
            head.start_gradients(trained=ctx.needs_input_grad[1])
        for rows in head.chunks:
            logp = head.scaled_logits(rows)
            torch.log_softmax(logp, -1, out=logp)
            p = torch.exp(logp, out=probabilities[: len(logp)])
            logprobs[rows] = logp.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
            entropies[rows] = -torch.bmm(p.unsqueeze(1), logp.unsqueeze(2)).flatten()
            if expected is not None:
                head.add_gradients(rows, p, expected[rows].float())
        if expected is None:
            ctx.save_for_backward(hidden, weight, targets)
        else:
            ctx.save_for_backward(hidden, weight, targets, expected, head.d_hidden, head.d_weight)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_logprobs, d_entropies = gradients
        hidden, weight, targets, *known = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = torch.zeros(hidden.shape[0], device=hidden.device)
        if known and d_entropies is None and len(hidden):
            factor = _common_factor(d_logprobs, known[0])
            if factor is not None:
                d_weight = (known[2] * factor).to(weight.dtype) if ctx.needs_input_grad[1] else None
                return known[1] * factor, d_weight, None, None, None, None
        head = _Head(hidden, weight, targets, ctx.temperature, ctx.chunk)
        head.start_gradients(trained=ctx.needs_input_grad[1])
        for rows in head.chunks:
            logits = head.scaled_logits(rows)
            if d_entropies is None:
                head.add_gradients(rows, torch.softmax(logits, -1, out=logits), d_logprobs[rows])
            else:
                logp = torch.log_softmax(logits, -1)
                head.add_gradients(rows, torch.exp(logp, out=logits), d_logprobs[rows], logp, d_entropies[rows])
        d_weight = head.d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return head.d_hidden, d_weight, None, None, None, None


def _common_factor(actual: Tensor, expected: Tensor) -> Tensor | None:
    """The number that `expected` [N] must be multiplied with to give `actual` [N], when there is one."""
    factor = (actual @ expected) / (expected @ expected).clamp(min=torch.finfo(torch.float32).tiny)
    difference = (actual - factor * expected).abs().max()
    return factor if difference <= 1e-6 * actual.abs().max() else None


class _Head:
    """One pass over the rows of a language model head, a chunk at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int) -> None:
        self.hidden, self.weight, self.targets, self.temperature = hidden, weight.to(hidden.dtype), targets, temperature
        rows = max(1, min(chunk, len(hidden)))
        self.chunks = [slice(start, min(start + rows, len(hidden))) for start in range(0, len(hidden), rows)]
        self.logits = torch.empty(rows, len(weight), dtype=torch.float32, device=hidden.device)
        self._narrow = None if hidden.dtype == torch.float32 else self.logits.to(hidden.dtype)

    def scaled_logits(self, rows: slice) -> Tensor:
        """[n, V] in float32, in a buffer that the next call overwrites."""
        logits = self.logits[: rows.stop - rows.start]
        if self._narrow is None:
            torch.mm(self.hidden[rows], self.weight.T, out=logits)
        else:
            logits.copy_(torch.mm(self.hidden[rows], self.weight.T, out=self._narrow[: len(logits)]))
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def start_gradients(self, *, trained: bool) -> None:
        """`trained` is False for a head that is frozen, as with adapters: its gradient is not formed."""
        self.d_hidden = torch.empty_like(self.hidden)
        shape = self.weight.shape if trained else (0,)
        self.d_weight = torch.zeros(shape, dtype=torch.float32, device=self.hidden.device)
        self._product = (
            None if self._narrow is None else torch.empty(shape, dtype=self.hidden.dtype, device=self.hidden.device)
        )

    def add_gradients(
        self, rows: slice, p: Tensor, d_logprobs: Tensor, logp: Tensor | None = None, d_entropies: Tensor | None = None
    ) -> None:
        """Gradients of a chunk: d logp_target / d logits = onehot - p;  d H / d logits = -p (logp + H).

        Args:
            rows: which.
            p: [n, V] probabilities; overwritten.
            d_logprobs: [n]
            logp: [n, V] logarithms of p, where entropies have a gradient.
            d_entropies: [n]
        """
        d_logprobs = d_logprobs.unsqueeze(1) / self.temperature
        if logp is None or d_entropies is None:
            d_logits = p.mul_(-d_logprobs)
        else:
            entropy = -torch.bmm(p.unsqueeze(1), logp.unsqueeze(2)).squeeze(2)
            d_entropies = d_entropies.unsqueeze(1) / self.temperature
            d_logits = p.mul_(logp.add_(entropy).mul_(d_entropies).add_(d_logprobs).neg_())
        d_logits.scatter_add_(1, self.targets[rows].unsqueeze(1), d_logprobs)
        if self._narrow is not None:
            d_logits = self._narrow[: len(d_logits)].copy_(d_logits)
        if self.d_weight.numel():
            if self._product is None:
                self.d_weight.addmm_(d_logits.T, self.hidden[rows])
            else:  # each chunk's product is rounded once; their sum is not
                self.d_weight.add_(torch.mm(d_logits.T, self.hidden[rows], out=self._product))
        torch.mm(d_logits, self.weight, out=self.d_hidden[rows])
