"""A causal language model as the loop uses it: log-probabilities of the trained tokens of a micro-batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.attention import NAME
from rlhf.logprobs import chunked_logprobs, token_entropy, token_logprobs
from rlhf.routing import RouterStatistics, find_routers
from rlhf.types import Batch


def has_plain_head(model: Any) -> bool:
    """Whether logits are hidden @ weight.T and nothing else."""
    scaled = any(getattr(model.config, key, None) not in (None, 1.0) for key in _HEAD_SCALES)
    return not scaled and getattr(model.get_output_embeddings(), "bias", None) is None


_HEAD_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def run(model: Any, batch: Batch) -> Any:
    """A model of transformers, or its body, over the rows of a batch; its output."""
    device = next(model.parameters()).device
    extra = {"layout": batch.layout} if batch.layout is not None else {}
    return model(
        input_ids=batch.input_ids.to(device),
        position_ids=batch.position_ids.to(device),
        attention_mask=None if batch.attention_mask is None else batch.attention_mask.to(device),
        use_cache=False,
        **extra,
    )


class Scored(NamedTuple):
    logprobs: Tensor
    """[N] of the targets, at the sampler's temperature."""
    entropies: Tensor
    """[N] in nats."""
    routing: RouterStatistics | None
    """Of the routers at the trained tokens; None for a model without."""


class Scorer(nn.Module):
    """Runs a model over a `Batch` and scores its trained tokens, without logits of any other position.

    A module of its own, so that what accelerate and DeepSpeed wrap, and hook gradients into, is the whole computation.

    Args:
        model: of transformers, for causal language modelling.
        share_prompts: whether batches are packed rows with a layout.
        replay_experts: a mixture's tokens go to the sampler's experts, with the weights of the model's own routers
            (https://arxiv.org/abs/2510.11370).
        balances_experts: whether the routers' probabilities are part of the loss, and keep their gradient.
        routers_needed_by: key of the recipe that is about routers, if one is.
    """

    def __init__(
        self,
        model: Any,
        *,
        share_prompts: bool,
        replay_experts: bool = False,
        balances_experts: bool = False,
        routers_needed_by: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.plain_head, self.share_prompts = model, has_plain_head(model), share_prompts
        self._balances_experts = balances_experts
        self.replay_experts, self.routers = replay_experts, find_routers(model, needed_by=routers_needed_by)
        model.set_attn_implementation(NAME if share_prompts else "sdpa")

    def forward(self, batch: Batch, temperature: float, expected: Tensor | None = None) -> Scored:
        """Log-probabilities of the targets, entropies and what routers did.

        `expected` [N] are the loss's derivatives where the caller knows them beforehand (see `chunked_logprobs`): it saves time,
        and changes nothing.
        """
        if self.routers is None:
            return Scored(*self._score(batch, temperature, expected), None)
        with self.routers.listening(batch.routed_experts if self.replay_experts else None) as routing:
            logprobs, entropies = self._score(batch, temperature, expected)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._balances_experts):
            return Scored(logprobs, entropies, routing.at(batch.scored, batch.routed_experts))

    def _score(self, batch: Batch, temperature: float, expected: Tensor | None) -> tuple[Tensor, Tensor]:
        output = run(self.model.base_model if self.plain_head else self.model, batch)
        states = output.last_hidden_state if self.plain_head else output.logits
        device = states.device
        selected = states.flatten(0, 1).index_select(0, batch.scored.to(device))
        targets = batch.targets.to(device)
        if not self.plain_head:
            logprobs = token_logprobs(selected, targets, temperature=temperature)
            return logprobs, token_entropy(selected, temperature=temperature)
        weight = self.model.get_output_embeddings().weight
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        with torch.autocast(device.type, enabled=False):
            expected = None if expected is None else expected.to(device)
            return chunked_logprobs(selected.to(dtype), weight, targets, temperature=temperature, expected=expected)
