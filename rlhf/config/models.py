"""Weights: what is loaded, how it is trained, and what a model built from nothing looks like."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.sections import Dtype, PositiveInt, Section


class Weights(Section):
    """A saved model."""

    path: str
    """A folder, or a repository on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit when `path` is on the hub; pin a commit to be able to repeat the run."""


class Lora(Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685): W stays as it is and A, B of W + alpha / rank B A are trained, in float32.

    There is no dropout: it would make the trainer's policy another one than the sampler's.
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Last parts of the names of linear layers, such as q_proj; by default all linear layers of the blocks."""


class PolicyLora(Lora):
    sync: Literal["merged", "adapter"] = "merged"
    """What the rollout engine gets after each step: whole weights, adapters added, or the adapters alone, which it then applies itself."""


class Model(Weights):
    """Weights to start training from."""

    dtype: Dtype = "float32"
    """Precision of the weights in training."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: Lora | None = None
    """Train adapters instead of the weights."""
    quantization: Literal["nf4"] | None = None
    """Keep the linear layers under the adapters in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): an eighth or a quarter of their memory."""

    @model_validator(mode="after")
    def _four_bits_are_not_trained(self) -> Model:
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"quantization is {self.quantization} and lora is not set; weights of 4 bits cannot be trained themselves: add lora or remove quantization"
            )
        return self


def require_unsharded(model: Model, zero_stage: int) -> None:
    """Raise where 4-bit weights would be sharded.

    Raises:
        ValueError: under ZeRO-3, which gathers weights without the scales that 4 bits mean nothing without.
    """
    if model.quantization is not None and zero_stage == 3:
        raise ValueError(
            f"quantization is {model.quantization} and the accelerate configuration has zero_stage 3, which would cut packed weights off from their "
            "scales; take recipes/accelerate/ddp.yaml or zero_stage 1 or 2: the quantised base is small enough for every rank"
        )


class LanguageModel(Model):
    """Weights of a language model to start training from."""

    router_aux_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss that spreads the tokens evenly over the experts of a mixture (rlhf/balance.py). It counts the tokens of the whole
    optimizer step, so it costs a forward pass where a step has several micro-batches or ranks."""


class Policy(LanguageModel):
    """Weights to start from, which a rollout engine follows."""

    lora: PolicyLora | None = None  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    router_replay: bool = False
    """Send the tokens of a mixture to the experts they went to when they were sampled, with the weights of the policy's own routers
    (https://arxiv.org/abs/2510.11370); for engines whose routers choose otherwise than the trainer's."""

    @model_validator(mode="after")
    def _the_engine_must_have_the_same_base(self) -> Policy:
        if self.quantization is not None and self.lora is not None and self.lora.sync == "adapter":
            raise ValueError(
                f"quantization is {self.quantization} and lora.sync is adapter; the engine would put the adapter on the weights of path and not on the "
                "quantised ones that it is trained on: set lora.sync to merged"
            )
        return self


class Architecture(Section):
    """A Qwen3 built from numbers; with num_experts a Qwen3-MoE, each of whose layers is a mixture."""

    hidden_size: PositiveInt
    intermediate_size: Annotated[int, Field(ge=0)] = 0
    """Width of the feed-forward blocks; 0 for a mixture."""
    num_experts: Annotated[int, Field(ge=0)] = 0
    """Of each layer; 0 for a plain model, as are the next two."""
    experts_per_token: Annotated[int, Field(ge=0)] = 0
    expert_intermediate_size: Annotated[int, Field(ge=0)] = 0
    """Width of one expert."""
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    max_positions: PositiveInt
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; narrow models learn several times faster with more than the usual 0.02."""

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> Architecture:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}, not a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @model_validator(mode="after")
    def _plain_or_mixture(self) -> Architecture:
        keys = ("num_experts", "experts_per_token", "expert_intermediate_size")
        missing = [key for key in keys if not getattr(self, key)]
        if not self.intermediate_size and missing:
            raise ValueError(
                f"{', '.join(missing)} and intermediate_size are not set; set the latter for a plain model, the others for a mixture"
            )
        if self.intermediate_size and len(missing) < len(keys):
            raise ValueError(
                f"intermediate_size is {self.intermediate_size}, of a plain model, and {', '.join(k for k in keys if k not in missing)} of a mixture "
                "are set; remove one kind"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token}, more than num_experts {self.num_experts}")
        return self


class BuildModel(Section):
    """Trains a tokenizer on the demonstrations and initialises a model from numbers, for tasks that need no download."""

    stage: Literal["build_model"]
    output_dir: str
    seed: int = 0
    demonstrations: str
    """Record file whose text the tokenizer is trained on."""
    vocab_size: Annotated[int, Field(ge=300)]
    architecture: Architecture
    script: ClassVar[str] = "scripts/build_model.py"
