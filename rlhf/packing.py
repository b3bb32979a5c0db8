"""Rollouts into micro-batches of whole sequences under a token budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.types import Batch, Rollout


def token_budget_chunks(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that each group, padded to its longest member, holds at most `budget` tokens.

    Sequences of similar length go together, longest first, so that little is padded and memory peaks at the first micro-batch.

    Raises:
        ValueError: when one sequence alone exceeds the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    chunks: list[list[int]] = []
    for i in order:
        if lengths[i] > budget:
            raise ValueError(
                f"a sequence of {lengths[i]} tokens exceeds training.tokens_per_micro_batch {budget}; raise it"
            )
        if not chunks or lengths[chunks[-1][0]] * (len(chunks[-1]) + 1) > budget:
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def pack(
    rollouts: Sequence[Rollout], rows: Sequence[int], advantages: Tensor, trained: Tensor, *, pad_token_id: int
) -> Batch:
    """The micro-batch of `rollouts[i] for i in rows`, padded on the right.

    Args:
        rollouts: all rollouts of this rank.
        rows: which of them.
        advantages: [B] of all rollouts.
        trained: [B] False for those kept out of the loss.
    """
    sequences = [(*rollouts[i].prompt.token_ids, *rollouts[i].token_ids) for i in rows]
    width = max(map(len, sequences)) - 1
    input_ids = torch.full((len(rows), width), pad_token_id)
    targets = torch.zeros((len(rows), width), dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.bool)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    sampler_logprobs = torch.zeros((len(rows), width))
    for b, (i, sequence) in enumerate(zip(rows, sequences, strict=True)):
        length, start = len(sequence) - 1, len(rollouts[i].prompt.token_ids) - 1
        input_ids[b, :length] = torch.tensor(sequence[:-1])
        attention_mask[b, :length] = True
        targets[b, start:length] = torch.tensor(rollouts[i].token_ids)
        sampler_logprobs[b, start:length] = torch.tensor(rollouts[i].logprobs)
        mask[b, start:length] = bool(trained[i])
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        targets=targets,
        mask=mask,
        sampler_logprobs=sampler_logprobs,
        advantages=torch.where(mask, advantages[list(rows)].unsqueeze(1), 0.0),
        rows=tuple(rows),
    )
