"""The value model of PPO: what is still to come, predicted before each token of a completion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rlhf.attention import NAME
from rlhf.config import Critic as CriticConfig
from rlhf.distributed import whole
from rlhf.lora import add_lora
from rlhf.scorer import run
from rlhf.types import Batch

HEAD = "score"


def load_critic(config: CriticConfig) -> Any:
    """The value model at `config.path`: a reward model keeps its head (InstructGPT), a language model gets one of zeros.

    Raises:
        ValueError: when the files lack a weight, other than the head of a language model.
    """
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        config.path,
        revision=config.revision,
        num_labels=1,
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, info = loaded
    missing = set(info["missing_keys"])
    if missing - {f"{HEAD}.weight"}:
        raise ValueError(
            f"critic.path {config.path} lacks {', '.join(sorted(missing)[:5])}; save the whole model there"
        )
    if missing:
        saved_as = getattr(model.config, "architectures", None) or []
        if any(name.endswith("SequenceClassification") for name in saved_as):
            raise ValueError(f"critic.path {config.path} is a reward model without its head; train or save it again")
        head = model.get_submodule(HEAD).weight
        with whole([head], write=True):
            nn.init.zeros_(head)
    if config.lora is not None:
        add_lora(model, config.lora, trained_in_full=(HEAD,))
    return model


class Critic(nn.Module):
    """Runs a value model over a `Batch`.

    Args:
        model: with a body and a linear head named `score`.
        share_prompts: whether batches are packed rows with a layout.
    """

    def __init__(self, model: Any, *, share_prompts: bool) -> None:
        super().__init__()
        self.model = model
        model.set_attn_implementation(NAME if share_prompts else "sdpa")

    def forward(self, batch: Batch) -> Tensor:
        """[N] values in float32: of the state before each trained token, at the position whose hidden state predicts it."""
        states = run(self.model.base_model, batch).last_hidden_state.flatten(0, 1)
        device = states.device
        return self.model.get_submodule(HEAD)(states.index_select(0, batch.scored.to(device))).squeeze(-1).float()
