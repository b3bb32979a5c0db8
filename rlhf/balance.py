"""How evenly the routers of a mixture of experts spread their tokens, and whether two engines chose the same experts.

Letters besides those of rlhf/types.py: `L` layers with experts, `E` experts of a layer, `K` experts of a token, `M` positions of a forward
pass, rows laid end to end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def expert_load(experts: Tensor, num_experts: int) -> Tensor:
    """[N, L, K] chosen experts -> [L, E] how many tokens each expert got."""
    return nn.functional.one_hot(experts, num_experts).sum((0, 2))


def balance_weights(load: Tensor, num_tokens: int, *, coefficient: float) -> Tensor:
    """[L, E] factors of the sums over tokens of router probabilities p [L, E] whose products add up to the loss

        coefficient mean_l E sum_e f_le P_le        f_le = share of the tokens that expert e gets,  P_le = mean over tokens of p_le

    The auxiliary loss of Switch (https://arxiv.org/abs/2101.03961, eq. 4) with f over all tokens of the optimizer step, on all ranks, as in
    https://arxiv.org/abs/2501.11873: with f known before the first backward pass the loss is a sum over tokens, whatever the micro-batches.
    It is K where load and probabilities are even. transformers lumps the layers together, which lets one make up for another.

    Args:
        load: [L, E] tokens of each expert in the optimizer step.
        num_tokens: of the optimizer step.
        coefficient: weight of the loss.
    """
    num_layers, num_experts = load.shape
    return coefficient / num_layers * num_experts * load.double() / max(num_tokens, 1) ** 2


def relative_load(load: Tensor) -> Tensor:
    """[L, E] tokens of each expert -> largest share of a layer's work that one expert does, times E, mean over layers: 1 is even."""
    share = load.double() / load.sum(1, keepdim=True).clamp(min=1)
    return (share.amax(1) * load.shape[1]).mean()


def differ(experts: Tensor, others: Tensor) -> Tensor:
    """Whether two choices [..., K] are different sets: [...]."""
    return (experts.sort(-1).values != others.sort(-1).values).any(-1)


def router_weights(logits: Tensor, experts: Tensor, *, normalised: bool) -> Tensor:
    """Softmax of [M, E] logits at the chosen experts [M, K], divided by its sum over them where the model does that: [M, K] float32."""
    probabilities = logits.float().softmax(-1).gather(-1, experts)
    return probabilities / probabilities.sum(-1, keepdim=True) if normalised else probabilities


def even_choice(shape: tuple[int, ...]) -> Tensor:
    """A valid choice for positions that do not count, experts 0 to K - 1: [..., K]."""
    return torch.arange(shape[-1]).expand(shape)
