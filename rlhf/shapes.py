"""What a model is made of, from its config.json alone: it is built on torch's meta device, which allocates nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes that memory and time depend on. Letters as in rlhf/plan.py."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int = 0
    """Of the plain feed-forward blocks; 0 where every block is a mixture."""
    num_moe_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    """Width of one expert."""
    shared_expert_size: int = 0
    """Width of the expert that every token goes through."""
    qk_norm: bool = False
    tied: bool = False
    """Whether the head is the embedding."""
    parameters: int
    """All, tied ones once."""
    linear: tuple[tuple[str, int, int, int], ...] = ()
    """(last part of the name, inputs, outputs, how many) of the linear layers of the blocks: where adapters go."""
    moe_classes: tuple[str, ...] = ()
    """Classes of the blocks that route tokens to experts: the leaf modules of ZeRO-3."""

    @property
    def attention_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: of a mixture's experts only the chosen ones."""
        idle = self.num_experts - self.experts_per_token
        return self.parameters - self.num_moe_layers * idle * 3 * self.hidden_size * self.expert_size

    @property
    def product_parameters(self) -> int:
        """Active weights that take part in a matrix product: all but the embedding's look-up."""
        return self.active_parameters - (0 if self.tied else self.vocab_size * self.hidden_size)

    @property
    def layer_parameters(self) -> int:
        """Of one block, in the mean, all experts included."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return (self.parameters - embeddings) // self.num_layers

    def adapter_parameters(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """LoRA's A [rank, I] and B [O, rank] on each chosen linear layer (rlhf/lora.py)."""
        return sum(
            rank * (inputs + outputs) * count
            for name, inputs, outputs, count in self.linear
            if targets is None or name in targets
        )


def find_config(path: str | Path) -> Path | None:
    """config.json of a model's folder, or the file itself; None where there is neither."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    return file if file.is_file() else None


def read_shape(file: str | Path) -> ModelShape:
    """The shape of a causal language model with this config.json. Nothing is downloaded and no code of the model is run.

    Raises:
        ValueError: when it is no config of a causal language model that transformers knows.
    """
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no config.json of a model ({error}); name the file beside its weights") from None
    return shape_of(raw, str(file))


def shape_of(raw: dict[str, Any], origin: str = "the config") -> ModelShape:
    """`read_shape` of a decoded config.json."""
    model = meta_model(raw, origin)
    config = model.config.get_text_config()
    blocks = moe_blocks(model)
    experts = sum(1 for _ in blocks) or 0
    plain = config.num_hidden_layers - experts
    routed = blocks[0][1] if blocks else None
    heads = config.num_attention_heads
    return ModelShape(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        intermediate_size=config.intermediate_size if plain else 0,
        num_moe_layers=experts,
        num_experts=_first(config, "num_experts", "num_local_experts", "n_routed_experts") if routed is not None else 0,
        experts_per_token=_first(config, "num_experts_per_tok") if routed is not None else 0,
        expert_size=_first(config, "moe_intermediate_size", "intermediate_size") if routed is not None else 0,
        shared_expert_size=_first(config, "shared_expert_intermediate_size", default=0) if routed is not None else 0,
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        tied=bool(config.tie_word_embeddings),
        parameters=sum(p.numel() for p in model.parameters()),
        linear=_linear(model),
        moe_classes=tuple(sorted({type(block).__name__ for _, block in blocks})),
    )


def meta_model(raw: dict[str, Any], origin: str) -> Any:
    """The model of a decoded config.json on the meta device: every parameter has its shape and no memory.

    Raises:
        ValueError: when transformers knows no causal language model of this type.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = raw.get("model_type")
    try:
        config = AutoConfig.for_model(**raw) if kind else None
        if config is None:
            raise ValueError("it has no model_type")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{origin} describes no causal language model known to transformers: {str(error).splitlines()[0]:.200}"
        ) from None


def moe_blocks(model: Any) -> list[tuple[str, Any]]:
    """Name and module of each mixture-of-experts block: a module with a child `experts`, whatever its class."""
    return [(name, module) for name, module in model.named_modules() if "experts" in dict(module.named_children())]


def _linear(model: Any) -> tuple[tuple[str, int, int, int], ...]:
    from torch import nn

    head = model.get_output_embeddings()
    counted = Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    return tuple((*key, count) for key, count in sorted(counted.items()))


def _first(config: Any, *names: str, default: int | None = None) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    if default is None:
        raise ValueError(f"a {config.model_type} config has none of {', '.join(names)}")
    return default
