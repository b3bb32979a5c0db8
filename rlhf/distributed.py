"""Ranks, devices and DeepSpeed. The only file that knows DeepSpeed exists."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs, gather_object, set_seed
from torch import Tensor, nn

from rlhf.run import num_ranks
from rlhf.shapes import moe_blocks


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
    require_whole_experts(plugin.deepspeed_config if plugin is not None else {})
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


def require_whole_experts(deepspeed: Mapping[str, Any]) -> None:
    """Refuse DeepSpeed's expert parallelism (AutoEP), which puts blocks of its own in the place of the model's.

    Its ranks hold some experts each, in tensors of other names and shapes: weights for the rollout engine, saved models and checkpoints
    would be of the experts of one rank.

    Raises:
        ValueError: when a DeepSpeed configuration asks for it.
    """
    if (deepspeed.get("expert_parallel") or {}).get("enabled"):
        raise ValueError(
            "the DeepSpeed configuration has expert_parallel, under which no rank holds the whole model and neither the rollout engine nor a "
            "checkpoint would get the experts of the others; remove it: ZeRO-3 shards experts too (recipes/accelerate/zero3.yaml)"
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


def configured_zero_stage() -> int:
    """What `accelerate launch` was told, before any accelerator is there; 0 without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return 0
    return DeepSpeedPlugin().zero_stage


def global_sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, on all ranks."""
    return accelerator.reduce(value.to(accelerator.device), reduction="sum")  # type: ignore[return-value]


def global_max(accelerator: Accelerator, value: int) -> int:
    """Largest of an integer over all ranks, on all ranks."""
    return max(gather(accelerator, [value]))


def gather(accelerator: Accelerator, items: list[Any], group: Any = None) -> list[Any]:
    """All ranks' items in rank order, on all ranks; a second thread needs a `group` of its own."""
    if accelerator.num_processes == 1:
        return items
    if group is None:
        return gather_object(items)
    of_ranks = [list[Any]() for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(of_ranks, items, group)
    return [item for of_rank in of_ranks for item in of_rank]


def second_group(accelerator: Accelerator) -> Any:
    """For the collectives of a second thread: in one group with the first's they would meet in another order on each rank."""
    return torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None


@contextmanager
def micro_batch(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around one forward and backward pass: gradients are reduced over ranks at the last one of an optimizer step."""
    accelerator.sync_gradients = last
    with nullcontext() if last or is_deepspeed(accelerator) else accelerator.no_sync(model):
        yield


@contextmanager
def exact_masters(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Around `accelerator.prepare`: what ZeRO-1 and 2 step in float32 under bf16 starts as the float32 weights of the module.

    DeepSpeed rounds the module to bfloat16 first and copies that. A weight on bfloat16's grid stays where it is in every forward pass until
    its steps add up to half of the grid's spacing; ones in between move in proportion from the first step on. ZeRO-3 has only loaded bfloat16.
    """
    rounds = zero_stage(accelerator) in (1, 2) and accelerator.mixed_precision == "bf16"
    trained = [p for p in module.parameters() if rounds and p.requires_grad and p.dtype == torch.float32]
    exact = [p.detach().cpu().clone() for p in trained]
    yield
    for p, weight in zip(trained, exact, strict=True):
        _set_master(accelerator, p, weight, None)


def clip_and_step(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, max_grad_norm: float) -> float:
    """Clip, step and clear the gradients; returns the norm before clipping.

    Raises:
        FloatingPointError: when the norm is not finite, before the weights are touched.
    """
    if is_deepspeed(accelerator):
        norm = float(model.get_global_grad_norm())  # stepped in its backward pass, unless this is infinite
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
def loaded_whole(accelerator: Accelerator) -> Iterator[None]:
    """Models that transformers loads inside are whole on every rank, also where ZeRO-3 would shard them from the start."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


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
    Raises:
        ValueError: when the model's config counts experts and no block was found.
    """
    blocks = dict(moe_blocks(model))
    for block in blocks.values():
        block._z3_leaf = True
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    counted = {key: n for c in configs for key in EXPERT_COUNTS if (n := getattr(c, key, None)) and n > 1}
    if counted and not blocks:
        raise ValueError(
            f"the model's config has {counted}, but none of its modules has a child named experts: under ZeRO-3 its ranks could wait for "
            "each other for ever; take an accelerate configuration with zero_stage 2"
        )
    return list(blocks)


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """What accelerate fills in only when it prepares a model that is trained; DeepSpeed's defaults do for one that is not."""
    kept = {key: value for key, value in config.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


def place_frozen(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """A module that is only run: on this rank's device, and under ZeRO-3 sharded over the ranks."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return module.to(accelerator.device)
    import deepspeed

    mark_leaf_modules(module)
    config = _without_auto(copy.deepcopy(plugin.deepspeed_config))
    config.pop("optimizer", None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine.module  # type: ignore[return-value]


def unwrap(accelerator: Accelerator, model: Any) -> Any:
    return accelerator.unwrap_model(model)


def optimizer_state(
    accelerator: Accelerator, module: nn.Module, optimizer: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of everything trained, and `<key>/<name>` of its optimizer state, whole even where ZeRO shards them: the same for any number of ranks.

    A collective under ZeRO, in which the main process gets the result and the others nothing. Empty state before the first step.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    inner = optimizer.optimizer  # torch's, or DeepSpeed's around it
    if not _is_zero(inner):
        stepped = {name: inner.state[p] for name, p in trained.items() if p in inner.state}
        return {**trained}, {f"{key}/{name}": value for name, of_p in stepped.items() for key, value in of_p.items()}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weights: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    main = accelerator.is_main_process
    stepped = next(iter(inner.optimizer.state.values()), {})
    for name, p in trained.items():
        weight = safe_get_full_fp32_param(p)
        assert weight is not None
        weights |= {name: weight.cpu()} if main else {}
        for key, value in stepped.items():
            # the step is one number for all, moments are laid out as the weights are
            of_weight = value if key == "step" else safe_get_full_optimizer_state(p, key)
            assert of_weight is not None
            state |= {f"{key}/{name}": of_weight.clone().cpu()} if main else {}
    return weights, state


def load_optimizer_state(
    accelerator: Accelerator, module: nn.Module, optimizer: Any, weights: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    """What `optimizer_state` gave, into any number of ranks, sharded or not."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if weights.keys() != trained.keys():
        raise ValueError(
            f"the checkpoint has {len(weights)} weights and the model trains {len(trained)}, of other names; is policy.path another model?"
        )
    of_parameters: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        of_parameters.setdefault(name, {})[kind] = value
    with torch.no_grad():
        for name, p in trained.items():
            with whole([p], write=True):
                p.copy_(weights[name])
    inner = optimizer.optimizer
    if not _is_zero(inner):
        by_place = {i: of_parameters[name] for i, name in enumerate(trained) if name in of_parameters}
        inner.load_state_dict({"state": by_place, "param_groups": inner.state_dict()["param_groups"]})
        return
    if of_parameters:
        some = next(iter(of_parameters.values()))
        for flat in _flat_parameters(inner):
            inner.optimizer.state[flat] = {
                kind: value.clone() if kind == "step" else torch.zeros_like(flat) for kind, value in some.items()
            }
        if hasattr(inner, "_lazy_init_hp_params_optimizer_state"):
            inner._lazy_init_hp_params_optimizer_state()  # DeepSpeed makes room for moments in its first step, and finds it so
    for name, p in trained.items():
        _set_master(accelerator, p, weights[name], None)
        for kind, value in of_parameters.get(name, {}).items():
            if kind != "step":
                _set_master(accelerator, p, value, kind)


def _set_master(accelerator: Accelerator, p: Any, value: Tensor, kind: str | None) -> None:
    """The weight that ZeRO's optimizer steps, or its moment `kind`."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if is_sharded(
        p
    ):  # a rank's piece, the last one filled up with zeros; DeepSpeed's own setter of whole values forgets that
        size, rank = p.ds_tensor.numel(), accelerator.process_index
        flat = value.flatten()
        flat = torch.nn.functional.pad(flat, (0, size * accelerator.num_processes - flat.numel()))
        p._z3_optimizer.set_local_hp_param(flat[rank * size : (rank + 1) * size], p, kind)
    elif kind is None:
        safe_set_full_fp32_param(p, value.to(p.device))
    else:
        safe_set_full_optimizer_state(p, value.to(p.device), kind)


def _is_zero(optimizer: Any) -> bool:
    """Whether it is ZeRO's, of stage 1 or 2, or of stage 3."""
    return hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_partitioned_groups_flat")


def _flat_parameters(optimizer: Any) -> list[Tensor]:
    """This rank's pieces of all weights, as ZeRO's optimizer steps them."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return optimizer.fp32_partitioned_groups_flat
    return [flat for group in optimizer.optimizer.param_groups for flat in group["params"]]
