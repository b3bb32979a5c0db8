"""Supervised fine-tuning on scratchpads, with TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback

from rlhf.config import SFT
from rlhf.models import load_causal_lm
from rlhf.run import say
from rlhf.trainers.arguments import LogLines, last_checkpoint, trainer_arguments

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


def require_trained_stop_token(batch: dict[str, torch.Tensor], stop_token_id: int) -> float:
    """Check a batch as the trainer will really see it; returns the share of its tokens that is trained on.

    Raises:
        ValueError: when nothing or everything is trained on, or a sequence's stop token is not.
    """
    labels, real = batch["labels"], batch["attention_mask"].bool()
    trained = labels != IGNORED
    share = (trained & real).sum().item() / real.sum().item()
    if not 0 < share < 1:
        raise ValueError(
            f"{share:.0%} of the tokens are trained on; the loss must cover the responses and nothing else: check the chat template and the label mask"
        )
    if (trained & ~real).any():
        raise ValueError("padding is trained on; the tokenizer's pad token must be masked in the labels")
    for row in range(labels.shape[0]):
        last = int(real[row].nonzero()[-1])
        if labels[row, last] != stop_token_id:
            raise ValueError(
                f"sequence {row} of the first batch does not train its stop token {stop_token_id} (last label {int(labels[row, last])}); the model would never "
                "learn to end: check that the pad token differs from the stop token and that responses are not cut by max_tokens"
            )
    return share


def train(config: SFT, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> dict[str, float]:
    """Train and save model and tokenizer in `output_dir`; returns the final figures."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder = Path(config.output_dir)
    trainer = SFTTrainer(
        model=load_causal_lm(config.model.path, revision=config.model.revision, dtype=config.model.dtype),
        args=SFTConfig(**trainer_arguments(config), max_length=None, packing=False),
        train_dataset=Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in examples]),
        processing_class=tokenizer,
        callbacks=[LogLines(folder / "metrics.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    first = next(iter(trainer.get_train_dataloader()))
    share = require_trained_stop_token(first, examples[0].response_ids[-1])
    say(f"{share:.0%} of the tokens are trained on, stop token included")
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))
    if trainer.accelerator.is_main_process:
        # Not save_model, which adds a pickle of the training arguments.
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"loss": trainer.state.log_history[-1].get("train_loss", float("nan")), "trained_share": share}
