"""Supervised fine-tuning on scratchpads, with TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from rlhf.config import SFT
from rlhf.lora import adapt, save_model
from rlhf.models import load_causal_lm
from rlhf.routing import find_routers
from rlhf.run import say
from rlhf.trainers.arguments import LogLines, run_trainer, trainer_arguments

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation as token ids; only the response is trained on."""

    prompt_ids: list[int]
    response_ids: list[int]
    """The stop token included."""

    @property
    def input_ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * len(self.prompt_ids) + self.response_ids


@dataclass(frozen=True, slots=True)
class PackingCollator:
    """Whole conversations into as few rows as fit, each row as wide as the longest conversation of the batch.

    A conversation is never cut, and attends only to itself: without an attention mask transformers builds a block-diagonal one from
    position ids that start again at 0. The set of conversations in an optimizer step, and so its gradient, is that of padding.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        packed: list[list[dict[str, list[int]]]] = []
        room: list[int] = []
        for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
            length = len(row["input_ids"])
            fitting = [i for i, free in enumerate(room) if free >= length]
            if not fitting:
                packed.append([])
                room.append(width)
                fitting = [len(room) - 1]
            packed[fitting[0]].append(row)
            room[fitting[0]] -= length
        input_ids, labels, position_ids = [], [], []
        for group, free in zip(packed, room, strict=True):
            input_ids.append([t for row in group for t in row["input_ids"]] + [self.pad_token_id] * free)
            labels.append([t for row in group for t in row["labels"]] + [IGNORED] * free)
            position_ids.append([i for row in group for i in range(len(row["input_ids"]))] + list(range(free)))
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        return {key: torch.tensor(value) for key, value in batch.items()}


def require_trained_stop_token(batch: dict[str, torch.Tensor], *, stop_token_id: int, pad_token_id: int) -> float:
    """Check a packed batch as the trainer will really see it; returns the share of its tokens that is trained on.

    Raises:
        ValueError: when nothing or everything is trained on, or a conversation's stop token is not.
    """
    real = batch["input_ids"] != pad_token_id
    trained = batch["labels"] != IGNORED
    share = (trained & real).sum().item() / real.sum().item()
    if not 0 < share < 1:
        raise ValueError(
            f"{share:.0%} of the tokens are trained on; the loss must cover the responses and nothing else: check the chat template and the label mask"
        )
    if (trained & ~real).any():
        raise ValueError("padding is trained on; the tokenizer's pad token must be masked in the labels")
    follows = torch.cat([batch["position_ids"][:, 1:], torch.zeros_like(batch["position_ids"][:, :1])], 1)
    last_of_each = real & (follows == 0)  # the next token starts another conversation, padding or nothing
    missed = last_of_each & (batch["labels"] != stop_token_id)
    if missed.any():
        row, column = (int(i) for i in missed.nonzero()[0])
        raise ValueError(
            f"a conversation of the first batch does not train its stop token {stop_token_id} (its last label is {int(batch['labels'][row, column])}); the model would never "
            "learn to end: check that the pad token differs from the stop token and that responses are not cut by max_tokens"
        )
    return share


def train(
    config: SFT, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, pad_token_id: int
) -> dict[str, float]:
    """Train and save model and tokenizer in `output_dir`; returns the final figures."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from rlhf.trainers.balanced_sft import BalancedSFTTrainer

    folder, coefficient = Path(config.output_dir), config.model.router_aux_coefficient
    model = load_causal_lm(config.model.path, revision=config.model.revision, dtype=config.model.dtype)
    routers = find_routers(model, needed_by="model.router_aux_coefficient" if coefficient > 0 else None)
    set_seed(config.seed)  # adapters are drawn, the same on every rank
    adapt(model, config.model)
    model.config.use_cache = False  # with a cache, transformers would not look for packed conversations
    declared = getattr(model.config, "router_aux_loss_coef", None)
    parts: dict[str, Any] = dict(
        model=model,
        data_collator=PackingCollator(pad_token_id),
        # TRL would add its own auxiliary loss, by the model's config
        args=SFTConfig(**trainer_arguments(config), max_length=None, packing=False, router_aux_loss_coef=0.0),
        train_dataset=Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in examples]),
        processing_class=tokenizer,
        callbacks=[LogLines(folder / "metrics.jsonl")],
    )
    if routers is None:
        trainer = SFTTrainer(**parts)
    else:
        trainer = BalancedSFTTrainer(**parts, routers=routers, coefficient=coefficient, ignored=IGNORED)
    first = next(iter(trainer.get_train_dataloader()))
    share = require_trained_stop_token(first, stop_token_id=examples[0].response_ids[-1], pad_token_id=pad_token_id)
    say(f"{share:.0%} of the tokens are trained on, stop token included")
    run_trainer(trainer, config)
    # Not the trainer's save_model, which adds a pickle of the training arguments.
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    trained.config.use_cache = True
    if declared is not None:
        trained.config.router_aux_loss_coef = declared
    save_model(trained, folder, write=trainer.accelerator.is_main_process)
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(folder)
    return {"loss": trainer.state.log_history[-1].get("train_loss", float("nan")), "trained_share": share}
