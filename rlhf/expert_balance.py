"""The load of a mixture's experts over an optimizer step: the auxiliary loss that evens it out, and what is reported of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.balance import balance_weights, relative_load
from rlhf.distributed import global_sum
from rlhf.metrics import Metrics
from rlhf.routing import RouterStatistics
from rlhf.types import Batch


class ExpertBalance:
    """Of one optimizer step; its loss is the same however the step is cut into micro-batches and ranks.

    Which share of the tokens each expert gets is fixed before the first backward pass, so that the loss is a sum over tokens. It takes
    a pass without gradient over the whole step, which a step of one micro-batch on one rank does not need.

    Args:
        accelerator: as `rlhf.distributed.start` made it.
        coefficient: weight of the loss; with 0 there is none, and loads are only reported.

    Example:
        balance = ExpertBalance(accelerator, 0.01)
        if balance.must_count(len(batches)):
            balance.fix([load_without_gradient(b) for b in batches], num_tokens=sum(map(num_trained, batches)))
        for batch in batches:
            loss = ... + balance.loss(routing_of(batch))
    """

    def __init__(self, accelerator: Accelerator, coefficient: float) -> None:
        self._accelerator, self._coefficient = accelerator, coefficient
        self._weights: Tensor | None = None
        self._seen: list[RouterStatistics] = []
        self._total = 0.0

    def must_count(self, num_micro_batches: int) -> bool:
        """Whether `fix` is needed."""
        return self._coefficient > 0 and (num_micro_batches > 1 or self._accelerator.num_processes > 1)

    def fix(self, loads: Sequence[Tensor], *, num_tokens: int) -> None:
        """Take the [L, E] loads of this rank's micro-batches, `num_tokens` trained tokens together; a collective."""
        load = global_sum(self._accelerator, torch.stack(list(loads)).sum(0))
        total = int(global_sum(self._accelerator, torch.tensor(num_tokens)))
        self._weights = balance_weights(load, total, coefficient=self._coefficient)

    def loss(self, routing: RouterStatistics | None) -> Tensor | float:
        """A micro-batch's part of the loss of the step, by whose tokens it is divided."""
        if routing is None:
            return 0.0
        self._seen.append(RouterStatistics(*(statistic.detach() for statistic in routing)))
        if self._coefficient == 0:
            return 0.0
        weights = self._weights
        if weights is None:
            weights = balance_weights(routing.load, int(routing.tokens), coefficient=self._coefficient)
        loss = (weights.to(routing.probability) * routing.probability).sum()
        self._total += loss.item()
        return loss

    def describe(self, metrics: Metrics, *, replayed: bool) -> None:
        """What the step's passes measured; a collective."""
        if not self._seen:
            return
        load = global_sum(self._accelerator, torch.stack([routing.load for routing in self._seen]).sum(0))
        if load.sum() > 0:
            metrics.add("moe/load", total=relative_load(load).item(), count=1)
        for routing in self._seen:
            pairs = routing.tokens.item() * len(routing.load)
            metrics.add("moe/router_entropy", total=routing.entropy.item(), count=pairs)
            if replayed:
                metrics.add("moe/replaced", total=routing.replaced.item(), count=pairs)
        if self._coefficient > 0:
            loss = self._total / self._coefficient * self._accelerator.num_processes
            metrics.add("moe/balance_loss", total=loss, count=1)


def count_disagreement(routing: RouterStatistics | None, batch: Batch, metrics: Metrics) -> None:
    """How many (trained token, layer) went to other experts than in the sampler, before the policy moves."""
    if routing is not None and batch.routed_experts is not None:
        pairs = routing.tokens.item() * len(routing.load)
        metrics.add("moe/disagreement", total=routing.differing.item(), count=pairs)
