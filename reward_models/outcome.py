"""The outcome reward model: Bradley-Terry on preference pairs, trained with TRL, scored by us.

    head `classification`   r = w · h            a new row on top of the last token's hidden state
    head `likelihood`       r = log π(y | x)     what the language model itself would say of the response

The second one has no parameters of its own. Trained on pairs it becomes a language model that finds the better response likelier, the
implicit reward of preference optimisation (https://arxiv.org/abs/2305.18290, here without a reference, as in https://arxiv.org/abs/2405.14734).
A prompt's part cancels between the responses to it. It is for responses that can be said in one way; elsewhere it prefers what is short.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from reward_models.pair_report import ScoredPair, draw_report, report
from rlhf.config import RewardModel
from rlhf.critic import HEAD
from rlhf.distributed import global_max, place_frozen
from rlhf.lora import adapt, save_model
from rlhf.run import write_json
from rlhf.trainers.arguments import LogLines, run_trainer, trainer_arguments
from rlhf.types import Rollout

Head = Literal["classification", "likelihood"]
STATISTICS, PICTURE = "reward_statistics.json", "reward_model.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """A preference pair as token ids, prompt and response together."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_length: int = 0
    """Tokens that the two have in common because they are the prompt."""
    margin: float | None = None
    source: str = ""


def pairwise_accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Share of pairs whose chosen response scores higher: [N], [N] -> number. A tie is half right, as a coin would be."""
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def log_likelihoods(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """[B] log-probability of each sequence's tokens from `starts` on, of all but the first without it.

    Args:
        model: for causal language modelling.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T] 1 on real tokens.
        starts: [B] index of the first token that counts, at least 1.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()
    logprobs = logits.gather(-1, input_ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    counted = attention_mask[:, 1:].bool()
    if starts is not None:
        counted = counted & (torch.arange(1, input_ids.shape[1], device=input_ids.device) >= starts[:, None])
    return logprobs.masked_fill(~counted, 0.0).sum(1)


class OutcomeModel:
    """A trained reward model with the statistics that standardise its scores."""

    def __init__(self, model: Any, pad_token_id: int, mean: float, std: float, head: Head = "classification") -> None:
        self._model: Any = model
        self._head: Head = head
        self._pad_token_id, self.mean, self.std = pad_token_id, mean, std
        self._sharded_over: Accelerator | None = None

    def shard(self, accelerator: Accelerator) -> OutcomeModel:
        """Itself, its weights under ZeRO-3 in pieces: from now on every rank must score whenever one does, be it nothing."""
        self._model, self._sharded_over = place_frozen(accelerator, self._model), accelerator
        return self

    @classmethod
    def load(cls, path: str, *, device: str) -> OutcomeModel:
        """A reward model saved by `train`.

        Raises:
            ValueError: when the statistics are missing, or weights (the reward head above all) are missing or left over.
        """
        statistics = Path(path) / STATISTICS
        if not statistics.is_file():
            raise ValueError(f"{path} has no {STATISTICS}; train the model with scripts/train_reward_model.py")
        stored = json.loads(statistics.read_text(encoding="utf-8"))
        head: Head = stored.get("head", "classification")
        model_class, options = _model_class(head)
        model, info = model_class.from_pretrained(
            path, **options, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        bad = (
            sorted(info["missing_keys"])
            + sorted(info["unexpected_keys"])
            + sorted(str(key) for key in info["mismatched_keys"])
        )
        if bad:
            raise ValueError(
                f"{path} does not hold a whole reward model: {', '.join(bad[:5])} missing or unexpected; a head initialised at random would reward noise"
            )
        if not stored["std"] > 0:
            raise ValueError(
                f"{path} scored all held-out responses alike (std {stored['std']}), so its scores cannot be standardised; train it longer or on other pairs"
            )
        return cls(model.to(device).eval(), model.config.pad_token_id, stored["mean"], stored["std"], head)

    @torch.no_grad()
    def raw_scores(
        self, sequences: Sequence[Sequence[int]], *, batch_size: int, starts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """[N] unstandardised scores; sequences of similar length share a batch. `starts` [N] is where their responses begin."""
        starts = starts or [1] * len(sequences)
        scores = torch.empty(len(sequences))
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        idle = 0
        if self._sharded_over is not None:  # the other ranks cannot gather a layer without this one
            idle = global_max(self._sharded_over, len(chunks)) - len(chunks)
        for rows in chunks:
            scores[rows] = self._forward([sequences[i] for i in rows], [starts[i] for i in rows])
        for _ in range(idle):
            self._forward([[self._pad_token_id]], [1])
        return scores

    def score_rollouts(self, rollouts: Sequence[Rollout], *, batch_size: int) -> torch.Tensor:
        """[N] unstandardised scores."""
        return self.raw_scores(
            [(*r.prompt.token_ids, *r.token_ids) for r in rollouts],
            batch_size=batch_size,
            starts=[len(r.prompt.token_ids) for r in rollouts],
        )

    def _forward(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """[N] scores of one batch, padded on the right."""
        input_ids = torch.full((len(sequences), max(map(len, sequences))), self._pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for b, sequence in enumerate(sequences):
            input_ids[b, : len(sequence)] = torch.tensor(list(sequence))
            attention_mask[b, : len(sequence)] = 1
        input_ids, attention_mask = input_ids.to(self._model.device), attention_mask.to(self._model.device)
        if self._head == "likelihood":
            first = torch.tensor(list(starts), device=input_ids.device)
            return log_likelihoods(self._model, input_ids, attention_mask, first).cpu()
        logits = self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits[:, 0].float().cpu()

    def chances(self, *, batch_size: int) -> Callable[[Sequence[Rollout]], list[float]]:
        """Rollouts to the chance, by Bradley and Terry, that each is preferred to a response of average held-out score: sigmoid(r - mean)."""

        def score(rollouts: Sequence[Rollout]) -> list[float]:
            raw = self.score_rollouts(rollouts, batch_size=batch_size)
            return torch.sigmoid(raw.double() - self.mean).tolist()  # in float32 everything above 17 would be a tie

        return score

    def scorer(self, *, clip: float, batch_size: int) -> Callable[[Sequence[Rollout]], list[float]]:
        """Rollouts to standardised scores in [-clip, clip]."""

        def score(rollouts: Sequence[Rollout]) -> list[float]:
            raw = self.score_rollouts(rollouts, batch_size=batch_size)
            return ((raw - self.mean) / self.std).clamp(-clip, clip).tolist()

        return score


def training_rows(pairs: Sequence[TokenPair], *, margin_scale: float) -> list[dict[str, Any]]:
    """Rows for TRL's RewardTrainer, which subtracts a margin inside the loss (https://arxiv.org/abs/2307.09288, eq. 2).

        L = -log sigmoid(r_chosen - r_rejected - margin_scale · margin)

    A pair without a margin has one of 0, and with margin_scale 0 no row has any.

    Raises:
        ValueError: when margins are asked for and no pair has one.
    """
    rows: list[dict[str, Any]] = [{"chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs]
    if margin_scale == 0:
        return rows
    if all(p.margin is None for p in pairs):
        raise ValueError(f"margin_scale is {margin_scale:g} and no training pair has a margin; set margin_scale to 0")
    return [{**row, "margin": margin_scale * (p.margin or 0.0)} for row, p in zip(rows, pairs, strict=True)]


def score_pairs(pairs: Sequence[TokenPair], chosen: torch.Tensor, rejected: torch.Tensor) -> list[ScoredPair]:
    """[N] pairs with their [N], [N] scores."""
    return [
        ScoredPair(
            chosen=c,
            rejected=r,
            chosen_length=len(pair.chosen_ids) - pair.prompt_length,
            rejected_length=len(pair.rejected_ids) - pair.prompt_length,
            source=pair.source,
        )
        for pair, c, r in zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)
    ]


def _model_class(head: Head) -> tuple[Any, dict[str, Any]]:
    """What loads a model with this head, and how."""
    return (
        (AutoModelForCausalLM, {}) if head == "likelihood" else (AutoModelForSequenceClassification, {"num_labels": 1})
    )


def train(config: RewardModel, *, train_pairs: list[TokenPair], heldout_pairs: list[TokenPair]) -> dict[str, Any]:
    """Train with TRL's RewardTrainer and save model, tokenizer, statistics and their picture in `output_dir`; returns held-out figures."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(
        config.model.path, revision=config.model.revision, trust_remote_code=False
    )
    set_seed(config.seed)  # the new head is drawn while loading
    model_class, options = _model_class(config.head)
    model = model_class.from_pretrained(
        config.model.path,
        **options,
        revision=config.model.revision,
        dtype=getattr(torch, config.model.dtype),
        use_safetensors=True,
        trust_remote_code=False,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    speaks = config.head == "likelihood"
    model.config.num_labels = 1  # TRL asks for it whatever the head is
    adapt(model, config.model, trained_in_full=[] if speaks else [HEAD])

    class LikelihoodTrainer(RewardTrainer):
        """The same loss of other scores. A prompt's part of them is the same in both responses and cancels."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            def score(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
                scores: Any = log_likelihoods(model, input_ids, attention_mask)[:, None]
                return SequenceClassifierOutput(logits=scores)

            stands_in: Any = score
            return super().compute_loss(stands_in, inputs, *args, **kwargs)

    trainer = (LikelihoodTrainer if speaks else RewardTrainer)(
        model=model,
        args=RewardConfig(
            **trainer_arguments(config),
            max_length=None,
            center_rewards_coefficient=None if speaks else config.centering,
        ),
        train_dataset=Dataset.from_list(training_rows(train_pairs, margin_scale=config.margin_scale)),
        processing_class=tokenizer,
        callbacks=[LogLines(Path(config.output_dir) / "metrics.jsonl")],
    )
    run_trainer(trainer, config)
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    judge = OutcomeModel(trained.eval(), tokenizer.pad_token_id, 0.0, 1.0, config.head)
    starts = [p.prompt_length for p in heldout_pairs]
    chosen = judge.raw_scores([p.chosen_ids for p in heldout_pairs], batch_size=64, starts=starts)
    rejected = judge.raw_scores([p.rejected_ids for p in heldout_pairs], batch_size=64, starts=starts)
    both = torch.cat([chosen, rejected])
    scored = score_pairs(heldout_pairs, chosen, rejected)
    found = report(scored, seed=config.seed)
    statistics = {
        "head": config.head,
        "accuracy": pairwise_accuracy(chosen, rejected),
        "mean": both.mean().item(),
        "std": both.std().item(),
        "num_pairs": len(heldout_pairs),
        **found,
    }
    save_model(trained, config.output_dir, write=trainer.accelerator.is_main_process)
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(config.output_dir)
        write_json(Path(config.output_dir) / STATISTICS, statistics)
        draw_report(scored, found, Path(config.output_dir) / PICTURE)
    return statistics
