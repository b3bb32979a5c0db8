"""Loading and building models. Weights are safetensors only, and no code that comes with them is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rlhf.config import Architecture, Dtype

# A bar for loading 50 tensors is noise among a stage's own lines; what transformers would report of missing weights is an error here.
disable_progress_bar()
set_verbosity_error()


def check_model_path(path: str, key: str) -> None:
    """Raise before anything is loaded when `path` looks like a local folder and holds no model.

    Raises:
        ValueError: naming the recipe's key and the stage that makes the folder.
    """
    local = Path(path)
    if local.exists():
        if not (local / "config.json").is_file():
            raise ValueError(f"{key} is {path}, which has no config.json; point it at a saved model")
        if not list(local.glob("*.safetensors")):
            raise ValueError(
                f"{key} is {path}, which has no .safetensors weights; other formats are not loaded because unpickling can run code"
            )
    elif path.startswith(("/", ".", "outputs/")) or path.count("/") != 1:
        raise ValueError(
            f"{key} is {path}, which does not exist; run the stage that writes it first or correct the path"
        )


def load_causal_lm(path: str, *, revision: str | None, dtype: Dtype) -> PreTrainedModel:
    """A causal language model with every weight read from its files.

    Raises:
        ValueError: when the files lack a weight, which transformers would initialise at random.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        revision=revision,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"{path} lacks {', '.join(sorted(info['missing_keys'])[:5])}; weights initialised at random would be trained or sampled from: save the whole model there"
        )
    return model


def ready(model: Any, *, gradient_checkpointing: bool) -> Any:
    """A model as it is trained here: without dropout, and in training mode only where gradient checkpointing needs that.

    Dropout would make the trainer's policy another one than the sampler's.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(gradient_checkpointing)


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ValueError: when it has no chat template, or pads with the token that ends a turn: masking one would mask the other.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {path} has no chat template; use an instruct model or add chat_template.jinja beside it"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"the tokenizer of {path} pads with {tokenizer.pad_token!r}, and ends a turn with {tokenizer.eos_token!r}; give it a pad token of its own"
        )
    return tokenizer


def qwen3_config(architecture: Architecture, **more: Any) -> Qwen3Config | Qwen3MoeConfig:
    """The config of a Qwen3, or of a Qwen3-MoE, with tied embeddings."""
    shape: dict[str, Any] = dict(
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        initializer_range=architecture.initializer_range,
        tie_word_embeddings=True,
        **more,
    )
    if not architecture.num_experts:
        return Qwen3Config(**shape, intermediate_size=architecture.intermediate_size)
    return Qwen3MoeConfig(
        **shape,
        num_experts=architecture.num_experts,
        num_experts_per_tok=architecture.experts_per_token,
        moe_intermediate_size=architecture.expert_intermediate_size,
        intermediate_size=architecture.expert_intermediate_size,  # of plain layers, of which there are none
        norm_topk_prob=True,
    )


def build_qwen3(architecture: Architecture, tokenizer: Any, *, seed: int) -> PreTrainedModel:
    """A randomly initialised Qwen3 or Qwen3-MoE, sized for the tokenizer."""
    torch.manual_seed(seed)
    config = qwen3_config(
        architecture,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config) if isinstance(config, Qwen3Config) else Qwen3MoeForCausalLM(config)
