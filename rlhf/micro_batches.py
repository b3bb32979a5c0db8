"""Rollouts cut into micro-batches, with what belongs to their tokens: as many on every rank, whatever each rank has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import Online
from rlhf.distributed import gather, global_max
from rlhf.experience import Experience, PerRollout
from rlhf.masking import token_weights
from rlhf.packing import pack_padded, pack_shared, padded_chunks, shared_chunks
from rlhf.types import Batch, Rollout


@dataclass(slots=True)
class MicroBatch:
    """A packed batch and what belongs to its [N] trained tokens."""

    batch: Batch
    weights: Tensor
    """How much each token counts in the loss of its optimizer step."""
    advantages: Tensor
    values: Tensor | None
    returns: Tensor | None
    old_logprobs: Tensor | None = None
    """Of the trainer's policy at the time of sampling; None until they are known, which on policy is in the step itself."""
    entropies: Tensor | None = None
    """Where top_entropy_share asks for them before the step."""


class Packer:
    """Packs rollouts under the recipe's budget of tokens.

    Args:
        config: the recipe.
        accelerator: whose ranks all get the same number of batches.
        share_prompts: whether a prompt is computed once for all its completions.
        pad_token_id: of the tokenizer.
    """

    def __init__(self, config: Online, accelerator: Accelerator, *, share_prompts: bool, pad_token_id: int) -> None:
        self.accelerator, self._config = accelerator, config
        self._share_prompts, self._pad_token_id = share_prompts, pad_token_id

    def batches(
        self, rollouts: Sequence[Rollout], rows: Sequence[int], trained: Tensor, *, idle: int
    ) -> Iterator[Batch]:
        """This rank's `rows`, then batches of rollout `idle` without a trained token while other ranks have more; one at least. A collective.

        Sharded weights need every rank in every pass.
        """
        cut = shared_chunks if self._share_prompts else padded_chunks
        chunks = cut(rollouts, rows, self._config.training.tokens_per_micro_batch)
        num_passes = global_max(self.accelerator, max(1, len(chunks)))
        for chunk in chunks:
            yield self._pack(rollouts, chunk, trained)
        for _ in range(num_passes - len(chunks)):
            yield self._pack(rollouts, [idle], torch.zeros_like(trained))

    def _pack(self, rollouts: Sequence[Rollout], rows: Sequence[int], trained: Tensor) -> Batch:
        if self._share_prompts:
            return pack_shared(rollouts, rows, trained)
        return pack_padded(rollouts, rows, trained, pad_token_id=self._pad_token_id)

    def per_rollout(self, rollouts: Sequence[Rollout], score: Callable[[Batch], Tensor]) -> PerRollout:
        """A function of batches, [N] each, laid out by rollout. A collective."""
        found: dict[int, Tensor] = {}
        everything = torch.ones(len(rollouts), dtype=torch.bool)
        for batch in self.batches(rollouts, range(len(rollouts)), everything, idle=0):
            found |= by_row(rollouts, batch, score(batch))
        return tuple(found[i] for i in range(len(rollouts)))

    def plan(self, experience: Experience, rows: range, *, everything: bool) -> list[MicroBatch]:
        """Micro-batches of one optimizer step. A collective.

        Args:
            experience: this rank's.
            rows: its rollouts of this step, as many on every rank.
            everything: whether sequences without advantage have a gradient all the same. Else they are not computed; the denominator
                counts them in any case.
        """
        rollouts, trained = experience.rollouts, experience.trained
        lengths = [len(rollouts[i].token_ids) if trained[i] else 0 for i in rows]
        all_lengths = torch.tensor(gather(self.accelerator, lengths))
        max_length = self._config.rollout.max_new_tokens
        weights = token_weights(all_lengths, self._config.algorithm.aggregation, max_length=max_length)
        offset = self.accelerator.process_index * len(rows)
        weight_of = dict(zip(rows, weights[offset : offset + len(rows)].tolist(), strict=True))
        needed = [i for i in rows if trained[i] and (everything or experience.advantages[i].any())]
        batches = self.batches(rollouts, needed, trained, idle=rows[0])
        return [_micro_batch(experience, batch, weight_of) for batch in batches]


def _micro_batch(experience: Experience, batch: Batch, weight_of: dict[int, float]) -> MicroBatch:
    def of_tokens(per_rollout: PerRollout | None) -> Tensor | None:
        if per_rollout is None:
            return None
        return torch.cat([torch.zeros(0), *(per_rollout[i] for i in batch.kept)])

    advantages = of_tokens(experience.advantages)
    assert advantages is not None
    return MicroBatch(
        batch,
        torch.tensor([weight_of[i] for i in batch.rows])[batch.sequences],
        advantages,
        of_tokens(experience.values),
        of_tokens(experience.returns),
        of_tokens(experience.old_logprobs),
        of_tokens(experience.entropies),
    )


def by_row(rollouts: Sequence[Rollout], batch: Batch, of_tokens: Tensor) -> dict[int, Tensor]:
    """[N] of a batch's trained tokens, cut into the rollouts they are of."""
    lengths = [len(rollouts[i].token_ids) for i in batch.kept]
    return dict(zip(batch.kept, of_tokens.split(lengths), strict=True))


def with_old_policy(experience: Experience, plans: Sequence[Sequence[MicroBatch]]) -> Experience:
    """The experience with what its micro-batches found out about the policy that sampled."""

    def by_rollout(name: str) -> PerRollout | None:
        found: dict[int, Tensor] = {}
        for micro in (micro for plan in plans for micro in plan):
            of_tokens = getattr(micro, name)
            if of_tokens is None:
                return None
            found |= by_row(experience.rollouts, micro.batch, of_tokens.cpu())
        return tuple(found.get(i, torch.zeros(0)) for i in range(len(experience.rollouts)))

    return replace(experience, old_logprobs=by_rollout("old_logprobs"), entropies=by_rollout("entropies"))
