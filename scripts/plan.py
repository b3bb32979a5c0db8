"""Memory and time of a run before it is launched, without a GPU and without weights (docs/benchmarks/memory_plan.md).

python scripts/plan.py recipes/gsm8k/grpo.yaml --gpus 8xH100-80GB --accelerate recipes/accelerate/zero2.yaml --model-config config.json

Exit code 0 when it fits, 1 when it does not, 2 with one sentence when an argument is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from rlhf.config import PPO, Config, Offline, Online, Pipeline, RewardModelReward, load_config
from rlhf.footprint import Sharding, read_sharding
from rlhf.hardware import GIB, Machine, cpu, parse_gpus
from rlhf.pipeline import load_stages
from rlhf.plan import ALWAYS, Plan, make_plan
from rlhf.repairs import repairs
from rlhf.run import faults_as_sentences, format_table
from rlhf.shapes import ModelShape, find_config, read_shape


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("recipe", metavar="RECIPE")
    main.add_argument("overrides", nargs="*", metavar="key.sub=value")
    main.add_argument("--gpus", required=True, help="8xH100-80GB, 4xANY-24GB, or cpu for this machine's processor")
    main.add_argument("--accelerate", metavar="FILE", help="an accelerate configuration: its ZeRO stage and offload")
    main.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="the ZeRO stage, instead of a configuration's")
    main.add_argument(
        "--model-config",
        action="append",
        default=[],
        metavar="[ROLE=]FILE",
        help="config.json of the models, or of the policy, reference, critic or reward_model",
    )
    return main


def model_paths(config: Config) -> dict[str, str]:
    """Role to path of every model that a training stage loads."""
    if isinstance(config, Offline):
        return {"policy": config.model.path}
    if not isinstance(config, Online):
        return {}
    paths = {"policy": config.policy.path}
    if config.reference is not None and config.reference.path is not None:
        paths["reference"] = config.reference.path
    if isinstance(config, PPO):
        paths["critic"] = config.critic.path
    for reward in config.rewards:
        if isinstance(reward, RewardModelReward):
            paths["reward_model"] = reward.path
    return paths


def read_shapes(config: Config, given: list[str]) -> tuple[dict[str, ModelShape], list[str]]:
    """Shapes by role, and what had to be assumed.

    Raises:
        ValueError: when the policy's config is neither given nor in a local folder.
    """
    files: dict[str, str] = {}
    for text in given:
        role, equals, file = text.partition("=")
        files[role if equals else ""] = file if equals else text
    paths, notes, shapes = model_paths(config), [], {}
    for role in files:
        if role and role not in paths:
            raise ValueError(
                f"--model-config names the role {role!r}; this recipe has {', '.join(paths) or 'no model'}"
            )
    for role, path in paths.items():
        file = files.get(role) or files.get("") or find_config(path)
        if file is None and "policy" in shapes:
            shapes[role] = shapes["policy"]
            notes.append(f"{role} is taken to be as large as the policy: {path} has no config.json")
        elif file is None:
            raise ValueError(
                f"{role} is {path}, which is no local folder with a config.json; give the model's own with --model-config FILE"
            )
        else:
            shapes[role] = read_shape(file)
    return shapes, notes


def read_machine(text: str) -> Machine:
    """A machine of `--gpus`; for `cpu` the memory that is free here and a product's measured speed."""
    if text != "cpu":
        return parse_gpus(text)
    import torch

    left = torch.randn(1024, 1024)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(left, left)
        times.append(time.perf_counter() - started)
    return Machine(1, cpu(memory=float(psutil.virtual_memory().available), flops=2 * 1024**3 / min(times)))


def show(plan: Plan, shapes: dict[str, ModelShape], sharding: Sharding) -> str:
    """The plan as text."""
    device = plan.machine.device
    lines = [f"{plan.machine.count} x {device.name}, {device.memory / GIB:.1f} GiB each, {sharding.name}", ""]
    for role, shape in shapes.items():
        active = f", {shape.active_parameters / 1e9:,.2f} B active" if shape.num_experts else ""
        lines.append(f"  {role}: {shape.model_type}, {shape.parameters / 1e9:,.3f} B parameters{active}")
    lines += ["", "memory per device, GiB"]
    for moment in (ALWAYS, *plan.moments):
        parts = [p for p in plan.parts if p.when == moment]
        total = plan.resident if moment == ALWAYS else plan.moments[moment]
        mark = "  <- peak" if moment == plan.peak_moment else ""
        lines.append(f"  {moment:45} {total / GIB:9.2f}{mark}")
        for part in parts:
            where = " on the host" if part.on_host else ""
            note = f"  ({part.note})" if part.note else ""
            lines.append(f"    {part.name + where:43} {part.size / GIB:9.2f}{note}")
    lines.append(f"  {'peak':45} {plan.peak / GIB:9.2f} of {device.memory / GIB:.1f}")
    if plan.host:
        lines.append(f"  {'host memory for all of its devices':45} {plan.host / GIB:9.2f}")
    lines += ["", "batch arithmetic", format_table(list(plan.arithmetic)), "", "estimated time of a step"]
    total = sum(plan.seconds.values())
    rows = [(name, f"{s:,.1f} s  {s / total:4.0%}") for name, s in plan.seconds.items()]
    lines.append(format_table([*rows, ("together", f"{total:,.1f} s")]))
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a config is read here, never downloaded
    config = load_config(arguments.recipe, arguments.overrides)
    machine = read_machine(arguments.gpus)
    sharding = Sharding()
    if arguments.accelerate:
        sharding, ranks = read_sharding(Path(arguments.accelerate))
        if ranks != machine.count:
            print(f"note: {arguments.accelerate} has num_processes {ranks}; set it to {machine.count}")
    if arguments.zero is not None:
        sharding = replace(sharding, stage=arguments.zero)
    if not isinstance(config, Pipeline):
        return 0 if plan_stage(config, machine, sharding, arguments.model_config) else 1
    fit = True
    for number, (stage, _) in enumerate(load_stages(config), 1):
        print(f"\n[{number}/{len(config.stages)}] {stage.stage}")
        if isinstance(stage, Online | Offline):
            fit &= plan_stage(stage, machine, sharding, arguments.model_config)
        else:
            print("trains nothing")
    return 0 if fit else 1


def plan_stage(config: Config, machine: Machine, sharding: Sharding, model_configs: list[str]) -> bool:
    """Print a stage's plan and what would make it fit; whether it fits."""
    shapes, assumed = read_shapes(config, model_configs)
    plan = make_plan(config, shapes, machine, sharding)
    print(show(plan, shapes, sharding))
    for note in assumed:
        print(f"note: {note}")
    if plan.fits:
        print(f"fits, with {(machine.device.memory - plan.peak) / GIB:.1f} GiB to spare")
        return True
    print(f"does not fit: {(plan.peak - machine.device.memory) / GIB:.1f} GiB too much. What would help, each alone:")
    print("\n".join(f"  {line}" for line in repairs(config, shapes, machine, sharding)))
    return False


def main() -> int:
    arguments = parser().parse_intermixed_args()
    with faults_as_sentences():
        return run(arguments)
    return 2


if __name__ == "__main__":
    sys.exit(main())
