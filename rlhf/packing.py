"""Rollouts into micro-batches under a token budget: a group's prompt once with its completions after it, or padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.attention import Group
from rlhf.balance import even_choice
from rlhf.types import Batch, Rollout


def by_prompt(rollouts: Sequence[Rollout], rows: Sequence[int]) -> list[list[int]]:
    """Rows that answer the same prompt, in the order in which their prompts come."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in rows:
        groups.setdefault(rollouts[i].prompt.token_ids, []).append(i)
    return list(groups.values())


def _too_long(length: int, budget: int) -> ValueError:
    return ValueError(f"a sequence of {length} tokens exceeds training.tokens_per_micro_batch {budget}; raise it")


def shared_chunks(rollouts: Sequence[Rollout], rows: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of each micro-batch, so that prompts, counted once, and completions fit the budget.

    Whole groups go together, largest first into the first micro-batch with room. A group larger than the budget is cut between
    completions and its prompt computed once for each piece.

    Raises:
        ValueError: when one sequence alone exceeds the budget.
    """
    pieces: list[tuple[int, list[int]]] = []
    for group in by_prompt(rollouts, rows):
        prompt = len(rollouts[group[0]].prompt.token_ids)
        size, piece = prompt, []
        for i in sorted(group, key=lambda i: -len(rollouts[i].token_ids)):
            length = len(rollouts[i].token_ids) - 1  # the last token predicts nothing
            if prompt + length > budget:
                raise _too_long(prompt + length, budget)
            if size + length > budget:
                pieces.append((size, piece))
                size, piece = prompt, []
            size, piece = size + length, [*piece, i]
        pieces.append((size, piece))
    room: list[int] = []
    chunks: list[list[int]] = []
    for size, piece in sorted(pieces, key=lambda p: -p[0]):
        place = next((c for c, free in enumerate(room) if free >= size), None)
        if place is None:
            place = len(room)
            room.append(budget)
            chunks.append([])
        room[place] -= size
        chunks[place] += piece
    return chunks


def padded_chunks(rollouts: Sequence[Rollout], rows: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of each micro-batch, so that, padded to its longest, it holds at most `budget` tokens.

    Sequences of similar length go together, longest first, so that little is padded and memory peaks at the first micro-batch.

    Raises:
        ValueError: when one sequence alone exceeds the budget.
    """
    lengths = {i: len(rollouts[i].prompt.token_ids) + len(rollouts[i].token_ids) - 1 for i in rows}
    chunks: list[list[int]] = []
    for i in sorted(rows, key=lambda i: (-lengths[i], i)):
        if lengths[i] > budget:
            raise _too_long(lengths[i], budget)
        if not chunks or lengths[chunks[-1][0]] * (len(chunks[-1]) + 1) > budget:
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def pack_shared(rollouts: Sequence[Rollout], rows: Sequence[int], trained: Tensor) -> Batch:
    """One row: every prompt once, its completions, each without its last token, directly after it.

    Args:
        rollouts: all rollouts of this rank.
        rows: which of them.
        trained: [B] False for those kept out of the loss.
    """
    tokens: list[int] = []
    positions: list[int] = []
    layout: list[Group] = []
    scored: list[int] = []
    kept: list[int] = []
    experts: list[Tensor | None] = []
    order = [i for group in by_prompt(rollouts, rows) for i in group]
    for group in by_prompt(rollouts, rows):
        prompt = rollouts[group[0]].prompt.token_ids
        start = len(tokens)
        tokens += prompt
        positions += range(len(prompt))
        experts.append(_experts(rollouts[group[0]], 0, len(prompt)))
        end, spans = len(tokens), []
        for i in group:
            first = len(tokens)
            tokens += rollouts[i].token_ids[:-1]
            positions += range(len(prompt), len(prompt) + len(tokens) - first)
            experts.append(_experts(rollouts[i], len(prompt), None))
            if len(tokens) > first:
                spans.append((first, len(tokens)))
            if trained[i]:
                kept.append(i)
                scored += [end - 1, *range(first, len(tokens))]
        layout.append(Group((start, end), tuple(spans)))
    return Batch(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.tensor([positions]),
        attention_mask=None,
        layout=tuple(layout),
        scored=torch.tensor(scored, dtype=torch.long),
        rows=tuple(order),
        routed_experts=_end_to_end(experts),
        **_per_token(rollouts, order, kept),
    )


def pack_padded(rollouts: Sequence[Rollout], rows: Sequence[int], trained: Tensor, *, pad_token_id: int) -> Batch:
    """One row a sequence, without its last token, padded on the right; for models whose attention cannot share prompts."""
    sequences = [(*rollouts[i].prompt.token_ids, *rollouts[i].token_ids[:-1]) for i in rows]
    width = max(map(len, sequences))
    lengths = torch.tensor([len(s) for s in sequences])
    scored: list[int] = []
    experts: list[Tensor | None] = []
    for b, i in enumerate(rows):
        if trained[i]:
            start = b * width + len(rollouts[i].prompt.token_ids) - 1
            scored += range(start, start + len(rollouts[i].token_ids))
        of_row = _experts(rollouts[i], 0, None)
        experts.append(of_row)
        if of_row is not None:  # padding goes to any experts, which nothing counts
            experts.append(even_choice((width - len(sequences[b]), *of_row.shape[1:])))
    return Batch(
        input_ids=torch.tensor([[*s, *[pad_token_id] * (width - len(s))] for s in sequences]),
        position_ids=torch.arange(width).expand(len(rows), width),
        attention_mask=torch.arange(width) < lengths.unsqueeze(1),
        layout=None,
        scored=torch.tensor(scored, dtype=torch.long),
        rows=tuple(rows),
        routed_experts=_end_to_end(experts),
        **_per_token(rollouts, list(rows), [i for i in rows if trained[i]]),
    )


def _experts(rollout: Rollout, start: int, stop: int | None) -> Tensor | None:
    """The sampler's experts at some of a sequence's positions."""
    return None if rollout.routed_experts is None else rollout.routed_experts[start:stop].long()


def _end_to_end(experts: list[Tensor | None]) -> Tensor | None:
    known = [e for e in experts if e is not None]
    return torch.cat(known) if len(known) == len(experts) else None


def _per_token(rollouts: Sequence[Rollout], order: list[int], kept: list[int]) -> dict[str, Any]:
    """What belongs to each trained token, sequence after sequence."""
    place = {i: b for b, i in enumerate(order)}
    lengths = torch.tensor([len(rollouts[i].token_ids) for i in kept], dtype=torch.long)
    return {
        "targets": torch.tensor([t for i in kept for t in rollouts[i].token_ids], dtype=torch.long),
        "sequences": torch.tensor([place[i] for i in kept], dtype=torch.long).repeat_interleave(lengths),
        "sampler_logprobs": torch.tensor([p for i in kept for p in rollouts[i].logprobs], dtype=torch.float32),
        "kept": tuple(kept),
    }
