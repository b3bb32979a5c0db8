"""DPO and its relatives with TRL's DPOTrainer, on token ids that nothing cuts or renders again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from rlhf.config import DPO
from rlhf.distributed import gather
from rlhf.models import load_causal_lm
from rlhf.run import say
from rlhf.trainers.arguments import LogLines, run_trainer, trainer_arguments
from rlhf.trainers.preference import PairExample, last_figures, load_policy, save_policy

FIGURES = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)


def loss_arguments(config: DPO) -> dict[str, Any]:
    """The recipe's loss in TRL's words.

    cDPO (https://arxiv.org/abs/2305.18290, note of E. Mitchell), which TRL 1.16 no longer has, is a sum of two that it has. With ε the share of wrong labels,
    s = -log σ(h) and f = -log σ(-h):

        robust = ((1 - ε) s - ε f) / (1 - 2 ε)          (1 - ε) s + ε f = 2 (1 - ε) sigmoid - (1 - 2 ε) robust
    """
    doubt = config.wrong_labels
    if config.loss == "conservative":
        weights = [2 * (1 - doubt), -(1 - 2 * doubt)]
        return {"loss_type": ["sigmoid", "robust"], "loss_weights": weights, "label_smoothing": doubt}
    if config.loss == "robust":
        return {"loss_type": ["robust"], "label_smoothing": doubt}
    return {"loss_type": [{"length_normalised": "sigmoid_norm"}.get(config.loss, config.loss)]}


class TokenPairTrainer(DPOTrainer):
    """Takes pairs that are token ids already, and weighs every pair of an optimizer step the same.

    TRL takes the mean over each micro-batch and the mean of those, so that a pair in a smaller one, as at the end of an epoch, counts more.
    """

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        here = sum(len(batch["input_ids"]) // 2 for batch in batches)
        self._pairs = sum(gather(self.accelerator, [here]))
        return batches, None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs
        mean: Any = super().compute_loss(model, inputs)
        # The Trainer divides by the number of micro-batches, and ranks average their gradients.
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return mean * (len(inputs["input_ids"]) // 2 * parts / self._pairs)


def build_trainer(config: DPO, tokenizer: PreTrainedTokenizerBase, examples: Sequence[PairExample]) -> TokenPairTrainer:
    """The policy with its reference; with `precomputed`, the reference's log-probabilities are computed here."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for every batch of the reference's is noise among the lines
    precomputed = config.reference == "precomputed"
    model, reference = load_policy(config), None
    if precomputed:
        say(f"the reference's log-probabilities of {len(examples):,} pairs are computed first")
    else:
        reference = load_causal_lm(config.model.path, revision=config.model.revision, dtype=config.model.dtype)
    args = DPOConfig(
        **trainer_arguments(config),
        **loss_arguments(config),
        beta=config.beta,
        max_length=None,
        precompute_ref_log_probs=precomputed,
        router_aux_loss_coef=0.0,  # TRL would add the loss of the model's config, micro-batch by micro-batch
    )
    # TRL's main process writes the reference's log-probabilities beside the pairs, and every rank reads them there.
    folder = Path(config.output_dir) / "trainer" / "pairs"
    with args.main_process_first(local=False):
        if args.process_index == 0:
            Dataset.from_list([asdict(example) for example in examples]).save_to_disk(folder)
        pairs = Dataset.load_from_disk(folder)
    return TokenPairTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=[LogLines(Path(config.output_dir) / "metrics.jsonl")],
    )


def train_dpo(config: DPO, tokenizer: PreTrainedTokenizerBase, examples: Sequence[PairExample]) -> dict[str, float]:
    """Train and save model and tokenizer in `output_dir`; returns the last figures of the training pairs."""
    trainer = build_trainer(config, tokenizer, examples)
    run_trainer(trainer, config)
    save_policy(trainer, config, tokenizer)
    return last_figures(trainer, *FIGURES)
