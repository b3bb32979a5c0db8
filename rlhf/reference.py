"""The model that the KL penalty refers to: frozen weights, the policy without its adapters, or a moving average of the policy."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf.config import Reference as ReferenceConfig
from rlhf.lora import base_of
from rlhf.scorer import Scorer
from rlhf.types import Batch


class ReferencePolicy:
    """Log-probabilities under the reference.

    Args:
        config: the recipe's block.
        policy: the scorer of the policy that is trained.
        frozen: the model at `config.path`; None for the other kinds.
    """

    def __init__(self, config: ReferenceConfig, policy: Scorer, frozen: Any | None) -> None:
        assert (config.kind == "frozen") == (frozen is not None)
        self._config, self._policy = config, policy
        if frozen is not None:
            device = next(policy.parameters()).device
            self.scorer = Scorer(frozen.to(device), share_prompts=policy.share_prompts).eval()
        elif config.kind == "moving_average":
            self.scorer = copy.deepcopy(policy).eval()
        else:
            self.scorer = policy
        if self.scorer is not policy:
            self.scorer.requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float) -> Tensor:
        """[N] of the trained targets."""
        with base_of(self._policy.model) if self._config.kind == "lora_base" else nullcontext():
            return self.scorer(batch, temperature)[0]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After optimizer step number `step`: a moving average takes its share of the policy, reference <- reference + mix (policy - reference)."""
        if self._config.kind == "moving_average" and step % self._config.every_steps == 0:
            for own, new in zip(self.scorer.parameters(), self._policy.parameters(), strict=True):
                own.lerp_(new.to(own.dtype), self._config.mix)
