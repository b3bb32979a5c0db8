"""Policy losses of one token. Masking and averaging happen elsewhere (rlhf/masking.py).

Every loss takes the same three tensors, [N] over the trained tokens of some sequences, and a `ratio` of the kind it needs, made by
`token_ratio` or `sequence_ratio`:

    ratio = exp(logp - logp_old)                          per token (PPO, GRPO, DAPO, CISPO, SAPO)
    ratio = exp(mean over the sequence of logp - logp_old)      per sequence (GSPO, LUSPO)

LUSPO (https://arxiv.org/abs/2602.05261) is GSPO's loss under the aggregation `sequence_sum`. VESPO weighs sequences by itself.
"""

from __future__ import annotations

import math

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
    sums = _sequence_sums(logprobs - old_logprobs, sequences)
    return torch.exp((sums / torch.bincount(sequences).clamp(min=1))[sequences])


def _sequence_sums(values: Tensor, sequences: Tensor) -> Tensor:
    return values.new_zeros(len(torch.bincount(sequences))).index_add(0, sequences, values)


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


def vespo_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    sequences: Tensor,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> Tensor:
    """VESPO (https://arxiv.org/abs/2602.10693): a smooth weight of the whole sequence's ratio instead of a clip. [N] -> [N].

        L = -stop_gradient(phi(w)) A logp       phi(w) = w^power exp(decay (1 - w))
                                                w = product over the sequence of pi / pi_behaviour

    phi(1) = 1: on policy it is the policy gradient. phi is largest, above 1, at w = power / decay and fades on both sides.

    Args:
        logprobs: [N] under the policy being trained; the only input with a gradient.
        behaviour_logprobs: [N] under the policy that sampled. Where the engine's differ from the trainer's old ones, pass
            old_logprobs - log(sampler_correction) and do not multiply by the correction: phi contains it. One token masked by the
            correction (weight 0) then silences its whole sequence.
        advantages: [N]; power and decay go by the sign of each.
        sequences: [N] index of the sequence each token belongs to, from 0.
        power_positive: k of advantages >= 0: how fast the weight grows; above 0. The defaults are TRL's.
        decay_positive: lambda of advantages >= 0: how fast it fades; above 0.
        power_negative: k of advantages < 0.
        decay_negative: lambda of advantages < 0.
    """
    log_w = _sequence_sums((logprobs - behaviour_logprobs).detach(), sequences)[sequences]
    power = torch.where(advantages >= 0, power_positive, power_negative)
    decay = torch.where(advantages >= 0, decay_positive, decay_negative)
    return -torch.exp(power * log_w + decay * (1 - log_w.exp())) * advantages * logprobs


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """The critic's squared error, clipped around its old prediction: [N] -> [N]. InstructGPT (https://arxiv.org/abs/2203.02155) has it
    from OpenAI's baselines; the paper of PPO does not.

        L = 1/2 max( (V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2 )         1/2 (V - R)^2 where clip is None

    A value that has moved towards its return by more than `clip` since the batch was sampled gets no gradient; one that moved away does.
    """
    squared = (values - returns).square()
    if clip is None:
        return squared / 2
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return torch.maximum(squared, (clipped - returns).square()) / 2


def high_entropy_threshold(entropies: Tensor, share: float) -> float:
    """Entropy from which on a token belongs to the `share` with the highest (https://arxiv.org/abs/2506.01939): [N] -> nats.

    It is the entropy of the token at which floor(share (N - 1)) + 1 tokens have been counted from the top, so at least one remains
    and a share of 1 keeps all; tokens that tie with it are kept too. (The mask is that of the quantile 1 - share, interpolated.)

    Args:
        entropies: [N] of the trained tokens of the whole optimizer step, of all micro-batches and ranks.
        share: of tokens that keep their policy gradient; the paper finds 0.2 enough.

    Returns:
        What `high_entropy_mask` takes; infinity when there is no token.
    """
    if not len(entropies):
        return math.inf
    rounding = 1e-6  # 0.29 * 100 is 28.999999999999996 in binary
    kept = math.floor(share * (len(entropies) - 1) + rounding) + 1
    return float(entropies.detach().kthvalue(len(entropies) - kept + 1).values)


def high_entropy_mask(entropies: Tensor, threshold: float) -> Tensor:
    """[N] True on the tokens that keep their policy loss and entropy bonus: entropy >= threshold.

    The others' losses are selected away (torch.where); the weights of `token_weights` keep counting them, so the step stays as large as
    the share says. A KL penalty in the loss acts on all tokens.
    """
    return entropies.detach() >= threshold


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
        log_ratio = _sequence_sums(log_ratio, sequences)[sequences]
    weight = log_ratio.exp()
    return weight.clamp(max=max_ratio) if mode == "truncate" else torch.where(weight > max_ratio, 0.0, weight)
