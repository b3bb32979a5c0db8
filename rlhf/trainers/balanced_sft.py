"""TRL's SFTTrainer for mixtures of experts: reports how even the load is, and evens it out where the recipe says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from rlhf.distributed import gather
from rlhf.expert_balance import ExpertBalance
from rlhf.metrics import Metrics, reduce_metrics
from rlhf.routing import Routers


def trained_positions(labels: Tensor, *, ignored: int) -> Tensor:
    """[R, T] labels -> [N] the positions, rows laid end to end, that predict what is trained on."""
    places = torch.zeros_like(labels, dtype=torch.bool)
    places[:, :-1] = labels[:, 1:] != ignored
    return places.flatten().nonzero().flatten()


class BalancedSFTTrainer(SFTTrainer):
    """Adds the loss of rlhf/balance.py over the tokens that are trained on.

    TRL's own takes the load of each micro-batch by itself, so that it depends on how a step is cut, counts padding and prompts, and lumps the
    layers together; it is on by default, by the model's config, and off here.

    Args:
        routers: of the model.
        coefficient: weight of the loss, 0 for none.
        ignored: label of a token that is not trained on.
    """

    def __init__(self, *args: Any, routers: Routers, coefficient: float, ignored: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routers, self._coefficient, self._ignored = routers, coefficient, ignored
        self._balances: list[ExpertBalance] = []
        """One for each optimizer step since the last line of the log."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        balance = ExpertBalance(self.accelerator, self._coefficient)
        if balance.must_count(len(batches)):
            positions = [trained_positions(batch["labels"], ignored=self._ignored) for batch in batches]
            loads = [self._load(batch, of_batch) for batch, of_batch in zip(batches, positions, strict=True)]
            balance.fix(loads, num_tokens=sum(map(len, positions)))
        self._balances.append(balance)
        return batches, num_items

    @torch.no_grad()
    def _load(self, batch: dict[str, Tensor], positions: Tensor) -> Tensor:
        inputs = self._prepare_inputs({key: value for key, value in batch.items() if key != "labels"})
        with self._routers.listening() as routing:
            wrapped: Any = self.model_wrapped
            wrapped(**inputs, use_cache=False, logits_to_keep=1)
        return routing.at(positions).load

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs
        assert num_items_in_batch is not None
        with self._routers.listening() as routing:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        statistics = routing.at(trained_positions(inputs["labels"], ignored=self._ignored))
        # Ranks average their gradients, and the loss is divided by the tokens of all of them.
        return loss + self._balances[-1].loss(statistics) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = Metrics()
        for balance in self._balances:
            balance.describe(metrics, replayed=False)
        self._balances.clear()
        super().log(logs | reduce_metrics(gather(self.accelerator, [metrics.pairs()])), start_time)
