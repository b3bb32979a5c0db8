"""ORPO (https://arxiv.org/abs/2403.07691) on transformers' Trainer: chosen responses are learnt, rejected ones made less likely than them.

    loss = NLL over the chosen tokens / their number + odds_ratio_weight · sum over pairs of L_OR / number of pairs

Both numbers are those of the whole optimizer step, over micro-batches and ranks, so how a step is cut does not change it. The NLL is over
the response: a prompt is not the policy's to write (TRL's ORPOTrainer trains on it too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from rlhf.attention import NAME, can_share_prefix
from rlhf.config import ORPO, PreferenceTraining
from rlhf.distributed import gather
from rlhf.logprobs import chunked_logprobs, token_logprobs
from rlhf.lora import adapt, save_model
from rlhf.metrics import Metrics, reduce_metrics
from rlhf.models import load_causal_lm, ready
from rlhf.packing import pack_padded, pack_shared
from rlhf.preference import log_odds, mean_logprobs, odds_ratio_loss
from rlhf.run import say
from rlhf.scorer import has_plain_head
from rlhf.trainers.arguments import LogLines, run_trainer, trainer_arguments
from rlhf.types import Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class PairExample:
    """A preference pair as token ids; stop tokens included."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two conversations."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True, slots=True)
class PairCollator:
    """B pairs in one row, every prompt once with its responses after it; or one padded row a response.

    Sequences 0 to B - 1 are the chosen responses, B to 2 B - 1 the rejected ones.
    """

    pad_token_id: int
    share_prompts: bool

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        responses = [
            Rollout(
                prompt=Prompt(id=str(b), token_ids=tuple(row["prompt_ids"]), question="", reference=""),
                token_ids=tuple(row[side]),
                logprobs=(0.0,) * len(row[side]),
                finish_reason="stop",
                text="",
                policy_version=0,
            )
            for side in ("chosen_ids", "rejected_ids")
            for b, row in enumerate(rows)
        ]
        trained = torch.ones(len(responses), dtype=torch.bool)
        if self.share_prompts:
            batch = pack_shared(responses, range(len(responses)), trained)
        else:
            batch = pack_padded(responses, range(len(responses)), trained, pad_token_id=self.pad_token_id)
        who = {"layout": batch.layout} if self.share_prompts else {"attention_mask": batch.attention_mask}
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            **who,
            "scored": batch.scored,
            "targets": batch.targets,
            "sequences": torch.tensor(batch.rows)[batch.sequences],
            "num_pairs": len(rows),
        }


def response_logprobs(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[N] log-probabilities of the responses' tokens, in the order of `inputs["targets"]`.

    The head is called inside the model, where DDP and DeepSpeed look for its weight, on the positions of responses alone; where logits are
    hidden @ weight.T it returns log-probabilities, so that [N, V] never exists.

    Args:
        model: for causal language modelling, as it is or as accelerate wrapped it.
        inputs: of `PairCollator`.
    """
    rows, columns = inputs["scored"] // inputs["input_ids"].shape[1], inputs["scored"] % inputs["input_ids"].shape[1]
    columns, where = columns.unique(return_inverse=True)
    forward = {k: inputs[k] for k in ("input_ids", "position_ids", "attention_mask", "layout") if k in inputs}
    inner: Any = extract_model_from_parallel(model)
    head = inner.get_output_embeddings()

    def score(hidden: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        with torch.autocast(device, enabled=False):
            return chunked_logprobs(hidden[rows, where].to(dtype), head.weight, inputs["targets"], temperature=1.0)[0]

    if not has_plain_head(inner):
        logits = model(**forward, use_cache=False, logits_to_keep=columns).logits
        return token_logprobs(logits[rows, where], inputs["targets"], temperature=1.0)
    head.forward = score
    try:
        return model(**forward, use_cache=False, logits_to_keep=columns).logits
    finally:
        del head.forward  # what is left is the class's own


METRICS = {
    "preference/accuracy": "share of pairs whose chosen response has the higher mean log-probability",
    "preference/margin": "mean log-probability of a token of the chosen response less that of the rejected one, mean over pairs",
    "preference/margin_of_sums": "log-probability of the chosen response less that of the rejected one, mean over pairs: grows as the rejected one is longer",
    "preference/log_odds_ratio": "log odds of the chosen response less those of the rejected one, mean over pairs",
    "preference/odds_ratio_loss": "odds-ratio loss before its weight, mean over pairs",
    "preference/nll_chosen": "negative log-likelihood in nats of a token of the chosen responses",
    "preference/nll_rejected": "negative log-likelihood in nats of a token of the rejected responses",
}
"""What ORPO adds to metrics.jsonl, over the pairs since the line before, with the weights of their time."""


class StepSize(NamedTuple):
    """Of an optimizer step, over all micro-batches and ranks."""

    chosen_tokens: int
    pairs: int


def count_step(accelerator: Any, batches: Sequence[dict[str, Any]]) -> StepSize:
    """What the micro-batches of an optimizer step hold, summed over ranks."""
    tokens = sum(int((batch["sequences"] < batch["num_pairs"]).sum()) for batch in batches)
    counts = gather(accelerator, [(tokens, sum(batch["num_pairs"] for batch in batches))])
    return StepSize(*(sum(column) for column in zip(*counts, strict=True)))


class ORPOTrainer(Trainer):
    """The loss at the top of this file.

    Args:
        odds_ratio_weight: λ
    """

    loss_is_scaled_for_ga = True  # its parts carry the denominators of the whole step

    def __init__(self, *args: Any, odds_ratio_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weight = odds_ratio_weight
        self._size = StepSize(1, 1)
        self._metrics = Metrics()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._size = count_step(self.accelerator, batches)
        return batches, None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs
        logprobs, sequences, num_pairs = response_logprobs(model, inputs), inputs["sequences"], inputs["num_pairs"]
        chosen, rejected = mean_logprobs(logprobs, sequences, 2 * num_pairs).split(num_pairs)
        nll = -logprobs[sequences < num_pairs].sum()
        odds_ratio = odds_ratio_loss(chosen, rejected)
        self._record(logprobs.detach(), sequences, chosen.detach(), rejected.detach(), odds_ratio.detach())
        loss = nll / self._size.chosen_tokens + self._weight * odds_ratio.sum() / self._size.pairs
        return loss * self.accelerator.num_processes  # ranks average their gradients

    def _record(
        self, logprobs: Tensor, sequences: Tensor, chosen: Tensor, rejected: Tensor, odds_ratio: Tensor
    ) -> None:
        pairs, is_chosen = len(chosen), sequences < len(chosen)
        sums = (
            ((chosen > rejected).sum(), pairs),
            ((chosen - rejected).sum(), pairs),
            (logprobs[is_chosen].sum() - logprobs[~is_chosen].sum(), pairs),
            ((log_odds(chosen) - log_odds(rejected)).sum(), pairs),
            (odds_ratio.sum(), pairs),
            (-logprobs[is_chosen].sum(), int(is_chosen.sum())),
            (-logprobs[~is_chosen].sum(), int((~is_chosen).sum())),
        )
        for key, (total, count) in zip(METRICS, sums, strict=True):
            self._metrics.add(key, total=float(total), count=count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        found = reduce_metrics(gather(self.accelerator, [self._metrics.pairs()]))
        self._metrics = Metrics()
        super().log(logs | found, start_time)


def shares_prompts(model: Any) -> bool:
    """Whether the model's attention allows a prompt to be computed once for its two responses; prepares it for that, or says why not."""
    obstacle = can_share_prefix(model.config)
    if obstacle is not None:
        say(f"prompts are computed once for each response, not once for each pair: the model has {obstacle}")
    model.set_attn_implementation("sdpa" if obstacle else NAME)
    return obstacle is None


def refusal(example: PairExample, *, max_tokens: int) -> str | None:
    """Why a pair cannot be trained on; None when it can."""
    if example.longest > max_tokens:
        return f"longer than max_tokens {max_tokens}"
    if example.chosen_ids == example.rejected_ids:
        return "both responses are the same tokens"
    return None


def load_policy(config: PreferenceTraining) -> Any:
    """The model as its block of the recipe trains it, without dropout."""
    model = load_causal_lm(config.model.path, revision=config.model.revision, dtype=config.model.dtype)
    set_seed(config.seed)  # adapters are drawn, the same on every rank
    adapt(model, config.model)
    return ready(model, gradient_checkpointing=False)  # the trainer switches that on


def save_policy(trainer: Any, config: PreferenceTraining, tokenizer: PreTrainedTokenizerBase) -> None:
    """Model and tokenizer in `output_dir`."""
    # Not the trainer's save_model, which adds a pickle of the training arguments.
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    save_model(trained, config.output_dir, write=trainer.accelerator.is_main_process)
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(config.output_dir)


def last_figures(trainer: Any, *keys: str) -> dict[str, float]:
    """What the trainer logged last of some metrics."""
    rows = [row for row in trainer.state.log_history if keys[0] in row]
    return {key: rows[-1][key] for key in keys} if rows else {}


def build_trainer(config: ORPO, examples: Sequence[PairExample], *, pad_token_id: int) -> ORPOTrainer:
    from datasets import Dataset

    model = load_policy(config)
    return ORPOTrainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(config), remove_unused_columns=False),
        train_dataset=Dataset.from_list([asdict(example) for example in examples]),
        data_collator=PairCollator(pad_token_id, shares_prompts(model)),
        callbacks=[LogLines(Path(config.output_dir) / "metrics.jsonl")],
        odds_ratio_weight=config.odds_ratio_weight,
    )


def train_orpo(
    config: ORPO, tokenizer: PreTrainedTokenizerBase, examples: Sequence[PairExample], *, pad_token_id: int
) -> dict[str, float]:
    """Train and save model and tokenizer in `output_dir`; returns the last figures of the training pairs."""
    trainer = build_trainer(config, examples, pad_token_id=pad_token_id)
    run_trainer(trainer, config)
    save_policy(trainer, config, tokenizer)
    return last_figures(trainer, *METRICS)
