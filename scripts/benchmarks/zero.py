"""The same optimizer steps under every ZeRO stage, on one rank and on two: the loss curve, and what each rank holds (docs/benchmarks/zero.md).

Every case is a process, or two, that `accelerate launch` starts with a configuration of recipes/accelerate/. It loads a model of about 20 M
parameters, takes `STEPS` optimizer steps of the online update on one stored rollout batch, and says what is alive as the last of them begins.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.cases import EOS, PAD, VOCABULARY, Case, Group, make_groups, read_groups, write_groups
from benchmarks.measuring import LiveTensors, machine, resident
from benchmarks.memory import MemoryCase, recipe_of
from rlhf.config import Architecture
from rlhf.footprint import Sharding

ROOT = Path(__file__).parents[2]
STEPS = 12
SETUPS = ("none", "zero1", "zero2", "zero3", "zero3_offload")
MODELS = ("dense", "moe")
DTYPES = {"fp32": "no", "bf16": "bf16"}
"""What accelerate calls it."""
SHAPE = Architecture(
    hidden_size=512, intermediate_size=1536, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, max_positions=512
)
CASE = Case(prompts=4, samples=4, prompt=16, completion=24, longest=48)
REDUCE_BUCKET = Sharding().reduce_bucket
"""Numbers, DeepSpeed's default."""
BUCKET_BYTES = 16 * 2**20
"""Of the gather for the rollout engine, besides the recipe's own bucket, which is larger than these models."""

LOSS_ERROR = {"fp32": 1e-4, "bf16": 0.05}
"""Largest difference from the losses of one rank without ZeRO in the same precision, as a share of the distance that those cover."""
LOGPROB_ERROR = {"fp32": 1e-4, "bf16": 0.02}
"""Nats, mean over the tokens of the first step."""
ZERO3_SHARE = 0.55
"""Of one rank's parameters and optimizer state, what each of two may hold under ZeRO-3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One case, as `accelerate launch` is told it."""

    zero: str
    """One of `SETUPS`."""
    model: str
    dtype: str
    ranks: int
    folder: str


# ---------------------------------------------------------------------------------------------------------------- in each rank


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage: views of one buffer count once."""
    found = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and not isinstance(tensor, torch._subclasses.FakeTensor):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)
    return found


def alive() -> dict[int, int]:
    """Of all tensors that Python holds, their gradients included."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return storages(tensors + [t.grad for t in tensors if t.is_leaf and t.grad is not None])


@dataclass(slots=True)
class Held:
    """Bytes of live tensors of one rank as the optimizer's last step begins."""

    parameters: int = 0
    optimizer: int = 0
    """Moments, and the float32 weights that are stepped where they are not the parameters themselves."""
    gradients: int = 0
    """All else that the update made: gradients and micro-batches."""
    bucket: int = 0
    """What DeepSpeed sets aside for reducing gradients, whatever the model: on a CPU only what is written becomes resident."""
    resident: int = 0
    """Of the whole process after the last step, less what it was before the model was loaded."""


@contextmanager
def census(before: dict[int, int], modules: list[nn.Module], held: Held) -> Iterator[None]:
    """Counts at each step that an optimizer of torch begins inside, and keeps the last; `modules` is filled by then."""

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = storages(getattr(p, "ds_tensor", p) for module in modules for p in module.parameters())
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        state = {key: size for key, size in storages(stepped + moments).items() if key not in parameters}
        rest = {k: size for k, size in alive().items() if k not in parameters and k not in state and k not in before}
        bucket = {k: size for k, size in rest.items() if size in (2 * REDUCE_BUCKET, 4 * REDUCE_BUCKET)}
        held.parameters, held.optimizer, held.bucket = (sum(s.values()) for s in (parameters, state, bucket))
        held.gradients = sum(rest.values()) - held.bucket

    handle = register_optimizer_step_pre_hook(count)
    yield
    handle.remove()


def rollouts_of(groups: Sequence[Group]) -> tuple[list[Any], list[Any]]:
    from rlhf.types import Prompt, Rollout, Score

    rollouts, scores = [], []
    for g, group in enumerate(groups):
        prompt = Prompt(id=str(g), token_ids=tuple(group.prompt), question="", reference="")
        for tokens, logprobs, reward in zip(group.completions, group.logprobs, group.rewards, strict=True):
            stopped = "stop" if tokens[-1] == EOS else "length"
            rollouts.append(
                Rollout(prompt=prompt, token_ids=tuple(tokens), logprobs=tuple(logprobs), finish_reason=stopped, text="", policy_version=0)
            )  # fmt: skip
            scores.append(Score(verdict="correct" if reward else "wrong", value=reward))
    return rollouts, scores


def recipe(folder: Path) -> Any:
    overrides = (
        f"rollout.prompts_per_batch={CASE.prompts}", f"rollout.samples_per_prompt={CASE.samples}", "training.num_batches=1",
        f"training.passes_per_batch={STEPS}", "training.tokens_per_micro_batch=256", "guards.max_kl_sampler=1e9", "optimizer.learning_rate=3e-5", "algorithm.loss=sapo",
    )  # fmt: skip
    return recipe_of(MemoryCase("grpo", overrides), folder)


def run_zero(spec: Spec) -> None:
    """One rank of a case; the first one writes `outcome.json`."""
    from rlhf.distributed import gather, leave, start
    from rlhf.experience import Ranks, estimate
    from rlhf.metrics import Metrics
    from rlhf.models import load_causal_lm
    from rlhf.updater import Updater

    torch.set_num_threads(1)
    folder = Path(spec.folder)
    config = recipe(folder)
    accelerator = start(config.seed)
    groups = read_groups(folder / "rollouts.json")
    share = CASE.prompts // spec.ranks
    rollouts, scores = rollouts_of(groups[accelerator.process_index * share :][:share])
    before, resident_before = alive(), resident()
    policy = load_causal_lm(str(folder / spec.model), revision=None, dtype="float32")
    updater = Updater(config, accelerator, policy=policy, pad_token_id=PAD)
    del policy
    ranks = Ranks(lambda items: gather(accelerator, items), accelerator.process_index)
    experience = estimate(rollouts, scores, config, ranks=ranks)
    metrics, losses, norms, held = Metrics(), [], [], Held()

    def after_step(_: int) -> None:
        """What the metrics have grown by."""
        for key, values in (("policy/loss", losses), ("policy/grad_norm", norms)):
            total = sum(pairs[key][0] for pairs in gather(accelerator, [metrics.pairs()]))
            values.append(total / spec.ranks - sum(values))

    with census(before, [updater.unwrapped], held):
        updater.update(experience, metrics, after_step=after_step)
    after_step(STEPS)
    old = updater.under_way(experience).old_logprobs
    assert old is not None
    errors = [(o - torch.tensor(r.logprobs)).abs() for o, r in zip(old, rollouts, strict=True) if len(o)]
    difference = torch.cat(errors) if errors else torch.zeros(0)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    held.resident = resident() - resident_before
    outcome = {
        "losses": losses,
        "grad_norms": norms,
        "logprob_errors": gather(accelerator, difference.tolist()),
        "held": gather(accelerator, [asdict(held)]),
        "gather": gather_peaks(updater.unwrapped) if spec.zero == "zero3" and spec.ranks > 1 else None,
    }
    if accelerator.is_main_process:
        (folder / "outcome.json").write_text(json.dumps(outcome))
    del updater
    leave()


def gather_peaks(policy: nn.Module) -> list[dict[str, float]]:
    """Most bytes alive beside this rank's own pieces while the rollout engine is sent whole weights, of which it keeps nothing here."""
    from rlhf import lora

    found, own = [], lora.BUCKET_BYTES
    for size in (own, BUCKET_BYTES):
        lora.BUCKET_BYTES = size
        with LiveTensors() as live:
            for parameter in policy.parameters():
                getattr(parameter, "ds_tensor", parameter).view(-1)
            before = live.peak
            for _ in lora.merged_parameters(policy):
                pass
        found.append({"bucket_mib": size / 2**20, "extra_mib": (live.peak - before) / 2**20})
    lora.BUCKET_BYTES = own
    return found


# ----------------------------------------------------------------------------------------------------------------- from outside


def write_inputs(folder: Path) -> None:
    """Both models, and rollouts of a folder for each with the log-probabilities that its float32 model gives."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = dict(
        vocab_size=VOCABULARY, num_hidden_layers=SHAPE.num_layers, head_dim=SHAPE.head_dim, max_position_embeddings=SHAPE.max_positions,
        tie_word_embeddings=True, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    dense = Qwen3Config(
        **common, hidden_size=SHAPE.hidden_size, intermediate_size=SHAPE.intermediate_size, num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
    )  # fmt: skip
    moe = Qwen3MoeConfig(
        **common, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=512, norm_topk_prob=True,
    )  # fmt: skip
    for name, model_class, config in (("dense", Qwen3ForCausalLM, dense), ("moe", Qwen3MoeForCausalLM, moe)):
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()  # as published weights are
        model.save_pretrained(folder / name)
        groups = [
            Group(prompt=g.prompt, completions=g.completions, rewards=g.rewards, logprobs=[logprobs_of(model, g.prompt, c) for c in g.completions])
            for g in make_groups(CASE, zero_share=0.25)
        ]  # fmt: skip
        write_groups(groups, folder / f"rollouts_{name}.json")


@torch.no_grad()
def logprobs_of(model: nn.Module, prompt: list[int], completion: list[int]) -> list[float]:
    tokens = torch.tensor([prompt + completion])
    every = model(input_ids=tokens[:, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)
    return every.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def measure(spec: Spec) -> dict[str, Any]:
    """The case in processes of its own.

    Raises:
        RuntimeError: when it fails.
    """
    folder = Path(spec.folder)
    (folder / "rollouts.json").write_text((folder / f"rollouts_{spec.model}.json").read_text())
    (folder / "spec.json").write_text(json.dumps(asdict(spec)))
    name = spec.zero if spec.zero != "none" else "single" if spec.ranks == 1 else "ddp"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / f"recipes/accelerate/{name}.yaml",
        "--num_processes", spec.ranks, "--main_process_port", 0, "--mixed_precision", DTYPES[spec.dtype],
        ROOT / "scripts/benchmark.py", "side", folder / "spec.json",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{spec} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    outcome = json.loads((folder / "outcome.json").read_text())
    errors = outcome.pop("logprob_errors")
    return {
        **{key: value for key, value in asdict(spec).items() if key != "folder"},
        **outcome,
        "logprob_error": sum(errors) / len(errors),
        "logprob_worst": max(errors),
        "machine": machine(),
    }


def cases(
    models: Sequence[str], dtypes: Sequence[str], setups: Sequence[str], numbers: Sequence[int], folder: Path
) -> Iterator[Spec]:
    for model, dtype, ranks, setup in itertools.product(models, dtypes, numbers, setups):
        yield Spec(zero=setup, model=model, dtype=dtype, ranks=ranks, folder=str(folder))


def key_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["model"], row["dtype"], row["zero"], row["ranks"]


def mib(row: dict[str, Any], *parts: str) -> float:
    """Of the rank that holds the most."""
    return max(sum(of_rank[part] for part in parts) for of_rank in row["held"]) / 2**20


def loss_error(row: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest difference of the two loss curves, as a share of the distance that the reference's covers."""
    worst = max(abs(a - b) for a, b in zip(row["losses"], reference["losses"], strict=True))
    return worst / (max(reference["losses"]) - min(reference["losses"]))


def refusals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each bound that does not hold among the cases that were run."""
    found, by_key = [], {key_of(row): row for row in rows}
    for row in rows:
        name = f"{row['model']}, {row['dtype']}, {row['zero']}, {row['ranks']} ranks"
        reference = by_key.get((row["model"], row["dtype"], "none", 1))
        if reference is not None and not loss_error(row, reference) <= LOSS_ERROR[row["dtype"]]:
            found.append(f"{name}: the losses differ by {loss_error(row, reference):.2g} of their range")
        if not row["logprob_error"] <= LOGPROB_ERROR[row["dtype"]]:
            found.append(f"{name}: log-probabilities are {row['logprob_error']:.2g} nats from those of float32")
        alone = by_key.get((row["model"], row["dtype"], row["zero"], 1))
        if row["zero"] == "zero3" and row["ranks"] == 2 and alone is not None:
            share = mib(row, "parameters", "optimizer") / mib(alone, "parameters", "optimizer")
            if share > ZERO3_SHARE:
                found.append(f"{name}: each rank holds {share:.3f} of what one holds, above {ZERO3_SHARE}")
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    by_key = {key_of(row): row for row in rows}
    lines = [
        "| model | precision | ZeRO | ranks | parameters | optimizer | gradients | bucket | resident | of one rank | loss, first and last | loss error | log-prob error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reference = by_key.get((row["model"], row["dtype"], "none", 1))
        alone = by_key.get((row["model"], row["dtype"], row["zero"], 1))
        share = mib(row, "parameters", "optimizer") / mib(alone, "parameters", "optimizer") if alone else None
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['zero']} | {row['ranks']} | {mib(row, 'parameters'):.1f} | {mib(row, 'optimizer'):.1f} "
            f"| {mib(row, 'gradients'):.1f} | {mib(row, 'bucket'):.0f} | {mib(row, 'resident'):.0f} | {'' if share is None else f'{share:.3f}'} "
            f"| {row['losses'][0]:+.4f}, {row['losses'][-1]:+.4f} | {'' if reference is None else f'{loss_error(row, reference):.1e}'} "
            f"| {row['logprob_error']:.1e} |"
        )
    return "\n".join(lines)
