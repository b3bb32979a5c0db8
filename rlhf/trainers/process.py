"""Training on steps: a probability at the last token of each, with transformers' Trainer.

    z = w · h + b                      head `classification`: a new row on top of the hidden states h
    z = (W[+] - W[-]) · h              head `next_token`: the language model's own odds that it would write + and not -
    loss = mean over labelled steps of  -(p log σ(z) + (1 - p) log(1 - σ(z)))

p is 1 or 0 for hard labels, a probability for soft ones. Restricted to the two tokens, the second head is the softmax that Math-Shepherd trains
(https://arxiv.org/abs/2312.08935), without a marker that would have to be written into what the policy said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import Trainer

IGNORED = -100.0
"""Where no step ends, and where one ends that is not trained on. The Trainer counts the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExample:
    """A solution as token ids, and what is to be said of its steps."""

    input_ids: list[int]
    ends: list[int]
    """Index of the last token of each step that is trained on."""
    targets: list[float]
    """Probability that it is right."""

    def __post_init__(self) -> None:
        if len(self.ends) != len(self.targets) or not self.ends:
            raise ValueError(f"{len(self.ends)} steps are trained on and {len(self.targets)} have a target")
        # A boolean, or a -100 that means "no label", would become a probability without a word.
        if any(type(target) is not float or not 0 <= target <= 1 for target in self.targets):
            raise ValueError(f"targets must be probabilities in [0, 1], got {self.targets!r:.80}")


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """([B, T] token ids, [B, T] 1 on real tokens)"""
    input_ids = torch.full((len(sequences), max(map(len, sequences))), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for b, sequence in enumerate(sequences):
        input_ids[b, : len(sequence)] = torch.tensor(list(sequence))
        attention_mask[b, : len(sequence)] = 1
    return input_ids, attention_mask


@dataclass(frozen=True, slots=True)
class StepCollator:
    """Rows padded on the right; `labels` [B, T] are the targets at the ends of steps and IGNORED elsewhere."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        input_ids, attention_mask = pad_right([row["input_ids"] for row in rows], self.pad_token_id)
        labels = torch.full(input_ids.shape, IGNORED)
        for b, row in enumerate(rows):
            labels[b, row["ends"]] = torch.tensor(row["targets"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def step_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor, at: Tensor, *, tokens: tuple[int, int] | None
) -> Tensor:
    """[N] logits that a step is right, one for each place that `at` marks, rows laid end to end.

    Args:
        model: for token classification, or with `tokens` for causal language modelling.
        input_ids: [B, T]
        attention_mask: [B, T] 1 on real tokens.
        at: [B, T] True where a step ends.
        tokens: ids of the tokens that say right and wrong.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if tokens is None:
        return model(**inputs).logits[..., 0][at].float()
    columns = at.any(0).nonzero().flatten()  # of the others, the whole vocabulary's logits are not computed
    logits = model(**inputs, logits_to_keep=columns).logits.float()
    return (logits[..., tokens[0]] - logits[..., tokens[1]])[at[:, columns]]


class ProcessTrainer(Trainer):
    """Mean loss over the labelled steps of an optimizer step, however micro-batches and ranks cut it.

    Args:
        tokens: see `step_logits`.
    """

    def __init__(self, *args: Any, tokens: tuple[int, int] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # it then counts the labels of a whole optimizer step, over all ranks
        self._tokens = tokens

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs
        assert num_items_in_batch is not None
        labelled = inputs["labels"] != IGNORED
        logits = step_logits(model, inputs["input_ids"], inputs["attention_mask"], labelled, tokens=self._tokens)
        loss = binary_cross_entropy_with_logits(logits, inputs["labels"][labelled], reduction="sum")
        return loss / num_items_in_batch * self.accelerator.num_processes  # ranks average their gradients
