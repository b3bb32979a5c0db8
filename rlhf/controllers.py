"""Coefficients that follow a measured quantity. Numbers in, number out; the loop keeps the state."""

from __future__ import annotations

import math


def adapted_kl_coefficient(
    coefficient: float, measured: float, *, target: float, horizon: float, samples: int
) -> float:
    """The log-space proportional controller of https://arxiv.org/abs/1909.08593, section 2.2.

        error = clip((measured - target) / target, -0.2, 0.2)
        coefficient <- coefficient (1 + error samples / horizon)

    It moves by at most 20 % each time `horizon` completions have been seen. The paper measures nats per completion and fixes
    samples / horizon at 0.1; here both KLs are nats per token.

    Args:
        coefficient: what a nat costs so far; 0 stays 0.
        measured: mean KL per token of the last rollout batch.
        target: mean KL per token to be held, above 0.
        horizon: completions over which an error of 20 % changes the coefficient by 20 %.
        samples: completions in the last rollout batch.
    """
    error = min(max((measured - target) / target, -0.2), 0.2)
    return coefficient * (1 + error * samples / horizon)


def adapted_entropy_coefficient(
    coefficient: float, entropy: float, *, target: float, step: float, maximum: float
) -> float:
    """The controller of Skywork-OR1 (https://arxiv.org/abs/2505.22312, section 4): up by `step` while entropy <= target, else down.

    The result stays within [0, maximum], so a long time above the target does not have to be made up for below it.

    Args:
        coefficient: what a nat of entropy per token is worth so far.
        entropy: mean per token of the last optimizer step, in nats, over the tokens the bonus acts on.
        target: entropy to be held.
        step: change per optimizer step.
        maximum: upper bound of the coefficient.
    """
    return min(coefficient + step, maximum) if entropy <= target else max(coefficient - step, 0.0)


def applied_entropy_coefficient(coefficient: float, entropy: float, *, target: float) -> float:
    """What the loss of the next optimizer step uses: the coefficient while entropy <= target, else 0 (Skywork-OR1, as above).

    Before anything was measured, entropy is infinity: no bonus.
    """
    return coefficient if entropy <= target else 0.0


def adapted_retention_factor(factor: float, fall: float, *, allowed: float, rate: float, maximum: float) -> float:
    """A proportional controller of the logarithm of a coefficient, by how far an ability has fallen.

        error = clip((fall - allowed) / allowed, -1, 1)
        factor <- clip(factor exp(rate error), 1, maximum)

    Args:
        factor: what the recipe's coefficient is multiplied with so far.
        fall: of accuracy since before training; negative when it rose.
        allowed: fall to be held, above 0.
        rate: largest change of the factor's logarithm.
        maximum: upper bound of the factor.
    """
    error = min(max((fall - allowed) / allowed, -1.0), 1.0)
    return min(max(factor * math.exp(rate * error), 1.0), maximum)
