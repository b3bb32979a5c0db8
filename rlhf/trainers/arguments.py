"""A recipe's training block in the words of transformers' Trainer, for the stages that stand on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback

from rlhf.checkpoint import MANIFEST, checkpoints, newest_whole, seal, step_of
from rlhf.config import Offline
from rlhf.distributed import mark_leaf_modules, require_all_ranks, require_whole_experts, zero_stage
from rlhf.metrics import append_jsonl, truncate_jsonl
from rlhf.run import num_ranks, say

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def trainer_arguments(config: Offline) -> dict[str, Any]:
    """Keyword arguments that TrainingArguments, SFTConfig and RewardConfig share."""
    training, optimizer = config.training, config.optimizer
    return {
        "output_dir": str(Path(config.output_dir) / "trainer"),
        "seed": config.seed,
        "data_seed": config.seed,
        "max_steps": training.num_steps,
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.accumulation(num_ranks()),
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "learning_rate": optimizer.learning_rate,
        "warmup_steps": optimizer.warmup_steps,
        "lr_scheduler_type": SCHEDULES[optimizer.schedule],
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "max_grad_norm": optimizer.max_grad_norm,
        "logging_steps": training.log_every,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_every,
        "save_total_limit": 2,  # the newest is whole only once it is sealed
        "bf16": False,  # accelerate's configuration decides the precision of the computation
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": [],
    }


def last_checkpoint(trainer: Any, output_dir: Path) -> Path | None:
    """Newest checkpoint of an interrupted stage that is as it was written; one that a kill cut off is removed."""
    folder = output_dir / "trainer"
    if trainer.accelerator.is_main_process:
        for unsealed in (c for c in checkpoints(folder, "checkpoint") if not (c / MANIFEST).exists()):
            shutil.rmtree(unsealed)
    return newest_whole(trainer.accelerator, folder, "checkpoint")


def run_trainer(trainer: Any, config: Offline) -> None:
    """Train from the newest whole checkpoint, if there is one, on all the ranks that were launched."""
    require_all_ranks(trainer.accelerator)
    plugin = trainer.accelerator.state.deepspeed_plugin
    require_whole_experts(plugin.deepspeed_config if plugin is not None else {})
    if zero_stage(trainer.accelerator) == 3:
        mark_leaf_modules(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(SealCheckpoints())
    checkpoint = last_checkpoint(trainer, Path(config.output_dir))
    if checkpoint is not None:
        say(f"resuming after step {step_of(checkpoint)}")
    if trainer.accelerator.is_main_process:
        step = step_of(checkpoint) if checkpoint is not None else 0
        truncate_jsonl(Path(config.output_dir) / "metrics.jsonl", key="step", below=step + 1)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)


class SealCheckpoints(TrainerCallback):
    """Adds checksums to what transformers saved; it writes in place, and what has none was cut off by a kill."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class LogLines(TrainerCallback):
    """Prints and stores what the trainer logs, one line at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **{k: float(v) for k, v in logs.items()}}
        append_jsonl(self._path, row)
        accuracy = next(
            (
                f"  accuracy {row[k]:.3f}"
                for k in ("preference/accuracy", "rewards/accuracies", "mean_token_accuracy", "accuracy")
                if k in row
            ),
            "",
        )
        say(
            f"step {state.global_step:>5}/{state.max_steps}  loss {row['loss']:.4f}{accuracy}  grad_norm {row['grad_norm']:.2f}"
        )
