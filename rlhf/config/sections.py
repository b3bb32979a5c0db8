"""Blocks that several stages share."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


def _as_word(value: Any) -> Any:
    return str(value) if type(value) is int else value


Think = Annotated[str, BeforeValidator(_as_word), Field(pattern=r"^(off|short|long|[1-9]\d*)$")]
"""A thinking budget: a word, or a number of tokens."""


class Section(BaseModel):
    """A block of a recipe: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Section):
    """A number moves in a straight line to another one, by the number of the rollout batch: from 1, as in metrics.jsonl."""

    to: float
    first_batch: PositiveInt = 1
    """Up to it, it is the number that the recipe gives."""
    last_batch: PositiveInt
    """From it on, it is `to`."""

    @model_validator(mode="after")
    def _batches_in_order(self) -> Schedule:
        if self.first_batch >= self.last_batch:
            raise ValueError(
                f"first_batch is {self.first_batch} and last_batch is {self.last_batch}; the number moves between them, so raise last_batch"
            )
        return self


def scheduled(start: float, schedule: Schedule | None, batch: int) -> float:
    """The number in rollout batch number `batch`, from 1: a function of its arguments, so that a resumed run repeats it.

    start + (to - start) clip((batch - first) / (last - first), 0, 1)
    """
    if schedule is None:
        return start
    way = (batch - schedule.first_batch) / (schedule.last_batch - schedule.first_batch)
    return start + (schedule.to - start) * min(max(way, 0.0), 1.0)


def nearest(name: str, known: list[str]) -> str:
    """A sentence that names the closest known name, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


class Chat(Section):
    """How questions are put to the model, the same in every stage."""

    system_prompt: str | None = None
    think: Think | None = None
    """Thinking budget of the questions whose record has none of its own (data/chat.py); by default those have none."""


class Optimizer(Section):
    """AdamW with linear warm-up, then constant or linear decay to zero."""

    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class OfflineTraining(Section):
    """How a fixed data set is trained on. Per-rank micro-batch x ranks x accumulation = sequences per optimizer step."""

    num_steps: PositiveInt
    """Optimizer steps."""
    sequences_per_step: PositiveInt
    """Over all ranks and micro-batches."""
    micro_batch_size: PositiveInt
    """Sequences (pairs, for a reward model) per rank and forward pass."""
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100_000
    """Optimizer steps between checkpoints that an interrupted stage resumes from."""

    def accumulation(self, num_ranks: int) -> int:
        """Micro-batches per rank and optimizer step."""
        per_pass = self.micro_batch_size * num_ranks
        if self.sequences_per_step % per_pass:
            raise ValueError(
                f"training.sequences_per_step is {self.sequences_per_step}, not a multiple of training.micro_batch_size x ranks = "
                f"{self.micro_batch_size} x {num_ranks}; change one of them"
            )
        return self.sequences_per_step // per_pass


class Rollout(Section):
    """How completions are sampled."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto` is vLLM where it is installed and the slower transformers engine, with a warning, elsewhere."""
    samples_per_prompt: PositiveInt
    max_prompt_tokens: PositiveInt
    """A longer prompt is an error, found before any model is loaded."""
    max_new_tokens: PositiveInt
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The trainer's log-probabilities use it too. There is no top-p or top-k: a truncated sampler biases the importance ratio."""
    dtype: Dtype = "bfloat16"
    """Precision of the engine's weights."""
    kv_cache_gb: Annotated[float, Field(gt=0)] = 1.0
    """Memory vLLM reserves for keys and values on a CPU."""
    cache_block_tokens: PositiveInt | None = None
    """Tokens of a block of vLLM's prefix cache, which shares whole blocks only; vLLM takes 16 on GPUs and 128 on CPUs, where it wants multiples
    of 32."""
    gpu_memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of a GPU that vLLM may take, weights included; the trainer needs the rest."""


class Grader(Section):
    """The processes that compare answers with references (see reward_models/grading/)."""

    accept: Literal["boxed", "marked", "bare", "last_number"] = "boxed"
    """How plainly a completion must say its answer: in a box, after a marker, as the whole text, or just as its last number."""
    workers: PositiveInt = 1
    """Per rank."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Wall-clock time a completion may take; then its worker is killed and the completion is undecided."""
    memory_mb: Annotated[int, Field(ge=256)] = 512
    """Address space of a worker."""
