"""Preference losses: the odds ratio of ORPO (https://arxiv.org/abs/2403.07691).

    odds(y)   = P(y) / (1 - P(y))                  P(y) = exp(mean over tokens of log π(y_t | x, y_<t))
    L_OR      = -log σ(log odds(chosen) - log odds(rejected))
    L_ORPO    = NLL(chosen) + λ L_OR

P is a mean over tokens, so neither response wins by being short. `B` pairs, `S` sequences, `N` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAREST = -1e-8
"""Log-probability up to which 1 - p is told from 0. What float32 logits give nearer to 0 is their rounding."""
_HALF = -0.6931471805599453


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, the same shape: the logarithm of the rest of a log-probability.

        log(-expm1(x))        where exp(x) > 1/2, as 1 - exp(x) would round
        log1p(-exp(x))        elsewhere (https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf, eq. 7)

    x above `NEAREST` counts as it and has no gradient, so value and gradient are finite everywhere. Each branch is given only its own part
    of x: an infinite gradient of the branch that was not chosen is NaN once it is multiplied by 0.
    """
    x = x.clamp(max=NEAREST)
    is_near = x > _HALF
    near, far = torch.where(is_near, x, _HALF), torch.where(is_near, _HALF, x)
    return torch.where(is_near, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(mean_logprobs): [S] -> [S]."""
    return mean_logprobs - log1mexp(mean_logprobs)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), eq. 7 of the paper: [B], [B] mean log-probabilities -> [B]."""
    return -torch.nn.functional.logsigmoid(log_odds(chosen) - log_odds(rejected))


def mean_logprobs(logprobs: Tensor, sequences: Tensor, num_sequences: int) -> Tensor:
    """[N] log-probabilities of tokens -> [S] their mean over each sequence.

    Args:
        logprobs: [N]
        sequences: [N] index of the sequence each token belongs to, from 0; every sequence has one.
        num_sequences: S
    """
    sums = logprobs.new_zeros(num_sequences).index_add(0, sequences, logprobs)
    return sums / torch.bincount(sequences, minlength=num_sequences)
