"""What to change in a recipe, or in how it is launched, so that it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rlhf.config import Config, Online, Section, merge, parse_config, parse_override
from rlhf.footprint import Sharding
from rlhf.hardware import GIB, Machine
from rlhf.plan import Plan, make_plan
from rlhf.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Setup:
    """What may be changed."""

    config: Config
    machine: Machine
    sharding: Sharding


def repairs(config: Config, shapes: Mapping[str, ModelShape], machine: Machine, sharding: Sharding) -> list[str]:
    """A line for each single change that lowers the peak, by how much is left; where none is enough, a last line with several together."""
    start = Setup(config, machine, sharding)
    found = _better(start, shapes)
    lines = [f"{text}: {_describe(plan)}" for text, _, plan in found]
    if not any(plan.fits for _, _, plan in found):
        texts, plan = _together(start, shapes)
        if plan.fits:
            lines.append(f"together: {' and '.join(texts)}: {_describe(plan)}")
    return lines


def _better(setup: Setup, shapes: Mapping[str, ModelShape]) -> list[tuple[str, Setup, Plan]]:
    """Changes whose peak is lower, those that fit first, then the lowest."""
    before = make_plan(setup.config, shapes, setup.machine, setup.sharding)
    found = []
    for text, changed in _changes(setup):
        try:
            plan = make_plan(changed.config, shapes, changed.machine, changed.sharding)
        except ValueError:  # the batch does not divide over so many devices
            continue
        if plan.peak < before.peak:
            found.append((text, changed, plan))
    return sorted(found, key=lambda change: (not change[2].fits, change[2].peak))


def _together(setup: Setup, shapes: Mapping[str, ModelShape]) -> tuple[list[str], Plan]:
    """Changes taken one after the other, each time the one that saves most, on the same devices and with all weights trained."""
    texts: list[str] = []
    plan = make_plan(setup.config, shapes, setup.machine, setup.sharding)
    while not plan.fits:
        same = [
            change
            for change in _better(setup, shapes)
            if change[1].machine == setup.machine and "lora" not in change[0] and "dtype" not in change[0]
        ]
        if not same:
            break
        text, setup, plan = min(same, key=lambda change: change[2].peak)
        texts = [t for t in texts if t.partition("=")[0] != text.partition("=")[0]] + [text]
    return texts, plan


def _describe(plan: Plan) -> str:
    return f"{plan.peak / GIB:.1f} GiB, {'fits' if plan.fits else 'not enough alone'}"


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    for overrides in _overrides(setup.config):
        config = with_overrides(setup.config, overrides)
        if config is not None:
            yield " ".join(overrides), replace(setup, config=config)
    machine, sharding = setup.machine, setup.sharding
    if machine.device.is_cpu:
        return
    if machine.count > 1:
        for stage in range(sharding.stage + 1, 4):
            yield f"ZeRO-{stage}", replace(setup, sharding=replace(sharding, stage=stage))
        if not sharding.offload_optimizer:
            offloading = replace(sharding, stage=max(2, sharding.stage), offload_optimizer=True)
            yield offloading.name, replace(setup, sharding=offloading)
    for times in (2, 4, 8):
        more = replace(setup, machine=replace(machine, count=times * machine.count))
        stage = max(2, sharding.stage)
        yield f"{more.machine.count} devices with ZeRO-{stage}", replace(more, sharding=replace(sharding, stage=stage))


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
    else:
        yield ["training.micro_batch_size=1"]


def with_overrides(config: Section, overrides: list[str]) -> Config | None:
    """The recipe changed; None when the change contradicts the rest of it."""
    raw = config.model_dump(mode="json")
    for override in overrides:
        raw = merge(raw, parse_override(override))
    try:
        return parse_config(raw, "the recipe")
    except ValueError:
        return None
