"""A module that is trained, with its optimizer and schedule, as accelerate wraps them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from rlhf.config import Optimizer
from rlhf.distributed import (
    clip_and_step,
    clip_in_engine,
    exact_masters,
    mark_leaf_modules,
    micro_batch,
    stepping_optimizer,
    unwrap,
    zero_stage,
)


class Learner:
    """Gradients add up over the micro-batches of an optimizer step and are reduced over ranks once, at the last.

    Policy and critic are one each, with an accelerator each: DeepSpeed's engine steps in the backward pass of its own accelerator.

    Example:
        for i, batch in enumerate(batches):
            with learner.micro_batch(last=i == len(batches) - 1):
                learner.backward(loss_of(learner.module(batch)))
        norm = learner.step()
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, config: Optimizer, *, num_steps: int) -> None:
        self.accelerator, self._max_grad_norm = accelerator, config.max_grad_norm
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        clip_in_engine(accelerator, config.max_grad_norm)
        if zero_stage(accelerator) == 3:
            mark_leaf_modules(module)
        training = module.training
        with exact_masters(accelerator, module):
            self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.module.train(training)  # accelerate and DeepSpeed may have switched it
        self.scheduler = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule,
            stepping_optimizer(self.optimizer),
            num_warmup_steps=config.warmup_steps,
            num_training_steps=num_steps,
        )

    @property
    def unwrapped(self) -> Any:
        """The module inside whatever accelerate put around it."""
        return unwrap(self.accelerator, self.module)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return micro_batch(self.accelerator, self.module, last=last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's part of the step's loss, whose weights carry the denominator of all ranks."""
        self.accelerator.backward(loss * self.accelerator.num_processes)  # ranks average their gradients

    def step(self) -> float:
        """Clip, step and clear the gradients; returns their norm before clipping.

        Raises:
            FloatingPointError: when the norm is not finite.
        """
        return clip_and_step(self.accelerator, self.module, self.optimizer, self.scheduler, self._max_grad_norm)
