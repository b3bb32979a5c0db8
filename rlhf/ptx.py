"""PTX: the loss of supervised fine-tuning on demonstrations, in every optimizer step (https://arxiv.org/abs/2203.02155, eq. 2)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PTX
from rlhf.guards import require_finite
from rlhf.metrics import Metrics
from rlhf.micro_batches import Packer
from rlhf.types import Batch, Rollout


def take_demonstrations(lengths: Sequence[int], start: int, tokens: int, *, seed: int) -> list[int]:
    """The demonstrations after the first `start` of endless epochs of fresh permutations that fit into a budget, and one at least.

    A function of its arguments, so a resume repeats it.

    Args:
        lengths: response tokens of each demonstration.
        start: how many were taken before.
        tokens: response tokens there is room for.
        seed: of the permutations.
    """
    taken: list[int] = []
    order: dict[int, list[int]] = {}
    while True:
        epoch, offset = divmod(start + len(taken), len(lengths))
        if epoch not in order:
            order[epoch] = random.Random(f"{seed}-demonstrations-{epoch}").sample(range(len(lengths)), len(lengths))
        tokens -= lengths[order[epoch][offset]]
        if taken and tokens < 0:
            return taken
        taken.append(order[epoch][offset])


@dataclass(frozen=True, slots=True)
class Imitation:
    """The demonstrations of one optimizer step; their loss is the same however the step is cut into micro-batches and ranks."""

    batches: Sequence[Batch] = ()
    """This rank's, as many on every rank; none without PTX."""
    weight: float = 0.0
    """What each response token counts in the loss."""

    def loss(self, policy: Any, batch: Batch, metrics: Metrics) -> Tensor:
        """-weight sum log p of one of the batches, by the policy's `rlhf.scorer.Scorer`.

        Raises:
            FloatingPointError: when it is not finite.
        """
        logprobs = policy(batch, 1.0, torch.full((batch.scored.numel(),), -self.weight)).logprobs
        metrics.add("retention/ptx", total=-logprobs.sum().item(), count=logprobs.numel())
        loss = -self.weight * logprobs.sum()
        require_finite(loss, "the loss on retention.ptx.demonstrations")
        return loss


class DemonstrationMix:
    """Which demonstrations each optimizer step imitates.

    Args:
        config: the recipe's block.
        demonstrations: as if the policy had written them.
        seed: of their order.
    """

    def __init__(self, config: PTX, demonstrations: Sequence[Rollout], *, seed: int) -> None:
        self._config, self._demonstrations, self._seed = config, demonstrations, seed
        self._lengths = [len(d.token_ids) for d in demonstrations]
        self.used = 0
        """Demonstrations so far: all that a resume needs."""

    def next(self, packer: Packer, factor: float) -> Imitation:
        """Those of the next optimizer step, with the recipe's coefficient times `factor`. A collective."""
        taken = take_demonstrations(self._lengths, self.used, self._config.tokens_per_step, seed=self._seed)
        self.used += len(taken)
        mine = taken[packer.accelerator.process_index :: packer.accelerator.num_processes]
        everything = torch.ones(len(self._lengths), dtype=torch.bool)
        batches = packer.batches(self._demonstrations, mine, everything, idle=taken[0])
        return Imitation(list(batches), factor * self._config.coefficient / sum(self._lengths[i] for i in taken))
