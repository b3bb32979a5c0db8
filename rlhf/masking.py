"""How much each token counts in the loss of an optimizer step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def token_weights(
    lengths: Tensor, aggregation: Literal["token", "sequence", "constant", "sequence_sum"], *, max_length: int = 1
) -> Tensor:
    """Weight of each token of each sequence in the loss of one optimizer step.

    The whole step's loss is sum_i w_i * sum_t loss[i, t], whatever the split into micro-batches and ranks.

    Args:
        lengths: [B] trained tokens of every sequence of the optimizer step, over all micro-batches and ranks; 0 for one left out.
        aggregation: `token`: every token counts the same, w_i = 1 / sum_j len_j (DAPO, https://arxiv.org/abs/2503.14476, eq. 12).
            `sequence`: every sequence counts the same, w_i = 1 / (len_i * number of sequences)
            (GRPO, https://arxiv.org/abs/2402.03300, eq. 3). `constant`: w_i = 1 / (max_length * number of sequences), so that
            a token's weight does not depend on how long its sequence is (Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2).
            `sequence_sum`: the mean over sequences of the sum over tokens, w_i = 1 / number of sequences, so that a sequence counts as
            its length; with a sequence's ratio it is LUSPO (https://arxiv.org/abs/2602.05261).
        max_length: tokens a completion may have; only `constant` needs it.

    Returns:
        [B], 0 for sequences without trained tokens.
    """
    if aggregation == "token":
        return torch.where(lengths > 0, 1.0 / lengths.sum().clamp(min=1), 0.0)
    num_sequences = (lengths > 0).sum().clamp(min=1)
    if aggregation == "constant":
        return torch.where(lengths > 0, 1.0 / (max_length * num_sequences), 0.0)
    if aggregation == "sequence_sum":
        return torch.where(lengths > 0, 1.0 / num_sequences, 0.0)
    return torch.where(lengths > 0, 1.0 / (lengths.clamp(min=1) * num_sequences), 0.0)
