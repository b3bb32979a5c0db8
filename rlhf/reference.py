"""The model that the KL penalty refers to: frozen weights, the policy without its adapters, or a moving average of the policy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import Reference as ReferenceConfig
from rlhf.distributed import place_frozen, whole
from rlhf.lora import base_of
from rlhf.scorer import Scorer
from rlhf.types import Batch


class ReferencePolicy:
    """Log-probabilities under the reference.

    Args:
        config: the recipe's block.
        accelerator: as `rlhf.distributed.start` made it.
        policy: the scorer of the policy that is to be trained, not yet sharded.
        frozen: the model at `config.path`; None for the other kinds.
    """

    def __init__(self, config: ReferenceConfig, accelerator: Accelerator, policy: Scorer, frozen: Any | None) -> None:
        assert (config.kind == "frozen") == (frozen is not None)
        self._config, self._policy = config, policy
        self.scorer = policy
        if config.kind != "lora_base":
            if frozen is not None:
                own = Scorer(frozen, share_prompts=policy.share_prompts)
            else:
                with whole(list(policy.parameters())):  # a copy of a piece would be no copy of the model
                    own = copy.deepcopy(policy)
            self.scorer = place_frozen(accelerator, own.requires_grad_(False).eval())

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> Tensor:
        """[N] of the trained targets; a mixture's tokens go where its own routers send them, also when the policy replays the sampler's."""
        batch = replace(batch, routed_experts=None)
        with base_of(self._policy.model) if self._config.kind == "lora_base" else nullcontext():
            return self.scorer(batch, temperature)[0]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After optimizer step number `step`: a moving average takes its share of the policy, reference <- reference + mix (policy - reference)."""
        if self._config.kind == "moving_average" and step % self._config.every_steps == 0:
            for own, new in zip(self.scorer.parameters(), self._policy.parameters(), strict=True):
                with whole([new]), whole([own], write=True):
                    own.lerp_(new.to(own.dtype), self._config.mix)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of a moving average, whole, for a checkpoint; every rank must ask."""
        state = {}
        for name, parameter in self.scorer.named_parameters():
            with whole([parameter]):
                state[name] = parameter.detach().cpu().clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.scorer.named_parameters():
            with whole([parameter], write=True):
                parameter.copy_(state[name])
