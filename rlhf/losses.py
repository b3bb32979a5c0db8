"""Policy losses of one token. Masking and averaging happen elsewhere (rlhf/masking.py).

Every loss takes the same three tensors, [N] over the trained tokens of some sequences, and a `ratio` of the kind it needs, made by
`token_ratio` or `sequence_ratio`:

    ratio = exp(logp - logp_old)                          per token (PPO, GRPO, DAPO, CISPO, SAPO)
    ratio = exp(mean over the sequence of logp - logp_old)      per sequence (GSPO)
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """exp(logp - logp_old): [N] -> [N]."""
    return torch.exp(logprobs - old_logprobs)


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, sequences: Tensor) -> Tensor:
    """The length-normalised ratio of GSPO (https://arxiv.org/abs/2507.18071), the same for all tokens of a sequence: [N] -> [N].

        s_i = exp( 1/len_i sum_t (logp_t - logp_old_t) )

    Args:
        logprobs: [N] under the policy being trained; the only input with a gradient.
        old_logprobs: [N] under the policy that sampled.
        sequences: [N] index of the sequence each token belongs to, from 0.
    """
    return torch.exp(_sequence_means(logprobs - old_logprobs, sequences))[sequences]


def _sequence_means(values: Tensor, sequences: Tensor) -> Tensor:
    count = int(sequences.max()) + 1 if sequences.numel() else 0
    sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, sequences, values)
    return sums / torch.bincount(sequences, minlength=count).clamp(min=1)


def clipped_policy_loss(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, ceiling: float | None = None
) -> Tensor:
    """Clipped surrogate of PPO (https://arxiv.org/abs/1707.06347, eq. 7), also used by GRPO; with a sequence ratio it is GSPO's.

        L = -min(min(r, ceiling) A, clip(r, 1 - clip_low, 1 + clip_high) A)

    Args:
        ratio: [N]
        advantages: [N]
        clip_low: how far below 1 the ratio may move.
        clip_high: how far above 1 the ratio may move; above clip_low it is DAPO's clip-higher (https://arxiv.org/abs/2503.14476).
        ceiling: bound on the ratio where the advantage is negative, the two-sided clip (https://arxiv.org/abs/2505.07291);
            without it one token that became likely can push as hard as its ratio is large.

    Returns:
        [N] loss of each target, neither masked nor averaged.
    """
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    bounded = ratio if ceiling is None else ratio.clamp(max=ceiling)
    return -torch.minimum(bounded * advantages, clipped_ratio * advantages)


def cispo_loss(ratio: Tensor, logprobs: Tensor, advantages: Tensor, *, max_ratio: float) -> Tensor:
    """CISPO (https://arxiv.org/abs/2506.13585): the clipped ratio is a weight without gradient, so no token is silenced. [N] -> [N].

    L = -stop_gradient(min(r, max_ratio)) A logp
    """
    return -ratio.detach().clamp(max=max_ratio) * advantages * logprobs


def sapo_loss(ratio: Tensor, advantages: Tensor, *, temperature_positive: float, temperature_negative: float) -> Tensor:
    """SAPO (https://arxiv.org/abs/2511.20347): a sigmoid gate around ratio 1 instead of a clip. [N] -> [N].

        L = -4/tau sigmoid(tau (r - 1)) A      tau by the sign of A

    Its gradient is that of the policy gradient at r = 1 and fades smoothly on both sides.
    """
    temperature = torch.where(advantages > 0, temperature_positive, temperature_negative)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


def is_clipped(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """[N] True where the clip took the gradient away: the ratio has left the trust region in the direction of its advantage."""
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def sampler_correction(
    old_logprobs: Tensor, sampler_logprobs: Tensor, sequences: Tensor, *, level: str, mode: str, max_ratio: float
) -> Tensor:
    """Importance weight of the trainer's policy over the sampler's, which computes in another precision: [N] -> [N], no gradient.

        w = pi_old / pi_sampler, per token, or the product over the sequence

    Args:
        old_logprobs: [N] of the trainer's policy at the time of sampling.
        sampler_logprobs: [N] as the engine reported them.
        sequences: [N] index of each token's sequence.
        level: `token` or `sequence`.
        mode: `truncate`: min(w, max_ratio), TIS (https://fengyao.notion.site/off-policy-rl); `mask`: 0 where w > max_ratio, MIS.
        max_ratio: the bound.
    """
    log_ratio = (old_logprobs - sampler_logprobs).detach()
    if level == "sequence":
        count = int(sequences.max()) + 1 if sequences.numel() else 0
        sums = torch.zeros(count, dtype=log_ratio.dtype, device=log_ratio.device).index_add(0, sequences, log_ratio)
        log_ratio = sums[sequences]
    weight = log_ratio.exp()
    return weight.clamp(max=max_ratio) if mode == "truncate" else torch.where(weight > max_ratio, 0.0, weight)
