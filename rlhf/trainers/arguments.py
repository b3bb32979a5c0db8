"""A recipe's training block in the words of transformers' Trainer, for the stages that stand on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from rlhf.config import SFT, RewardModel
from rlhf.distributed import require_all_ranks
from rlhf.metrics import append_jsonl
from rlhf.run import num_ranks, say

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def trainer_arguments(config: SFT | RewardModel) -> dict[str, Any]:
    """Keyword arguments that SFTConfig and RewardConfig share."""
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
        "save_total_limit": 1,
        "bf16": False,  # accelerate's configuration decides the precision of the computation
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": [],
    }


def last_checkpoint(output_dir: str) -> str | None:
    """Newest checkpoint of an interrupted stage that transformers wrote whole."""
    found = [p for p in (Path(output_dir) / "trainer").glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def run_trainer(trainer: Any, config: SFT | RewardModel) -> None:
    """Train from the newest checkpoint, if there is one, on all the ranks that were launched."""
    require_all_ranks(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir))


class LogLines(TrainerCallback):
    """Prints and stores what the trainer logs, one line at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **{k: float(v) for k, v in logs.items()}}
        append_jsonl(self._path, row)
        accuracy = next((f"  accuracy {row[k]:.3f}" for k in ("mean_token_accuracy", "accuracy") if k in row), "")
        say(
            f"step {state.global_step:>5}/{state.max_steps}  loss {row['loss']:.4f}{accuracy}  grad_norm {row['grad_norm']:.2f}"
        )
