"""Bytes that a model needs on a device when it is trained, scored with or sampled from. Pure functions; imports no torch.

Letters: P parameters of a model, A those that are trained (P, or LoRA's adapters), N devices, L layers, h hidden size, a = heads x head
size, c = key-value heads x head size, i width of the feed-forward block, V vocabulary, T tokens of a micro-batch, S of them scored, w
bytes of a weight.

Weights, gradients and optimizer (rlhf/learner.py; sharding as in https://arxiv.org/abs/1910.02054, section 5, and DeepSpeed's code):

    part             one device or DDP     ZeRO-1           ZeRO-2          ZeRO-3
    weights          w P                   w P              w P             w P / N
    gradients        w A  (DDP: twice)     w A              w A / N         w A / N
    optimizer        2 w A                 (4 + 8) A / N    (4 + 8) A / N   (4 + 8) A / N

AdamW keeps two moments in the weights' precision; DeepSpeed besides them a master copy, all in float32. Adapters are float32.
A weight of a linear layer that is quantised (rlhf/quantization.py) takes NF4_WIDTH bytes in the place of w.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import Critic, Model
from rlhf.shapes import ModelShape

HEAD_ROWS = 512
"""Rows of logits that rlhf/logprobs.py holds at a time."""
TOKENS_PER_STEP = 32
"""Of a solution that a process model is trained on: assumed."""
TRL_ROWS, TRL_COLUMNS = 4096, 32768
"""The buffer of logits in TRL's loss."""
WIDTH = {"float32": 4, "bfloat16": 2}
NF4_WIDTH = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes: 4 bits, an 8-bit scale for 64 weights, a 32-bit scale for 256 of those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How DeepSpeed spreads a model that is trained over the devices; stage 0 is DDP, or one device."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    reduce_bucket: int = 500_000_000
    """Numbers of a buffer that gradients are reduced in, DeepSpeed's default; allocated whole."""

    mixed_bf16: bool = False
    """Whether DeepSpeed computes in bfloat16 with its own float32 copy of the weights."""

    @property
    def name(self) -> str:
        if self.stage == 0:
            return "no sharding"
        offloaded = [
            what for what, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_weights)) if on
        ]
        return f"ZeRO-{self.stage}" + (f", {' and '.join(offloaded)} on the host" if offloaded else "")


def read_sharding(path: str | Path) -> tuple[Sharding, int]:
    """What an accelerate configuration file says of DeepSpeed, and its number of processes.

    Raises:
        ValueError: when the file is missing or is no such configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--accelerate names {path}, which does not exist; see recipes/accelerate/")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError(f"{path} is no accelerate configuration: it has no distributed_type; see recipes/accelerate/")
    ranks = int(settings.get("num_processes", 1))
    if settings["distributed_type"] != "DEEPSPEED":
        return Sharding(), ranks
    deepspeed = settings.get("deepspeed_config") or {}
    zero: dict[str, Any] = {}
    if "deepspeed_config_file" in deepspeed:
        file = Path(deepspeed["deepspeed_config_file"])
        if not file.is_file():
            raise ValueError(f"{path} names the DeepSpeed file {file}, which does not exist; correct the path")
        whole = json.loads(file.read_text(encoding="utf-8"))
        zero = whole.get("zero_optimization", {})
        mixed = bool(whole.get("bf16", {}).get("enabled"))
        deepspeed = {
            "zero_stage": zero.get("stage", 0),
            "offload_optimizer_device": zero.get("offload_optimizer", {}).get("device", "none"),
            "offload_param_device": zero.get("offload_param", {}).get("device", "none"),
        }
    else:
        mixed = settings.get("mixed_precision") == "bf16"
    bucket = zero.get("reduce_bucket_size")
    sharding = Sharding(
        stage=int(deepspeed.get("zero_stage", 2)),
        offload_optimizer=deepspeed.get("offload_optimizer_device", "none") not in ("none", None),
        offload_weights=deepspeed.get("offload_param_device", "none") not in ("none", None),
        mixed_bf16=mixed,
        **({"reduce_bucket": int(bucket)} if isinstance(bucket, int | float) else {}),
    )
    return sharding, ranks


# ------------------------------------------------------------------------------------------------------------- what is there always


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model with an optimizer, and how it is trained."""

    shape: ModelShape
    dtype: str
    checkpointing: bool
    lora: Any | None
    has_head: bool
    """Language model head over the vocabulary, or none: value and reward models."""
    quantised: bool = False
    """Whether the linear layers of its blocks are NF4."""

    @property
    def parameters(self) -> int:
        """P"""
        head = 0 if self.has_head or self.shape.tied else self.shape.vocab_size * self.shape.hidden_size
        return self.shape.parameters - head + (0 if self.has_head else self.shape.hidden_size)

    @property
    def trained(self) -> int:
        """A"""
        if self.lora is None:
            return self.parameters
        adapters = self.shape.adapter_parameters(self.lora.rank, self.lora.target_modules)
        return adapters + (0 if self.has_head else self.shape.hidden_size)

    @property
    def rank(self) -> int:
        return self.lora.rank if self.lora is not None else 0

    @property
    def adapted(self) -> list[tuple[str, int, int]]:
        """(last part of the name, inputs, how many) of the linear layers with adapters."""
        if self.lora is None:
            return []
        return [
            (name, inputs, count)
            for name, inputs, _, count in self.shape.linear
            if self.lora.target_modules is None or name in self.lora.target_modules
        ]

    @property
    def width(self) -> int:
        return WIDTH[self.dtype]

    @property
    def in_four_bits(self) -> int:
        """Weights of the linear layers of its blocks, where those are quantised."""
        return sum(i * o * count for _, i, o, count in self.shape.linear) if self.quantised else 0

    @property
    def dequantised(self) -> int:
        """Bytes of the largest quantised weight while a layer is computed: it is whole, in the model's precision."""
        return max((self.width * i * o for _, i, o, _ in self.shape.linear), default=0) if self.quantised else 0

    @property
    def trained_width(self) -> int:
        """Bytes of a trained number: adapters are float32."""
        return self.width if self.lora is None else 4


def trained_of(model: Model | Critic, shape: ModelShape, sharding: Sharding, *, has_head: bool) -> Trained:
    """A recipe's block and the shape of its weights."""
    return Trained(
        shape=shape,
        dtype="bfloat16" if sharding.mixed_bf16 else model.dtype,
        checkpointing=model.gradient_checkpointing,
        lora=model.lora,
        has_head=has_head,
        quantised=isinstance(model, Model) and model.quantization is not None,
    )


def weights(model: Trained, sharding: Sharding, devices: int) -> float:
    """w P and, with LoRA, 4 A for the adapters; NF4_WIDTH in the place of w for what is quantised."""
    size = model.width * (model.parameters - model.in_four_bits) + NF4_WIDTH * model.in_four_bits
    size += 4 * model.trained if model.lora is not None else 0
    return size / devices if sharding.stage == 3 else size


def gradients(model: Trained, sharding: Sharding, devices: int) -> float:
    """w A; from ZeRO-2 on a device keeps its share."""
    size = model.trained_width * model.trained
    return size / devices if sharding.stage >= 2 else size


def optimizer(model: Trained, sharding: Sharding, devices: int) -> float:
    """Two moments, and DeepSpeed's master copy, of each trained number."""
    if sharding.stage == 0:
        return 2 * model.trained_width * model.trained
    return 12 * model.trained / devices


def communication(model: Trained, sharding: Sharding, devices: int) -> float:
    """Buffers of the ranks: DDP's copy of the gradients; DeepSpeed's bucket, and under ZeRO-3 the blocks that are gathered at a time.

    ZeRO-3 holds the block it computes and prefetches the next one; the embedding counts as a block.
    """
    if devices == 1 and sharding.stage == 0:
        return 0.0
    if sharding.stage == 0:
        return model.trained_width * model.trained
    bucket = model.trained_width * min(sharding.reduce_bucket, max(model.trained, 1))
    if sharding.stage < 3:
        return bucket
    block = max(model.shape.layer_parameters, model.shape.vocab_size * model.shape.hidden_size)
    return 2 * bucket + model.width * (model.shape.layer_parameters + block)  # it overlaps, so it has two buckets


# ------------------------------------------------------------------------------------------------------- what a micro-batch needs


_FED_BY_NORM_1, _FED_BY_NORM_2 = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def saved_by_layer(model: Trained, *, repeated_heads: bool = False) -> float:
    """Bytes per token that autograd keeps of one layer, in the mean over layers, as transformers computes Llama, Qwen and Mixtral.

        norms        2 (n h + 4)               n = 12 in float32, 8 in bfloat16: input in float32, normalised input, output; its scale
        attention    w (2 a + 2 c) + 4 heads   rotated q and k, v, the result; log-sum-exps
        QK-norm      (n - w) (a + c) + 4 each  inputs in float32 and normalised; the outputs are rotated and not kept
        feed-forward 4 w i                     gate, its activation, up, their product
        experts      k w (2 h + 4 e)           k of E: the gathered input, as above with width e, the result;
                     + 4 E + 36 k              probabilities, places, weights

    With LoRA a norm's weight and the experts are frozen, which frees normalised inputs, gathered inputs and experts' products; in
    float32 an adapter keeps what its layer was given, in bfloat16 a float32 copy of it for itself alone.
    """
    shape, w = model.shape, model.width
    h, a, c = shape.hidden_size, shape.attention_width, shape.kv_width
    k, e, s = shape.experts_per_token, shape.expert_size, shape.shared_expert_size
    full = model.lora is None
    targets = {name for name, *_ in model.adapted}
    copies = w == 2 and not full  # an adapter casts what it is given
    kept_1, kept_2 = (full or (not copies and not targets.isdisjoint(fed)) for fed in (_FED_BY_NORM_1, _FED_BY_NORM_2))
    product = full or (not copies and "down_proj" in targets)

    norms = 2 * (4 * h + 4) + w * h * (2 * full + kept_1 + kept_2)
    attention = w * (2 * a + 2 * (a if repeated_heads else c)) + 4 * shape.num_heads
    if shape.qk_norm:
        attention += (4 + w * full) * (a + c) + 4 * (shape.num_heads + shape.num_kv_heads)
    dense = w * (3 + product) * shape.intermediate_size
    routed = k * w * (h + 3 * e + (h + e) * full) + 4 * shape.num_experts + 36 * k
    shared = w * ((3 + product) * s + h) if s else 0
    share = shape.num_moe_layers / shape.num_layers
    per_input = 4 if copies else 0
    adapters = (
        sum((4 * model.rank + per_input * inputs) * count for _, inputs, count in model.adapted) / shape.num_layers
    )
    return norms + attention + (1 - share) * dense + share * (routed + shared) + adapters


def activations(model: Trained, tokens: float, *, repeated_heads: bool = False) -> float:
    """Bytes that a forward pass of T tokens leaves for the backward pass; s of `saved_by_layer`, n and w h of the last norm.

    T (L s + (n - w) h)     and the rotation, 2 w head size
    T (L w h + (n - w) h)   with gradient checkpointing: each layer's input; one layer at a time is in `backward_scratch`
    """
    shape, w = model.shape, model.width
    frozen_input = 4 * shape.hidden_size + 4 if model.lora is not None else 0  # the first norm's, of a frozen embedding
    last = (4 + (w if model.lora is None else 0)) * shape.hidden_size + 4 + 2 * w * shape.head_dim + 8
    if model.checkpointing:
        return tokens * (shape.num_layers * w * shape.hidden_size + last)
    layer = saved_by_layer(model, repeated_heads=repeated_heads)
    return tokens * (shape.num_layers * layer + last - frozen_input)


def backward_scratch(model: Trained, tokens: float, *, repeated_heads: bool = False) -> float:
    """Gradients of activations while one layer's feed-forward block is run backwards: w T (2 i + 2 h), its own activations with checkpointing."""
    shape = model.shape
    inner = max(
        shape.intermediate_size,
        shape.experts_per_token * shape.expert_size + shape.shared_expert_size if shape.num_moe_layers else 0,
    )
    size = tokens * model.width * (2 * inner + 2 * shape.hidden_size)
    if model.checkpointing:
        size += tokens * saved_by_layer(model, repeated_heads=repeated_heads)
    return size


def forward_scratch(shape: ModelShape, dtype: str, tokens: float) -> float:
    """The widest place of a forward pass without gradients: w T (3 i + 2 h), or of its attention w T (3 h + 2 a + 2 c)."""
    inner = max(
        shape.intermediate_size,
        shape.experts_per_token * shape.expert_size + shape.shared_expert_size if shape.num_moe_layers else 0,
    )
    mixed = shape.experts_per_token * shape.hidden_size if shape.num_moe_layers else 0
    block = 3 * inner + 2 * shape.hidden_size + mixed
    attention = 3 * shape.hidden_size + 2 * shape.attention_width + 2 * shape.kv_width
    return WIDTH[dtype] * tokens * max(block, attention)


@dataclass(frozen=True, slots=True)
class Head:
    """Bytes of a language model head's buffers."""

    forward: float
    """At most while it is computed."""
    backward: float
    """While its gradient is."""
    kept: float = 0.0
    """In between."""


def no_head(scored: float) -> Head:
    """Of a value or reward model."""
    return Head(0.0, 0.0)


def step_head(model: Trained, tokens: float, *, rows: int | None) -> Head:
    """What rlhf/trainers/process.py allocates of a language model's logits, P = min(tokens, rows * tokens / 32) places in its rows.

        forward   4 P V + w P V        in float32, and below that as the model gives them
        backward  twice as much        the gradients through each of the two tokens' columns

    A step every 32 tokens is assumed; the model computes a place in all rows where any row has a step. Without `rows`, every token is one.
    """
    places = tokens if rows is None else min(tokens, rows * tokens / TOKENS_PER_STEP)
    logits = (4 + (model.width if model.width < 4 else 0)) * places * model.shape.vocab_size
    return Head(logits, 2 * logits)


def head(model: Trained, scored: float) -> Head:
    """What rlhf/logprobs.py allocates for S scored tokens, r = min(512, S) rows at a time.

        forward   w S h + 2 x 4 r V + w S h + 4 V h       selected states; logits and probabilities; both gradients, known on policy
        backward  w S h + 2 (w S h + 4 V h)               the gradients again, times their factor

    In bfloat16 r V and V h numbers of 2 bytes more in products; a frozen head (LoRA) has no V h.
    """
    h, v, w = model.shape.hidden_size, model.shape.vocab_size, model.width
    rows = min(HEAD_ROWS, max(scored, 1))
    states = w * scored * h
    matrix = 4 * v * h if model.lora is None else 0
    narrow = w == 2
    forward = 2 * states + 8 * rows * v + matrix + (2 * rows * v + matrix / 2 if narrow else 0)
    backward = 3 * states + 2 * matrix + (matrix / 2 if narrow else 0)
    return Head(forward, backward, 2 * states + matrix)


def trl_head(model: Trained, scored: float, *, fused: bool) -> Head:
    """What TRL's loss allocates for S positions, r = min(4096, S) rows at a time; b = 32,768 columns, however many words there are.

    forward   w S h + w r b                            a kernel (`fused`, where Triton is) works in place
    backward  w S h + 4 S h + 4 V h + w r b
    without Triton (a CPU) 4 and 7 times 4 r min(b, V) more
    """
    h, v, w = model.shape.hidden_size, model.shape.vocab_size, model.width
    rows = min(TRL_ROWS, scored)
    buffer, piece = w * rows * TRL_COLUMNS, 0.0 if fused else 4.0 * rows * min(TRL_COLUMNS, v)
    matrix = 4 * v * h if model.lora is None else 0
    states = w * scored * h
    return Head(states + buffer + 4 * piece, states + 4 * scored * h + matrix + buffer + 7 * piece)
