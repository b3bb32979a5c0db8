"""The process reward model: how likely each step of a solution is right, trained on labelled steps, scored by us."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from reward_models.processbench import (
    NO_ERROR,
    benchmark_score,
    choose_threshold,
    first_error,
    first_wrong,
    require_both_kinds,
)
from reward_models.steps import encode_steps, find_steps
from rlhf.config import ProcessRewardModel
from rlhf.distributed import global_max, place_frozen
from rlhf.lora import adapt, save_model
from rlhf.run import write_json
from rlhf.trainers.arguments import LogLines, run_trainer, trainer_arguments
from rlhf.trainers.process import Head, ProcessTrainer, StepCollator, StepExample, pad_right, step_logits
from rlhf.types import Rollout, StepReward

DESCRIPTION = "process_model.json"
THRESHOLD_SHARE = 0.25
"""Of the held-out solutions, on which the threshold is chosen; F1 is of the others."""
TOKENS_PER_BATCH = 16_384
"""Of the held-out solutions that are scored together, padding included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A solution to be judged, as token ids."""

    input_ids: list[int]
    start: int
    """Index of the first step's first token."""
    ends: list[int]
    """Index of the last token of each step."""
    first_error: int = -1
    """Index of the first wrong step, where that is known; -1 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a saved process model needs beside its weights."""

    head: Head
    separator: str
    """What ends a step."""
    opening: str
    """What is read before the first one."""
    right_token: str | None
    wrong_token: str | None
    """Of the head `next_token`: what it would write of a step that is right, and of one that is wrong."""
    threshold: float
    """A step whose probability is below it is called wrong; chosen on a part of the held-out solutions."""

    def tokens(self, tokenizer: Any) -> tuple[int, int] | None:
        """Ids of the two tokens; None for the other heads.

        Raises:
            ValueError: when one of them is not exactly one token.
        """
        if self.head != "next_token":
            return None
        ids = []
        for key, text in (("right_token", self.right_token), ("wrong_token", self.wrong_token)):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            if len(encoded) != 1:
                raise ValueError(f"{key} is {text!r}, which is {len(encoded)} tokens; choose a text that is one token")
            ids.append(encoded[0])
        return ids[0], ids[1]


# -------------------------------------------------------------------------------------------------------------------- scores

Aggregation = Literal["min", "product", "mean", "last"]


def aggregate(probabilities: Sequence[float], how: Aggregation) -> float:
    """One number for a solution from those of its steps.

    `min` is its weakest step (https://arxiv.org/abs/2312.08935), `product` the probability that all are right if they were independent
    (https://arxiv.org/abs/2305.20050), which falls with their number; `last` is for models whose probabilities are of a right answer.

    Raises:
        ValueError: when there is no step.
    """
    if not probabilities:
        raise ValueError("a solution without steps has no score; give at least one step")
    match how:
        case "min":
            return min(probabilities)
        case "product":
            return math.prod(probabilities)
        case "mean":
            return sum(probabilities) / len(probabilities)
        case "last":
            return probabilities[-1]


def batches_within(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of similar length, each of at most so many tokens with its padding; a longer sequence is a batch by itself."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class ProcessModel:
    """A trained process reward model with the cut into steps it was trained on."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, description: Description) -> None:
        self._model: Any = model
        self.tokenizer, self.description = tokenizer, description
        self._tokens = description.tokens(tokenizer)
        self._sharded_over: Accelerator | None = None

    @property
    def separator(self) -> str:
        return self.description.separator

    def shard(self, accelerator: Accelerator) -> ProcessModel:
        """Itself, its weights under ZeRO-3 in pieces: from now on every rank must score whenever one does, be it nothing."""
        self._model, self._sharded_over = place_frozen(accelerator, self._model), accelerator
        return self

    @classmethod
    def load(cls, path: str, *, device: str) -> ProcessModel:
        """A process model saved by `train`.

        Raises:
            ValueError: when its description is missing, or weights (the head above all) are missing or left over.
        """
        file = Path(path) / DESCRIPTION
        if not file.is_file():
            raise ValueError(f"{path} has no {DESCRIPTION}; train the model with scripts/train_process_reward_model.py")
        stored = json.loads(file.read_text(encoding="utf-8"))
        description = Description(**{field.name: stored[field.name] for field in dataclasses.fields(Description)})
        model, info = _model_class(description.head).from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        bad = [
            str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in sorted(info[kind])
        ]
        if bad:
            raise ValueError(
                f"{path} does not hold a whole process model: {', '.join(bad[:5])} missing or unexpected; a head initialised at random would reward noise"
            )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return cls(model.to(device).eval(), tokenizer, description)

    @torch.no_grad()
    def probabilities(self, solutions: Sequence[Solution], *, tokens_per_batch: int) -> list[list[float]]:
        """That each step of each solution is right; sequences of similar length share a batch."""
        found: list[list[float]] = [[] for _ in solutions]
        batches = batches_within([len(s.input_ids) for s in solutions], tokens_per_batch)
        idle = 0
        if self._sharded_over is not None:  # the other ranks cannot gather a layer without this one
            idle = global_max(self._sharded_over, len(batches)) - len(batches)
        for batch in batches:
            of_steps = self._forward([solutions[i] for i in batch])
            for i, probabilities in zip(batch, of_steps.split([len(solutions[i].ends) for i in batch]), strict=True):
                found[i] = probabilities.tolist()
        for _ in range(idle):
            self._forward([Solution(input_ids=[0, 0], start=1, ends=[1])])
        return found

    def _forward(self, solutions: Sequence[Solution]) -> torch.Tensor:
        """[N] probabilities of all steps of one batch, solution after solution."""
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        input_ids, attention_mask = pad_right([s.input_ids for s in solutions], pad)
        at = torch.zeros(input_ids.shape, dtype=torch.bool)
        for b, solution in enumerate(solutions):
            at[b, solution.ends] = True
        starts = torch.tensor([s.start for s in solutions])
        inputs = [tensor.to(self._model.device) for tensor in (input_ids, attention_mask, starts, at)]
        logits = step_logits(self._model, *inputs, head=self.description.head, tokens=self._tokens)
        return logits.sigmoid().cpu()

    def encode(self, prompt_ids: Sequence[int], steps: Sequence[str]) -> Solution:
        """A solution as the model reads it, after the tokens of its rendered question."""
        input_ids, ends = encode_steps(
            prompt_ids, steps, self.tokenizer, separator=self.separator, opening=self.description.opening
        )
        return Solution(input_ids=input_ids, start=len(prompt_ids), ends=ends)

    def scorer(self, *, tokens_per_batch: int) -> Callable[[Sequence[Rollout]], list[list[StepReward]]]:
        """Rollouts to the probability that each of their steps is right, at the step's last token; at least one step each.

        The policy must have the model's tokenizer.

        Raises:
            ValueError: when the model's tokenizer does not read a rollout's tokens as the policy's did.
        """

        def score(rollouts: Sequence[Rollout]) -> list[list[StepReward]]:
            steps = [find_steps(r.token_ids, r.text, self.tokenizer, self.separator) for r in rollouts]
            solutions = [
                self.encode(r.prompt.token_ids, [s.text for s in of_rollout])
                for r, of_rollout in zip(rollouts, steps, strict=True)
            ]
            found = self.probabilities(solutions, tokens_per_batch=tokens_per_batch)
            return [
                [StepReward(step.position, p) for step, p in zip(of_rollout, probabilities, strict=True)]
                for of_rollout, probabilities in zip(steps, found, strict=True)
            ]

        return score


# ------------------------------------------------------------------------------------------------------------------ training


def _model_class(head: str) -> Any:
    return AutoModelForTokenClassification if head == "classification" else AutoModelForCausalLM


def targets_of(
    labels: Sequence[bool],
    values: Sequence[float],
    *,
    soft: bool,
    after_first_error: Literal["ignore", "train"] = "ignore",
) -> list[float]:
    """The probability that each step is trained to have; for as many first steps as are trained on.

    Raises:
        ValueError: for soft targets of steps without values, and for labels that are no booleans.
    """
    if any(type(label) is not bool for label in labels):
        raise ValueError(f"labels must be booleans, got {list(labels)!r:.80}; -100 or 1.0 would silently count as true")
    if soft and len(values) != len(labels):
        raise ValueError(
            "labels is soft and a solution has no values; label it with scripts/label_steps.py, or set labels to hard"
        )
    targets = [float(target) for target in (values if soft else labels)]
    wrong = first_wrong(labels)
    return targets if after_first_error == "train" or wrong == NO_ERROR else targets[: wrong + 1]


def example_of(solution: Solution, targets: Sequence[float]) -> StepExample:
    """A solution as it is trained on, its first steps as far as there are targets."""
    ends = solution.ends[: len(targets)]
    return StepExample(input_ids=solution.input_ids, start=solution.start, ends=ends, targets=list(targets))


def figures_of(
    probabilities: Sequence[Sequence[float]], truth: Sequence[int], *, threshold: float | None, seed: int
) -> tuple[float, dict[str, Any]]:
    """(threshold, F1 as ProcessBench counts it): where there is no threshold yet, a quarter of the solutions gives it and the others are scored."""
    scored = list(range(len(truth)))
    if threshold is None:
        random.Random(seed).shuffle(scored)
        cut = max(1, round(THRESHOLD_SHARE * len(scored)))
        first, scored = scored[:cut], scored[cut:]
        threshold = choose_threshold([probabilities[i] for i in first], [truth[i] for i in first])
    score = benchmark_score([first_error(probabilities[i], threshold) for i in scored], [truth[i] for i in scored])
    return threshold, {"num_solutions": len(scored), **dataclasses.asdict(score)}


def train(
    config: ProcessRewardModel, tokenizer: Any, *, examples: Sequence[StepExample], heldout: Sequence[Solution]
) -> dict[str, Any]:
    """Train and save model, tokenizer and description in `output_dir`; returns held-out figures."""
    from datasets import Dataset

    require_both_kinds([s.first_error for s in heldout], config.heldout_steps)
    description = Description(
        head=config.head,
        separator=config.separator,
        opening=config.opening,
        right_token=config.right_token if config.head == "next_token" else None,
        wrong_token=config.wrong_token if config.head == "next_token" else None,
        threshold=0.5,
    )
    tokens = description.tokens(tokenizer)
    set_seed(config.seed)  # the new head is drawn while loading
    architecture = AutoConfig.from_pretrained(
        config.model.path, revision=config.model.revision, trust_remote_code=False
    )
    if config.head == "classification":
        architecture.num_labels = 1
        architecture.classifier_dropout = 0.0  # transformers' 0.1 would blur what is read of a single token
    model = _model_class(config.head).from_pretrained(
        config.model.path,
        config=architecture,
        revision=config.model.revision,
        dtype=getattr(torch, config.model.dtype),
        use_safetensors=True,
        trust_remote_code=False,
    )
    adapt(model, config.model, trained_in_full=["score"] if config.head == "classification" else [])
    trainer = ProcessTrainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(config), remove_unused_columns=False),
        train_dataset=Dataset.from_list([dataclasses.asdict(example) for example in examples]),
        data_collator=StepCollator(tokenizer.pad_token_id),
        callbacks=[LogLines(Path(config.output_dir) / "metrics.jsonl")],
        head=config.head,
        tokens=tokens,
    )
    run_trainer(trainer, config)
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    judge = ProcessModel(trained.eval(), tokenizer, description)
    probabilities = judge.probabilities(heldout, tokens_per_batch=TOKENS_PER_BATCH)
    threshold, figures = figures_of(probabilities, [s.first_error for s in heldout], threshold=None, seed=config.seed)
    save_model(trained, config.output_dir, write=trainer.accelerator.is_main_process)
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(config.output_dir)
        written = dataclasses.asdict(dataclasses.replace(description, threshold=threshold))
        write_json(Path(config.output_dir) / DESCRIPTION, {**written, "heldout": figures})
    return {"threshold": threshold, **figures}
