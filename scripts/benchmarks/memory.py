"""The memory plan against what training really takes on this machine (docs/benchmarks/memory_plan.md).

Each case is a recipe on the benchmark's model with random tokens, every prompt and completion as long as allowed, trained for two steps
by the stage's own trainer in a process of its own. Measured is the highest resident set during model loading and training, minus that
before, when all libraries are imported, and beside it the bytes of the tensors that were alive, which is what was asked of the allocator.
Planned is the plan's peak without its runtime overhead.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import EOS, FIRST_WORD, MODEL, PAD, VOCABULARY
from benchmarks.measuring import LiveTensors, machine, measured
from rlhf.config import Architecture

STEPS = 2
SMALL_MODEL = Architecture(
    hidden_size=192, intermediate_size=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=48, max_positions=8192
)
MODELS = {"benchmark": MODEL, "small": SMALL_MODEL}


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """A recipe of a stage, as overrides of `base`."""

    stage: str
    overrides: tuple[str, ...] = ()


CASES = {
    "sft": MemoryCase("sft"),
    "sft, checkpointing": MemoryCase("sft", ("model.gradient_checkpointing=true",)),
    "sft, LoRA": MemoryCase("sft", ("model.lora={rank: 16}",)),
    "reward model": MemoryCase("reward_model"),
    "grpo": MemoryCase("grpo"),
    "grpo, half the micro-batch": MemoryCase("grpo", ("training.tokens_per_micro_batch=512",)),
    "grpo, one micro-batch": MemoryCase("grpo", ("training.tokens_per_micro_batch=2048",)),
    "grpo, checkpointing": MemoryCase("grpo", ("policy.gradient_checkpointing=true",)),
    "grpo, LoRA": MemoryCase(
        "grpo", ("policy.lora={rank: 16}", "algorithm.kl_coefficient=0.01", "reference={kind: lora_base}")
    ),
    "grpo, KL to frozen weights": MemoryCase("grpo", ("algorithm.kl_coefficient=0.01", "reference={path: model}")),
    "grpo, bfloat16": MemoryCase("grpo", ("policy.dtype=bfloat16",)),
    "ppo": MemoryCase("ppo", ("algorithm.kl_coefficient=0.01", "reference={path: model}")),
    "ppo, checkpointing": MemoryCase(
        "ppo", ("policy.gradient_checkpointing=true", "critic.gradient_checkpointing=true")
    ),
}


def base(stage: str, folder: Path) -> dict[str, Any]:
    """A recipe of the stage, as YAML would give it."""
    common: dict[str, Any] = {"stage": stage, "output_dir": str(folder / "run"), "optimizer": {"learning_rate": 1e-4}}
    if stage in ("sft", "reward_model"):
        offline: dict[str, Any] = {
            "model": {"path": str(folder / "model")},
            "max_tokens": 256,
            "training": {"num_steps": STEPS, "sequences_per_step": 8, "micro_batch_size": 4, "log_every": 1},
        }
        files = {"demonstrations": "unused"} if stage == "sft" else {"train_pairs": "unused", "heldout_pairs": "unused"}
        if stage == "reward_model":
            offline["max_tokens"] = 64
            offline["training"] |= {"sequences_per_step": 16, "micro_batch_size": 8}
        return common | offline | files
    recipe: dict[str, Any] = common | {
        "policy": {"path": str(folder / "model")},
        "problems": "unused",
        "demonstrations": "unused",
        "rollout": {
            "engine": "transformers", "prompts_per_batch": 4, "samples_per_prompt": 4, "max_prompt_tokens": 64, "max_new_tokens": 64,
            "dtype": "float32",
        },
        "rewards": [{"name": "correctness"}],
        "training": {"num_batches": STEPS, "tokens_per_micro_batch": 1024, "checkpoint_every": 100},
        "guards": {"max_kl_sampler": 10.0, "freshness_tolerance": 10.0},
    }  # fmt: skip
    if stage == "ppo":
        recipe["critic"] = {"path": str(folder / "model"), "optimizer": {"learning_rate": 1e-4}}
    return recipe


def recipe_of(case: MemoryCase, folder: Path) -> Any:
    """The case's validated config; paths named `model` are the benchmark's model."""
    from rlhf.config import merge, parse_config, parse_override

    raw = base(case.stage, folder)
    for override in case.overrides:
        raw = merge(raw, parse_override(override.replace("path: model", f"path: {folder / 'model'}")))
    return parse_config(raw, "the case")


def run_memory(spec: dict[str, Any]) -> None:
    """One case in this process; writes `outcome.json` with the measured bytes."""
    import peft  # noqa: F401 - part of what is there before
    import torch
    import trl  # noqa: F401

    folder = Path(spec["folder"])
    torch.set_num_threads(spec["threads"])
    case = CASES[spec["memory"]]
    config = recipe_of(case, folder)
    if case.stage == "reward_model":
        from trl import RewardTrainer  # noqa: F401

        import reward_models.outcome  # noqa: F401
    elif case.stage == "sft":
        from trl import SFTTrainer  # noqa: F401

        import rlhf.trainers.sft
    else:
        import rlhf.trainers.online  # noqa: F401
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # the libraries' own buffers
    train = {"sft": _sft, "reward_model": _reward_model}.get(case.stage, _online)
    with measured() as sample, LiveTensors() as live:
        train(config, folder)
    (folder / "outcome.json").write_text(json.dumps({"peak": sample.peak, "live": live.peak, "wall": sample.wall}))


def _tokens(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]


def _sft(config: Any, folder: Path) -> None:
    from rlhf.models import load_tokenizer
    from rlhf.trainers.sft import Example, train

    draw, width = random.Random(0), config.max_tokens
    examples = [
        Example(prompt_ids=_tokens(draw, width // 4), response_ids=[*_tokens(draw, width - width // 4 - 1), EOS])
        for _ in range(64)
    ]
    train(config, load_tokenizer(str(folder / "model")), examples, pad_token_id=PAD)


def _reward_model(config: Any, folder: Path) -> None:
    from reward_models.outcome import TokenPair, train

    draw = random.Random(0)
    pairs = [  # of different lengths, so that there is padding and with it a mask
        TokenPair(chosen_ids=_tokens(draw, config.max_tokens), rejected_ids=_tokens(draw, config.max_tokens - 1))
        for _ in range(64)
    ]
    train(config, train_pairs=pairs, heldout_pairs=pairs)


def _online(config: Any, folder: Path) -> None:
    from rlhf.config import PPO
    from rlhf.critic import load_critic
    from rlhf.distributed import start
    from rlhf.lora import add_lora
    from rlhf.models import load_causal_lm
    from rlhf.rollout.engine import build_engine
    from rlhf.run import open_run
    from rlhf.trainers.online import OnlineTrainer
    from rlhf.types import Prompt, Rollout, Score
    from rlhf.weight_sync import Probe

    draw, path = random.Random(0), str(folder / "model")

    def reward_fn(rollouts: Sequence[Rollout]) -> list[Score]:
        return [
            Score(verdict="correct" if i % 2 else "wrong", value=float(i % 2), components={"correctness": float(i % 2)})
            for i, _ in enumerate(rollouts)
        ]

    prompts = [
        Prompt(id=str(i), token_ids=tuple(_tokens(draw, config.rollout.max_prompt_tokens)), question="", reference="")
        for i in range(8)
    ]
    policy = load_causal_lm(path, revision=None, dtype=config.policy.dtype)
    if config.policy.lora is not None:
        add_lora(policy, config.policy.lora)
    reference = config.reference
    trainer = OnlineTrainer(
        config,
        start(config.seed),
        policy=policy,
        reference=load_causal_lm(path, revision=None, dtype=reference.dtype)
        if reference is not None and reference.path is not None
        else None,
        critic=load_critic(config.critic) if isinstance(config, PPO) else None,
        engine=build_engine(config.rollout, path, stop_token_id=EOS, decode=lambda _: "", lora=config.policy.lora),
        prompts=prompts,
        reward_fn=reward_fn,
        probes=[
            Probe(
                tuple(_tokens(draw, config.rollout.max_prompt_tokens)),
                tuple(_tokens(draw, config.rollout.max_new_tokens)),
            )
            for _ in range(2)
        ],
        pad_token_id=PAD,
        run=open_run(config),
    )
    trainer.train()


def write_model(folder: Path, size: str = "benchmark") -> None:
    """A random model with a tokenizer that has a chat template."""
    from benchmarks.sides import Spec, build
    from data.chat import CHATML
    from rlhf.models import build_qwen3

    _, tokenizer = build(Spec(side="ours", rollouts="", folder="", tiny=True))
    tokenizer.chat_template = CHATML
    build_qwen3(MODELS[size], tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(name: str, *, size: str = "benchmark", threads: int = 1, malloc: str = "returning") -> dict[str, Any]:
    """Measured and planned bytes of a case; `malloc` as `default` is glibc's own way, which keeps most blocks of up to 32 MiB that are freed."""
    from rlhf.footprint import Sharding
    from rlhf.hardware import Machine, cpu
    from rlhf.plan import RUNTIME_ON_CPU, make_plan
    from rlhf.shapes import ModelShape, read_shape

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_model(folder / "model", size)
        config = recipe_of(CASES[name], folder)
        shape = read_shape(folder / "model" / "config.json")
        shapes: dict[str, ModelShape] = dict.fromkeys(("policy", "reference", "critic", "reward_model"), shape)
        plan = make_plan(config, shapes, Machine(1, cpu(memory=2**40, flops=1e11)), Sharding())
        spec = folder / "spec.json"
        spec.write_text(json.dumps({"memory": name, "folder": text, "threads": threads}))
        command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "side", str(spec)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if malloc == "returning":
            environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # larger blocks go back to the system
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        outcome = json.loads((folder / "outcome.json").read_text())
    planned = plan.peak - RUNTIME_ON_CPU
    return {
        "case": name,
        "malloc": malloc,
        "parameters": shape.parameters,
        "measured_mib": outcome["peak"] / 2**20,
        "live_mib": outcome["live"] / 2**20,
        "planned_mib": planned / 2**20,
        "error": planned / outcome["peak"] - 1,
        "moment": plan.peak_moment,
        "parts": [asdict(part) for part in plan.parts],
        "seconds": outcome["wall"],
        "machine": machine(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| recipe | planned, MiB | live tensors, MiB | resident, MiB | planned against resident | peak at |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['case']} | {r['planned_mib']:,.0f} | {r['live_mib']:,.0f} | {r['measured_mib']:,.0f} | {r['error']:+.1%} | {r['moment']} |"
        for r in rows
    ]
    return "\n".join(lines)
