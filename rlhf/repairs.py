"""What to change in a recipe, or in how it is launched, so that it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from rlhf.config import Config, Online, Section, merge, parse_config, parse_override
from rlhf.footprint import Sharding
from rlhf.hardware import GIB, Machine
from rlhf.plan import Plan, make_plan
from rlhf.shapes import ModelShape


def repairs(config: Config, shapes: Mapping[str, ModelShape], machine: Machine, sharding: Sharding) -> list[str]:
    """A line for each single change that lowers the peak, those that make it fit first, then by how much they save."""
    before = make_plan(config, shapes, machine, sharding)
    found: list[tuple[bool, float, str]] = []
    for text, changed, other_machine, other_sharding in _changes(config, machine, sharding):
        try:
            plan = make_plan(changed, shapes, other_machine, other_sharding)
        except ValueError:  # the batch does not divide over so many devices
            continue
        if plan.peak < before.peak:
            found.append((not plan.fits, plan.peak, f"{text}: {_describe(plan)}"))
    return [line for *_, line in sorted(found)]


def _describe(plan: Plan) -> str:
    return f"{plan.peak / GIB:.1f} GiB, {'fits' if plan.fits else 'not enough alone'}"


def _changes(config: Config, machine: Machine, sharding: Sharding) -> Iterator[tuple[str, Config, Machine, Sharding]]:
    for overrides in _overrides(config):
        changed = with_overrides(config, overrides)
        if changed is not None:
            yield " ".join(overrides), changed, machine, sharding
    if not machine.device.is_cpu:
        if machine.count > 1:
            for stage in range(sharding.stage + 1, 4):
                yield f"ZeRO-{stage}", config, machine, replace(sharding, stage=stage)
        if not sharding.offload_optimizer:
            offloading = replace(sharding, stage=max(2, sharding.stage), offload_optimizer=True)
            yield f"{offloading.name}", config, machine, offloading
        for count in (2 * machine.count, 4 * machine.count, 8 * machine.count):
            stage = max(2, sharding.stage)
            yield (
                f"{count} devices with ZeRO-{stage}",
                config,
                Machine(count, machine.device),
                replace(sharding, stage=stage),
            )


def _overrides(config: Config) -> Iterator[list[str]]:
    """Overrides of recipe keys that lower memory; those that hold already change nothing and drop out."""
    model = "policy" if isinstance(config, Online) else "model"
    yield [f"{model}.gradient_checkpointing=true"]
    yield [f"{model}.dtype=bfloat16"]
    yield [f"{model}.lora={{rank: 16}}"]
    if isinstance(config, Online):
        least = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
        size = config.training.tokens_per_micro_batch // 2
        while size > least:
            yield [f"training.tokens_per_micro_batch={size}"]
            size //= 2
        yield [f"training.tokens_per_micro_batch={least}"]
        yield ["rollout.engine=vllm"]
        for share in (0.3, 0.2, 0.1):
            yield [f"rollout.gpu_memory_share={share}"]
        if getattr(config, "critic", None) is not None:
            yield ["critic.gradient_checkpointing=true"]
            yield ["policy.gradient_checkpointing=true", "critic.gradient_checkpointing=true"]
    else:
        yield ["training.micro_batch_size=1"]
    yield [f"{model}.gradient_checkpointing=true", f"{model}.lora={{rank: 16}}"]


def with_overrides(config: Section, overrides: list[str]) -> Config | None:
    """The recipe changed; None when the change contradicts the rest of it."""
    raw = config.model_dump(mode="json")
    for override in overrides:
        raw = merge(raw, parse_override(override))
    try:
        return parse_config(raw, "the recipe")
    except ValueError:
        return None
