"""What a run will need before it is launched: memory of each device by part, and the time of a step by part.

Pure functions of a recipe, of the shapes of its models (rlhf/shapes.py) and of a machine (rlhf/hardware.py); the formulas of a single
model are in rlhf/footprint.py. Every length is the longest the recipe allows: prompts of max_prompt_tokens, completions of
max_new_tokens, full micro-batches.

Only the largest moment counts: memory that is there always, plus the largest sum over the moments of a step (`Part.when`).
A reference, a reward model and a rollout engine are whole on every device, whatever the ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlhf import footprint
from rlhf.config import (
    DPO,
    ORPO,
    PPO,
    Config,
    ModelReward,
    Offline,
    Online,
    PreferenceTraining,
    ProcessRewardModel,
    ProcessRewardModelReward,
    RewardModel,
    batch_arithmetic,
    require_unsharded,
    trained_model,
)
from rlhf.footprint import WIDTH, Sharding, Trained, forward_scratch, trained_of
from rlhf.hardware import GIB, Device, Machine
from rlhf.shapes import ModelShape

ALWAYS = "always"
PROBE_COPIES = 3
"""Of a probe's logits in float32 while rlhf/weight_sync.py scores it: the model's, the scaled ones, one in the log-sum-exp."""
ENGINE_SEQUENCES = 256
"""That the transformers engine samples together (rlhf/rollout/transformers.py)."""
HELDOUT_PAIRS = 64
"""That reward_models/outcome.py scores together."""
HELDOUT_TOKENS = 16_384
"""That reward_models/process.py scores together."""
RUNTIME_ON_GPU = 1.5 * GIB
"""CUDA context, libraries' workspaces, fragmentation: assumed, not measured."""
RUNTIME_ON_CPU = 0.75 * GIB
"""Interpreter and libraries."""
TRAINING_EFFICIENCY = 0.35
"""Share of the data sheet's operations that training reaches: assumed."""
SAMPLING_EFFICIENCY = 0.6
"""Share of the data sheet's bandwidth that sampling reaches: assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Memory for one purpose."""

    name: str
    when: str
    """`always`, or the moment of a step that it belongs to."""
    size: float
    """Bytes on each device."""
    on_host: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a recipe needs on a machine."""

    parts: tuple[Part, ...]
    machine: Machine
    seconds: Mapping[str, float]
    """Part of a step to its estimated time."""
    arithmetic: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()

    @property
    def resident(self) -> float:
        """Bytes that are there all the time."""
        return sum(p.size for p in self.parts if p.when == ALWAYS and not p.on_host)

    @property
    def moments(self) -> dict[str, float]:
        """Bytes on top of `resident`, at each moment of a step."""
        sums: dict[str, float] = {}
        for part in self.parts:
            if part.when != ALWAYS and not part.on_host:
                sums[part.when] = sums.get(part.when, 0.0) + part.size
        return sums

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__) if self.moments else ALWAYS

    @property
    def peak(self) -> float:
        """Most bytes on a device at any moment."""
        return self.resident + self.moments.get(self.peak_moment, 0.0)

    @property
    def host(self) -> float:
        """Bytes of offloaded parts in the host's memory, of all its devices."""
        return self.machine.count * sum(p.size for p in self.parts if p.on_host)

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.device.memory


def make_plan(config: Config, shapes: Mapping[str, ModelShape], machine: Machine, sharding: Sharding) -> Plan:
    """The plan of a training stage.

    Args:
        config: its recipe.
        shapes: of the models by role: `policy` (also what SFT and reward models train), `reference`, `critic`, `reward_model`.
        machine: the devices, one rank each.
        sharding: of what is trained.

    Raises:
        ValueError: when the stage trains nothing, its batch does not divide over the devices, or 4-bit weights would be sharded.
    """
    model = trained_model(config)
    if model is not None:
        require_unsharded(model, sharding.stage)
    arithmetic = tuple(batch_arithmetic(config, machine.count))
    if isinstance(config, Online):
        work = OnlineWork.of(config, machine)
        parts = [*_online_parts(config, shapes, machine, sharding, work)]
        seconds = _online_seconds(config, shapes, machine, work)
    elif isinstance(config, Offline):
        parts = [*_offline_parts(config, shapes["policy"], machine, sharding)]
        seconds = _offline_seconds(config, shapes["policy"], machine)
    else:
        raise ValueError(
            f"the stage {config.stage} trains nothing; plan sft, reward_model, process_reward_model, orpo, dpo, grpo or ppo"
        )
    runtime = RUNTIME_ON_CPU if machine.device.is_cpu else RUNTIME_ON_GPU
    parts.append(Part(name="runtime overhead", when=ALWAYS, size=runtime, note="assumed"))
    return Plan(
        parts=tuple(p for p in parts if p.size > 0),
        machine=machine,
        seconds=seconds,
        arithmetic=arithmetic,
        warnings=tuple(_warnings(config, shapes, machine, sharding)),
    )


# --------------------------------------------------------------------------------------------------------------------------- memory


def _trained_parts(role: str, model: Trained, sharding: Sharding, machine: Machine) -> list[Part]:
    """What a model that is trained needs always; gradients come and go, and are listed with their moments."""
    prefix = "" if role == "policy" else f"{role}: "
    devices = machine.count
    return [
        Part(
            name=f"{prefix}weights",
            when=ALWAYS,
            size=footprint.weights(model, sharding, devices),
            on_host=sharding.offload_weights and sharding.stage == 3,
        ),
        Part(
            name=f"{prefix}optimizer",
            when=ALWAYS,
            size=footprint.optimizer(model, sharding, devices),
            on_host=sharding.offload_optimizer,
        ),
        Part(name=f"{prefix}communication", when=ALWAYS, size=footprint.communication(model, sharding, devices)),
    ]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tokens of a forward pass, and how many of them are scored."""

    tokens: int
    scored: int


def _step_parts(
    role: str,
    model: Trained,
    sharding: Sharding,
    machine: Machine,
    *,
    micro_batches: Sequence[MicroBatch],
    head: Callable[[float], footprint.Head],
    repeated_heads: bool = False,
    fused_optimizer: bool = False,
) -> list[Part]:
    """The moments of an optimizer step: those of its largest micro-batch, and the update.

    Gradients of earlier micro-batches are there from the start, so the second may need more than the first, which is the largest.
    """
    whole = footprint.gradients(model, sharding, machine.count)
    embedding = model.trained_width * model.shape.vocab_size * model.shape.hidden_size if model.lora is None else 0.0
    of_head = embedding if model.has_head else 0.0
    unpacked = {"dequantised weight": float(model.dequantised)} if model.quantised else {}

    def moments(micro: MicroBatch, earlier: float) -> dict[str, dict[str, float]]:
        saved = footprint.activations(model, micro.tokens, repeated_heads=repeated_heads)
        scratch = footprint.backward_scratch(model, micro.tokens, repeated_heads=repeated_heads)
        logits = head(micro.scored)
        return {
            "forward pass": {"gradients": earlier, "activations": saved, "logits": logits.forward, **unpacked},
            "gradient of the head": {"gradients": earlier, "activations": saved, "logits": logits.backward},
            "backward pass": {
                "gradients": max(earlier, of_head),
                "activations": saved + scratch,
                "logits": of_head if earlier else 0.0,
                **unpacked,
            },
        }

    candidates = [moments(micro_batches[0], 0.0), *(moments(micro, whole) for micro in micro_batches[1:2])]
    found = max(candidates, key=lambda c: max(sum(parts.values()) for parts in c.values()))
    # The embedding's gradient is dense, and added to the head's where they are tied or to those of earlier micro-batches.
    found["end of the backward pass"] = {"gradients": whole + embedding}
    in_place = fused_optimizer or sharding.offload_optimizer
    found["update"] = {
        "gradients": whole,
        "optimizer scratch": 0.0 if in_place else _update_scratch(model, sharding, machine),
    }
    return [
        Part(name=name, when=f"{role}: {moment}", size=size)
        for moment, parts in found.items()
        for name, size in parts.items()
    ]


def _update_scratch(model: Trained, sharding: Sharding, machine: Machine) -> float:
    """AdamW on a CPU goes tensor by tensor, with two temporaries of the largest; on a GPU over all of a rank's at once, with one of each."""
    if not machine.device.is_cpu:
        return model.trained_width * model.trained / (machine.count if sharding.stage else 1)
    largest = model.shape.vocab_size * model.shape.hidden_size if model.lora is None else 0
    return 2.0 * model.trained_width * largest


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineWork:
    """What a rank computes of a rollout batch when every prompt and completion is as long as allowed."""

    sequences: int
    """Completions of this rank."""
    prompt: int
    completion: int
    tokens: int
    """That all optimizer steps of a pass compute: prompts once where they are shared."""
    micro_batches: tuple[MicroBatch, ...]
    """Of an optimizer step, the largest first; at most two of them."""
    steps: int
    """Optimizer steps on the batch."""

    @classmethod
    def of(cls, config: Online, machine: Machine) -> OnlineWork:
        rollout, training = config.rollout, config.training
        groups = rollout.prompts_per_batch // machine.count
        per_step = max(1, groups // training.minibatches_per_batch)
        sequences = groups * rollout.samples_per_prompt
        prompt, completion = rollout.max_prompt_tokens, rollout.max_new_tokens
        samples = rollout.samples_per_prompt if training.layout == "shared" else 1
        budget = training.tokens_per_micro_batch
        # completions of a group that a micro-batch holds beside the prompt; the last token of each predicts nothing
        held = max(1, min(samples, (budget - prompt) // max(1, completion - 1)))
        piece = prompt + held * (completion - 1)
        pieces = math.ceil(samples / held) * per_step * (rollout.samples_per_prompt // samples)
        together = max(1, min(budget // piece, pieces))
        return cls(
            sequences=sequences,
            prompt=prompt,
            completion=completion,
            tokens=pieces * piece * training.minibatches_per_batch,
            micro_batches=tuple(
                MicroBatch(size * piece, size * held * completion)
                for size in (together, min(together, pieces - together))
                if size
            ),
            steps=training.minibatches_per_batch * training.passes_per_batch,
        )


def _online_parts(
    config: Online, shapes: Mapping[str, ModelShape], machine: Machine, sharding: Sharding, work: OnlineWork
) -> list[Part]:
    policy = trained_of(config.policy, shapes["policy"], sharding, has_head=True)
    parts = _trained_parts("policy", policy, sharding, machine)
    parts += _engine_parts(config, policy, machine, work)
    largest = work.micro_batches[0]

    def head(scored: float) -> footprint.Head:
        return footprint.head(policy, scored)

    parts += _step_parts("policy", policy, sharding, machine, micro_batches=work.micro_batches, head=head)
    if isinstance(config, PPO):
        critic = trained_of(config.critic, shapes["critic"], sharding, has_head=False)
        parts += _trained_parts("critic", critic, sharding, machine)
        parts += _step_parts(
            "critic", critic, sharding, machine, micro_batches=work.micro_batches, head=footprint.no_head
        )
    if config.reference is not None:
        parts += _reference_parts(config, policy, shapes, sharding, machine, largest)
    if (
        config.retention.elastic is not None
    ):  # F of the plain weights; without adapters the weights it holds on to besides
        copies = 1 if policy.lora is not None else 2
        parts.append(Part(name="elastic anchor", when=ALWAYS, size=4.0 * copies * policy.parameters))
    for reward in config.rewards:
        if isinstance(reward, ModelReward):
            shape, name = shapes[reward.kind], reward.kind.replace("_", " ")
            frozen = Trained(shape=shape, dtype="float32", checkpointing=False, lora=None, has_head=False)
            sequence = work.prompt + work.completion
            of_steps = isinstance(reward, ProcessRewardModelReward)
            together = max(reward.tokens_per_batch // sequence, 1) if of_steps else reward.batch_size
            tokens = min(together, work.sequences) * sequence
            pieces = _pieces(sharding, machine) if reward.placement == "sharded" else 1
            size = 4.0 * frozen.parameters / pieces
            parts.append(Part(name=name, when=ALWAYS, size=size))
            scratch = forward_scratch(shape, "float32", tokens)
            parts.append(Part(name=f"{name} activations", when="scoring", size=scratch))
    return parts


def _engine_parts(config: Online, policy: Trained, machine: Machine, work: OnlineWork) -> list[Part]:
    """vLLM takes its share of a GPU whole, or on a CPU its weights and the reserved cache. transformers' generate keeps keys, values and
    every step's logits in float32, of at most 256 sequences."""
    rollout, shape = config.rollout, policy.shape
    width = WIDTH[rollout.dtype]
    probe = PROBE_COPIES * 4.0 * work.completion * shape.vocab_size
    found = [Part(name="logits of a probe", when="push of the weights", size=probe)]
    if rollout.server is not None and (rollout.server.urls or (rollout.server.devices and not machine.device.is_cpu)):
        return found  # on devices of their own
    if rollout.engine != "transformers" and not machine.device.is_cpu:
        size = rollout.gpu_memory_share * machine.device.memory
        return [*found, Part(name="rollout engine", when=ALWAYS, size=size, note="weights and KV cache of vLLM")]
    engine = width * shape.parameters + (
        4 * policy.trained if policy.lora is not None and config.policy.lora.sync == "adapter" else 0  # type: ignore[union-attr]
    )
    replicas = rollout.server.replicas if rollout.server is not None else 1
    found.append(Part(name="rollout engine", when=ALWAYS, size=replicas * engine))
    if rollout.engine != "transformers":
        return [*found, Part(name="KV cache", when=ALWAYS, size=replicas * rollout.kv_cache_gb * GIB)]
    rows = min(ENGINE_SEQUENCES, work.sequences)
    cache = rows * (work.prompt + work.completion) * kv_bytes_per_token(shape, rollout.dtype)
    logits = 4.0 * rows * work.completion * shape.vocab_size
    found.append(Part(name="KV cache", when="rollout", size=cache))
    return [*found, Part(name="logits of every step", when="rollout", size=logits)]


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """2 w L c: keys and values of every layer."""
    return 2 * WIDTH[dtype] * shape.num_layers * shape.kv_width


def _pieces(sharding: Sharding, machine: Machine) -> int:
    """Of the weights of a model that is only run."""
    return machine.count if sharding.stage == 3 else 1


def _reference_parts(
    config: Online,
    policy: Trained,
    shapes: Mapping[str, ModelShape],
    sharding: Sharding,
    machine: Machine,
    micro: MicroBatch,
) -> list[Part]:
    reference = config.reference
    assert reference is not None
    shape = shapes.get("reference", policy.shape) if reference.kind == "frozen" else policy.shape
    dtype = reference.dtype if reference.kind == "frozen" else policy.dtype
    size = 0.0 if reference.kind == "lora_base" else WIDTH[dtype] * shape.parameters / _pieces(sharding, machine)
    found = [Part(name="reference", when=ALWAYS, size=size)]
    scratch = forward_scratch(shape, dtype, micro.tokens)
    logits = 8.0 * min(footprint.HEAD_ROWS, micro.scored) * shape.vocab_size
    in_loss = config.algorithm.kl_in == "loss"
    moment = "policy: reference in the loss" if in_loss else "scoring"
    if in_loss:  # the policy's graph is there meanwhile
        found.append(Part(name="activations", when=moment, size=footprint.activations(policy, micro.tokens)))
        found.append(Part(name="logits", when=moment, size=footprint.head(policy, micro.scored).kept))
    found.append(Part(name="reference activations", when=moment, size=scratch))
    return [*found, Part(name="reference logits", when=moment, size=logits)]


def _offline_parts(config: Offline, shape: ModelShape, machine: Machine, sharding: Sharding) -> list[Part]:
    judge = config if isinstance(config, ProcessRewardModel | RewardModel) else None
    speaks = judge is None or judge.head != "classification"
    model = trained_of(config.model, shape, sharding, has_head=speaks)
    rows = config.training.micro_batch_size * _sequences_per_row(config)
    tokens = rows * config.max_tokens

    def head(scored: float) -> footprint.Head:
        fused = not machine.device.is_cpu
        # Where Triton is, positions that are not trained on are left out; how many is not known here.
        if judge is not None:
            at_steps = rows if judge.head == "next_token" else None
            return footprint.step_head(model, scored, rows=at_steps) if speaks else footprint.no_head(scored)
        if isinstance(config, ORPO):
            return footprint.head(model, scored)
        return footprint.trl_head(model, scored, fused=fused)

    micro = MicroBatch(tokens, tokens)
    accumulation = config.training.accumulation(machine.count)
    parts = _trained_parts("policy", model, sharding, machine)
    parts += _step_parts(
        "policy",
        model,
        sharding,
        machine,
        micro_batches=[micro] * min(2, accumulation),
        head=head,
        repeated_heads=True,  # under a mask transformers repeats key-value heads
        fused_optimizer=True,  # the Trainer's default
    )
    if judge is not None:
        pairs = isinstance(config, RewardModel)
        size = forward_scratch(shape, model.dtype, HELDOUT_PAIRS * config.max_tokens if pairs else HELDOUT_TOKENS)
        parts.append(Part(name="held-out pairs" if pairs else "held-out solutions", when="scoring", size=size))
    if isinstance(config, DPO) and config.reference == "frozen":
        size = WIDTH[config.model.dtype] * shape.parameters / _pieces(sharding, machine)
        parts.append(Part(name="reference", when=ALWAYS, size=size))
    return parts


def _sequences_per_row(config: Offline) -> int:
    """Sequences that a row of the data becomes; a prompt that a pair's responses share is counted twice."""
    return 2 if isinstance(config, RewardModel | PreferenceTraining) else 1


def _warnings(config: Config, shapes: Mapping[str, ModelShape], machine: Machine, sharding: Sharding) -> list[str]:
    found = []
    if machine.device.is_cpu:
        found.append(
            "glibc keeps most blocks of up to 32 MiB that are freed, and a run may take a third more than this; "
            "MALLOC_MMAP_THRESHOLD_=1048576 in the environment gives them back, for more time"
        )
    if isinstance(config, Online) and config.rollout.engine != "transformers" and not machine.device.is_cpu:
        shape, rollout = shapes["policy"], config.rollout
        share = rollout.gpu_memory_share * machine.device.memory
        cache = share - WIDTH[rollout.dtype] * shape.parameters
        longest = (rollout.max_prompt_tokens + rollout.max_new_tokens + 1) * kv_bytes_per_token(shape, rollout.dtype)
        if cache < longest:
            found.append(
                f"vLLM's share of {share / GIB:.1f} GiB leaves {max(0.0, cache) / GIB:.2f} GiB for keys and values, less than one sequence "
                f"({longest / GIB:.2f} GiB), and it will not start; raise rollout.gpu_memory_share"
            )
    if isinstance(config, Online | Offline) and sharding.stage == 3:
        classes = {name for shape in shapes.values() for name in shape.moe_classes}
        if classes:
            found.append(f"ZeRO-3 must gather these blocks whole, as leaf modules: {', '.join(sorted(classes))}")
    return found


# ----------------------------------------------------------------------------------------------------------------------------- time


def _flops(device: Device, dtype: str) -> float:
    peak = device.bf16_flops if dtype == "bfloat16" else device.fp32_flops
    return peak if device.is_cpu else TRAINING_EFFICIENCY * peak


def _pass(shape: ModelShape, dtype: str, tokens: float, context: float, device: Device, *, passes: int) -> float:
    """Seconds of `passes` forward passes' operations: 2 for each active weight and token, 4 a for each token and half its context.

    A backward pass is two forward passes, gradient checkpointing one more.
    """
    operations = 2.0 * shape.product_parameters * tokens
    operations += 4.0 * shape.attention_width * shape.num_layers * tokens * context / 2
    return passes * operations / _flops(device, dtype)


def _online_seconds(
    config: Online, shapes: Mapping[str, ModelShape], machine: Machine, work: OnlineWork
) -> dict[str, float]:
    """Rollout, scoring, training and sync of a rollout batch."""
    policy, device, rollout = shapes["policy"], machine.device, config.rollout
    context = work.prompt + work.completion
    engine_bytes = WIDTH[rollout.dtype] * policy.parameters
    per_sequence = context * kv_bytes_per_token(policy, rollout.dtype)
    if rollout.engine == "transformers":
        room = float(ENGINE_SEQUENCES)
    elif device.is_cpu:
        room = rollout.kv_cache_gb * GIB / per_sequence
    else:
        room = (rollout.gpu_memory_share * device.memory - engine_bytes) / per_sequence
    sequences = work.sequences
    if rollout.server is not None:
        copies = (len(rollout.server.urls) or rollout.server.replicas) * rollout.server.data_parallel
        sequences = math.ceil(sequences * machine.count / copies)
    together = max(1, min(sequences, int(room)))
    read = (engine_bytes + together * per_sequence / 2) / (SAMPLING_EFFICIENCY * device.bandwidth)
    compute = _pass(policy, rollout.dtype, together, context, device, passes=1)
    sampling = math.ceil(sequences / together) * work.completion * max(read, compute)
    sampling += _pass(
        policy, rollout.dtype, sequences // rollout.samples_per_prompt * work.prompt, work.prompt, device, passes=1
    )
    scoring = 0.0
    everything = work.sequences * context
    for kind in {reward.kind for reward in config.rewards if isinstance(reward, ModelReward)}:
        scoring += _pass(shapes[kind], "float32", everything, context, device, passes=1)
    if config.reference is not None:
        shape = shapes.get("reference", policy)
        scoring += _pass(shape, config.reference.dtype, work.tokens, context, device, passes=1)
    passes = config.training.passes_per_batch
    training = passes * _pass(
        policy,
        config.policy.dtype,
        work.tokens,
        context,
        device,
        passes=4 if config.policy.gradient_checkpointing else 3,
    )
    if config.training.minibatches_per_batch > 1:  # old log-probabilities of all mini-batches but the first
        training += _pass(policy, config.policy.dtype, work.tokens, context, device, passes=1)
    if isinstance(config, PPO):
        critic = shapes["critic"]
        times = passes * (4 if config.critic.gradient_checkpointing else 3)
        training += _pass(critic, config.critic.dtype, work.tokens, context, device, passes=times)
        scoring += _pass(critic, config.critic.dtype, work.tokens, context, device, passes=1)
    training += work.steps * _reduction(policy, WIDTH[config.policy.dtype], machine)
    sync = WIDTH[config.policy.dtype] * policy.parameters / device.bandwidth
    if config.training.max_staleness > 0:  # what training does not hide
        sampling = max(0.0, sampling - training)
    return {"rollout": sampling, "scoring": scoring, "training": training, "sync": sync}


def _reduction(shape: ModelShape, width: int, machine: Machine) -> float:
    """Seconds of a ring all-reduce of the gradients, 2 (N - 1) / N of their bytes over each link."""
    return 2 * (machine.count - 1) / machine.count * width * shape.parameters / machine.device.link


def _offline_seconds(config: Offline, shape: ModelShape, machine: Machine) -> dict[str, float]:
    """An optimizer step."""
    rows = config.training.sequences_per_step // machine.count * _sequences_per_row(config)
    passes = (4 if config.model.gradient_checkpointing else 3) + isinstance(config, DPO)  # the reference's
    device, tokens = machine.device, rows * config.max_tokens
    return {
        "training": _pass(shape, config.model.dtype, tokens, config.max_tokens, device, passes=passes)
        + _reduction(shape, WIDTH[config.model.dtype], machine)
    }
