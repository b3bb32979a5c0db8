"""Ranks, devices and DeepSpeed. The only file that knows DeepSpeed exists."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object, set_seed
from torch import Tensor, nn

from rlhf.run import num_ranks


def start(seed: int) -> Accelerator:
    """The accelerator that `accelerate launch` configured, with every random generator seeded, the same on all ranks.

    Raises:
        ValueError: for a set-up the loop does not support yet.
    """
    # On CPU ranks accelerate must be told, or every rank believes it is alone: cpu=True, under DeepSpeed the backend.
    on_cpu_ranks = "WORLD_SIZE" in os.environ and not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    handlers: list[Any] = [InitProcessGroupKwargs(backend="gloo")] if on_cpu_ranks and deepspeed else []
    accelerator = Accelerator(cpu=on_cpu_ranks and not deepspeed, kwargs_handlers=handlers)
    require_all_ranks(accelerator)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # The loop accumulates by itself, with one denominator an optimizer step.
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
    elif accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {accelerator.gradient_accumulation_steps} in the accelerate configuration; "
            "remove it: training.tokens_per_micro_batch decides how an optimizer step is cut"
        )
    set_seed(seed)
    return accelerator


def beside(accelerator: Accelerator) -> Accelerator:
    """A second accelerator over the same ranks, for a second model with an optimizer of its own."""
    assert accelerator.state is not None
    return Accelerator()  # accelerate's state is one per process


def clip_in_engine(accelerator: Accelerator, max_grad_norm: float) -> None:
    """What DeepSpeed's engine of the next prepared model clips its gradients at; elsewhere `clip_and_step` is told."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["gradient_clipping"] = max_grad_norm


def require_all_ranks(accelerator: Accelerator) -> None:
    """Check that the ranks that were launched know of each other.

    Raises:
        RuntimeError: when they do not; each would train a model of its own.
    """
    alone = accelerator.distributed_type == DistributedType.NO and num_ranks() > 1
    if alone or accelerator.num_processes != num_ranks():
        raise RuntimeError(
            f"{num_ranks()} ranks were launched, but accelerate sees {accelerator.num_processes} of them and calls them "
            f"{accelerator.distributed_type}: gradients would not be shared; check the accelerate configuration against recipes/accelerate/"
        )


def leave() -> None:
    """End a process's part in the ranks; its models must be out of scope. Without it a rank may abort as it exits.

    Gloo's threads let go of the last collective's tensors in their own time; in an interpreter that is shutting down that
    ends the process with SIGABRT, after all its work is done.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # a wrapped model holds the group, and Gloo's threads are joined only with the group's last holder
        torch.distributed.destroy_process_group()


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_stage(accelerator: Accelerator) -> int:
    """0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


def global_sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, on all ranks."""
    return accelerator.reduce(value.to(accelerator.device), reduction="sum")  # type: ignore[return-value]


def global_max(accelerator: Accelerator, value: int) -> int:
    """Largest of an integer over all ranks, on all ranks."""
    return max(gather(accelerator, [value]))


def gather(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """All ranks' items in rank order, on all ranks."""
    return gather_object(items) if accelerator.num_processes > 1 else items


@contextmanager
def micro_batch(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around one forward and backward pass: gradients are reduced over ranks at the last one of an optimizer step."""
    accelerator.sync_gradients = last
    with nullcontext() if last or is_deepspeed(accelerator) else accelerator.no_sync(model):
        yield


def clip_and_step(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, max_grad_norm: float) -> float:
    """Clip, step and clear the gradients; returns the norm before clipping.

    Raises:
        FloatingPointError: when the norm is not finite, before the weights are touched (DeepSpeed: after; nothing is saved).
    """
    if is_deepspeed(accelerator):
        norm = float(model.get_global_grad_norm())  # stepped in its backward pass
    else:
        norm = float(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))  # type: ignore[arg-type]
    if not torch.isfinite(torch.tensor(norm)):
        raise FloatingPointError(
            f"gradient norm is {norm}; the step is not taken and nothing is saved: lower optimizer.learning_rate or look at the rewards"
        )
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return norm


def stepping_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch whose learning rate counts: DeepSpeed may have put its own in the place of the one it was given."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


# ------------------------------------------------------------------------------------------------------------- sharded weights

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs of transformers call it."""


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 left only this rank's piece of it in memory."""
    return hasattr(parameter, "ds_id")


@contextmanager
def whole(parameters: Sequence[Tensor], *, write: bool = False) -> Iterator[None]:
    """Sharded parameters are whole inside; every rank must enter with the same ones.

    Without `write` they are only to be read; with it, what rank 0 makes of them is every rank's.
    """
    if not any(map(is_sharded, parameters)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


def whole_bytes(parameter: Tensor) -> int:
    """The size of a parameter, however much of it is here."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def mark_leaf_modules(model: nn.Module) -> list[str]:
    """Tell ZeRO-3 to gather each mixture-of-experts block at once; returns their names.

    Which experts run differs from rank to rank: gathered one by one, they would be gathered in different orders, which hangs.
    A block is a module with a child `experts`, whatever its class.

    Raises:
        ValueError: when the model's config counts experts and no block was found.
    """
    blocks = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "experts", None), nn.Module)}
    for block in blocks.values():
        block._z3_leaf = True  # type: ignore[assignment]
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    counted = {key: n for c in configs for key in EXPERT_COUNTS if (n := getattr(c, key, None)) and n > 1}
    if counted and not blocks:
        raise ValueError(
            f"the model's config has {counted}, but none of its modules has a child named experts: under ZeRO-3 its ranks could wait for "
            "each other for ever; take an accelerate configuration with zero_stage 2"
        )
    return list(blocks)


def place_frozen(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """A module that is only run: on this rank's device, and under ZeRO-3 sharded over the ranks."""
    if zero_stage(accelerator) != 3:
        return module.to(accelerator.device)
    import deepspeed

    mark_leaf_modules(module)
    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    config.pop("optimizer", None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine.module  # type: ignore[return-value]


def unwrap(accelerator: Accelerator, model: Any) -> Any:
    return accelerator.unwrap_model(model)
