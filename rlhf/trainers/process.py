"""Training on steps: a probability at the last token of each, with transformers' Trainer.

    head `classification`   z = w · h + b                        a new row on top of the hidden state h
    head `next_token`       z = (W[+] - W[-]) · h                the language model's own odds that it would write + and not -
    head `likelihood`       σ(z) = Π_{t in step} π(y_t | y_<t)   the probability that the language model would write this step itself

    loss = mean over labelled steps of  -(p log σ(z) + (1 - p) log(1 - σ(z)))

p is 1 or 0 for hard labels, a probability for soft ones. Restricted to the two tokens, the second head is the softmax that Math-Shepherd
trains (https://arxiv.org/abs/2312.08935), without a marker that would have to be written into what the policy said. The third one has no
parameters and makes of the loss supervised fine-tuning on right steps and unlikelihood training (https://arxiv.org/abs/1908.04319) on
wrong ones; it is for tasks in which a right step can be said in one way, and there knows most of what there is to know before it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import Trainer

IGNORED = -100.0
"""Where no step ends, and where one ends that is not trained on. The Trainer counts the others."""
SUREST = -1e-4
"""Largest log-probability of a step: of one that is as good as certain, the logarithm of the rest has no gradient worth following."""
Head = Literal["classification", "next_token", "likelihood"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExample:
    """A solution as token ids, and what is to be said of its steps."""

    input_ids: list[int]
    start: int
    """Index of the first step's first token, at least 1."""
    ends: list[int]
    """Index of the last token of each step that is trained on: of all steps up to the last such one."""
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
        starts = torch.tensor([row["start"] for row in rows])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "starts": starts, "labels": labels}


def step_logits(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    starts: Tensor,
    at: Tensor,
    *,
    head: Head,
    tokens: tuple[int, int] | None,
) -> Tensor:
    """[N] logits that a step is right, one for each place that `at` marks, rows laid end to end.

    Args:
        model: for token classification, or for the other heads for causal language modelling.
        input_ids: [B, T]
        attention_mask: [B, T] 1 on real tokens.
        starts: [B] index of the first step's first token.
        at: [B, T] True where a step ends.
        head: see above.
        tokens: ids of the tokens that say right and wrong, of the head `next_token`.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if head == "classification":
        return model(**inputs).logits[..., 0][at].float()
    if head == "likelihood":
        logits = model(**inputs).logits[:, :-1].float()
        logprobs = logits.gather(-1, input_ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        return _logit_of(_sums_of_steps(logprobs, starts, at))
    assert tokens is not None
    columns = at.any(0).nonzero().flatten()  # of the others, the whole vocabulary's logits are not computed
    logits = model(**inputs, logits_to_keep=columns).logits.float()
    return (logits[..., tokens[0]] - logits[..., tokens[1]])[at[:, columns]]


def _sums_of_steps(logprobs: Tensor, starts: Tensor, at: Tensor) -> Tensor:
    """[B, T - 1] log-probabilities of all tokens but the first -> [N] sums over the tokens of each step."""
    sums = torch.nn.functional.pad(logprobs.cumsum(1), (1, 0))
    rows, ends = at.nonzero(as_tuple=True)
    follows = torch.zeros_like(rows, dtype=torch.bool)
    follows[1:] = rows[1:] == rows[:-1]
    before = torch.where(follows, ends.roll(1), starts[rows] - 1)
    return sums[rows, ends] - sums[rows, before]


def _logit_of(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, which is held below `SUREST`."""
    bounded = logprob.clamp(max=SUREST)
    return bounded - torch.log(-torch.expm1(bounded))


class ProcessTrainer(Trainer):
    """Mean loss over the labelled steps of an optimizer step, however micro-batches and ranks cut it.

    Args:
        head: and `tokens`: see `step_logits`.
    """

    def __init__(self, *args: Any, head: Head, tokens: tuple[int, int] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # it then counts the labels of a whole optimizer step, over all ranks
        self._head: Head = head
        self._tokens = tokens

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs
        assert num_items_in_batch is not None
        labels = inputs.pop("labels")
        labelled = labels != IGNORED
        logits = step_logits(model, **inputs, at=labelled, head=self._head, tokens=self._tokens)
        loss = binary_cross_entropy_with_logits(logits, labels[labelled], reduction="sum")
        return loss / num_items_in_batch * self.accelerator.num_processes  # ranks average their gradients
