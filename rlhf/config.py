"""The recipe schema, how a recipe becomes a config, and `python -m rlhf.config RECIPE [key.sub=value ...]`.

A recipe is YAML with a `stage` key that names its root class below. `extends: other.yaml` is read first and overlaid; overrides
come last. Unknown keys, wrong types and contradictions are errors that name the key and its repair. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from rlhf.metrics import MEANING

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A block of a recipe: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --------------------------------------------------------------------------------------------------------------- shared blocks


class Chat(Section):
    """How questions are put to the model, the same in every stage."""

    system_prompt: str | None = None


class Weights(Section):
    """A saved model."""

    path: str
    """A folder, or a repository on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit when `path` is on the hub; pin a commit to be able to repeat the run."""


class Lora(Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685): W stays as it is and A, B of W + alpha / rank B A are trained, in float32.

    There is no dropout: it would make the trainer's policy another one than the sampler's.
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Last parts of the names of linear layers, such as q_proj; by default all linear layers of the blocks."""


class PolicyLora(Lora):
    sync: Literal["merged", "adapter"] = "merged"
    """What the rollout engine gets after each step: whole weights, adapters added, or the adapters alone, which it then applies itself."""


class Model(Weights):
    """Weights to start training from."""

    dtype: Dtype = "float32"
    """Precision of the weights in training."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: Lora | None = None
    """Train adapters instead of the weights."""
    quantization: Literal["nf4"] | None = None
    """Keep the linear layers under the adapters in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): an eighth or a quarter of their memory."""

    @model_validator(mode="after")
    def _four_bits_are_not_trained(self) -> Model:
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"quantization is {self.quantization} and lora is not set; weights of 4 bits cannot be trained themselves: add lora or remove quantization"
            )
        return self


def require_unsharded(model: Model, zero_stage: int) -> None:
    """Raise where 4-bit weights would be sharded.

    Raises:
        ValueError: under ZeRO-3, which gathers weights without the scales that 4 bits mean nothing without.
    """
    if model.quantization is not None and zero_stage == 3:
        raise ValueError(
            f"quantization is {model.quantization} and the accelerate configuration has zero_stage 3, which would cut packed weights off from their "
            "scales; take recipes/accelerate/ddp.yaml or zero_stage 1 or 2: the quantised base is small enough for every rank"
        )


class LanguageModel(Model):
    """Weights of a language model to start training from."""

    router_aux_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss that spreads the tokens evenly over the experts of a mixture (rlhf/balance.py). It counts the tokens of the whole
    optimizer step, so it costs a forward pass where a step has several micro-batches or ranks."""


class Policy(LanguageModel):
    """Weights to start from, which a rollout engine follows."""

    lora: PolicyLora | None = None  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    router_replay: bool = False
    """Send the tokens of a mixture to the experts they went to when they were sampled, with the weights of the policy's own routers
    (https://arxiv.org/abs/2510.11370); for engines whose routers choose otherwise than the trainer's."""

    @model_validator(mode="after")
    def _the_engine_must_have_the_same_base(self) -> Policy:
        if self.quantization is not None and self.lora is not None and self.lora.sync == "adapter":
            raise ValueError(
                f"quantization is {self.quantization} and lora.sync is adapter; the engine would put the adapter on the weights of path and not on the "
                "quantised ones that it is trained on: set lora.sync to merged"
            )
        return self


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


# ----------------------------------------------------------------------------------------------------------------- prepare_data


class StoriesSource(Section):
    """The embedded task, generated (see data/stories.py)."""

    name: Literal["stories"]
    min_level: PositiveInt = 2
    """Fewest events of a problem."""
    max_level: Annotated[int, Field(ge=1, le=6)] = 5
    answers_at_once: Share = 0.6
    """Share of the demonstrations that answer without a scratchpad."""

    @model_validator(mode="after")
    def _levels_in_order(self) -> StoriesSource:
        if self.min_level > self.max_level:
            raise ValueError(f"min_level is {self.min_level} and max_level is {self.max_level}; swap them")
        return self


class GSM8KSource(Section):
    """GSM8K in its original JSONL (see data/gsm8k.py)."""

    name: Literal["gsm8k"]
    path: str | None = None
    """Folder with train.jsonl and test.jsonl; without it the hub's openai/gsm8k is downloaded at `revision`."""
    revision: str = "main"


class PrepareData(Section):
    """Turns a source into the record files that the other stages read."""

    stage: Literal["prepare_data"]
    output_dir: str
    seed: int = 0
    source: Annotated[StoriesSource | GSM8KSource, Field(discriminator="name")]
    num_demonstrations: PositiveInt
    num_train_problems: PositiveInt
    """Problems for reinforcement learning."""
    num_test_problems: PositiveInt
    num_preference_pairs: Annotated[int, Field(ge=2)]
    """Training pairs; a tenth as many again are held out, from the source's test split, for the reward model's accuracy."""
    script: ClassVar[str] = "scripts/prepare_data.py"


# ------------------------------------------------------------------------------------------------------------------ curate_data


class Source(Section):
    """A source of data/catalog.py."""

    name: str
    path: str | None = None
    """File or folder in the form the source ships; without it the hub's data set is downloaded at a pinned revision."""
    revision: str | None = None
    """Commit on the hub, where it is not the catalog's."""
    split: str | None = None
    """The source's own split; its training data where it has any, by default."""


class DataSource(Source):
    """One of several; all sources of a recipe yield the same kind of record."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the mix, relative to the other sources."""


class DataFilters(Section):
    """What a record must be. The defaults let everything pass; what is taken out is counted with its reason."""

    tokenizer: str | None = None
    """Folder with the tokenizer.json that tokens are counted with; chat markers are not counted."""
    min_tokens: PositiveInt = 1
    max_tokens: PositiveInt | None = None
    languages: tuple[str, ...] = ()
    """Codes such as en; a text that is too short to tell passes."""
    min_letter_share: Share = 0.0
    """Letters among all characters but spaces."""
    max_repetition: Share = 1.0
    """Share of a text's 5-grams that occurred in it before, in texts of 50 words and more."""
    pictures: bool = True
    """Whether a text may refer to a picture that is not there."""

    @model_validator(mode="after")
    def _tokens_need_a_tokenizer(self) -> DataFilters:
        if self.tokenizer is None and (self.max_tokens is not None or self.min_tokens > 1):
            raise ValueError("max_tokens and min_tokens count tokens, but tokenizer is not set; name a model's folder")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens is {self.max_tokens} and min_tokens is {self.min_tokens}; swap them")
        return self


class Duplicates(Section):
    """Of equal or similar rows the first one stays, in the order of the sources."""

    exact: bool = True
    near_threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Least estimated Jaccard similarity of near duplicates; null keeps them. Rows with different answers are none."""
    shingle_words: PositiveInt = 5
    """Words of the n-grams that are compared."""


class EvaluationSet(Section):
    """Where an evaluation set is read from: a local file or folder, or the hub at a pinned revision."""

    path: str | None = None
    revision: str | None = None


class Decontamination(Section):
    """Rows that hold a problem of an evaluation set are dropped, and named in the manifest (see data/decontamination.py)."""

    against: Annotated[dict[str, EvaluationSet], Field(min_length=1)]
    """Benchmarks by name; recipes/data/benchmarks.yaml lists all that are known."""
    ngram_words: PositiveInt = 8
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of a problem's n-grams in a row."""
    numbers_blind: Literal["drop", "report", "off"] = "drop"
    """What happens to rows that are a problem reworded with other numbers."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least numbers-blind similarity."""
    min_words: PositiveInt = 12
    """Problems of fewer words, numbers and single letters aside, are not matched numbers-blind: they are set phrases."""


class Difficulty(Section):
    """Pass rate of a policy on each problem that is left; problems outside the bounds are dropped."""

    policy: Weights
    chat: Chat = Chat()
    rollout: Rollout
    min_pass_rate: Share = 0.0
    max_pass_rate: Share = 1.0


class Mix(Section):
    """Sources in the proportion of their weights, no row twice. Without this block every row that is left is used."""

    num_rows: PositiveInt | None = None
    """As many as the weights allow, by default."""


class Split(Section):
    """Files to write; rows with the same question go to the same one."""

    shares: Annotated[dict[str, Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = {"train": 1.0}
    stratify_by: tuple[str, ...] = ()
    """Fields of the records, such as level or subject, whose values have the same shares in every split."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> Split:
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares add up to {sum(self.shares.values()):g}, not 1; change one of them")
        return self


class CurateData(Section):
    """Filters, deduplicates, decontaminates, splits and mixes sources of any size into parquet files with a manifest."""

    stage: Literal["curate_data"]
    output_dir: str
    seed: int = 0
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    filters: DataFilters = DataFilters()
    duplicates: Duplicates = Duplicates()
    decontamination: Decontamination | None = None
    difficulty: Difficulty | None = None
    mix: Mix | None = None
    split: Split = Split()
    processes: PositiveInt | None = None
    """As many as there are cores, by default."""
    shard_megabytes: Annotated[float, Field(gt=0)] = 32.0
    """Of input text a process reads before it leaves a mark to resume from."""
    script: ClassVar[str] = "scripts/prepare_data.py"

    @model_validator(mode="after")
    def _weights_need_a_mix(self) -> CurateData:
        if self.mix is None and any(source.weight != 1 for source in self.sources):
            raise ValueError("a source has a weight, but there is no mix, so nothing would read it; add `mix: {}`")
        return self


# ------------------------------------------------------------------------------------------------------------------ build_model


class Architecture(Section):
    """A Qwen3 built from numbers; with num_experts a Qwen3-MoE, each of whose layers is a mixture."""

    hidden_size: PositiveInt
    intermediate_size: Annotated[int, Field(ge=0)] = 0
    """Width of the feed-forward blocks; 0 for a mixture."""
    num_experts: Annotated[int, Field(ge=0)] = 0
    """Of each layer; 0 for a plain model, as are the next two."""
    experts_per_token: Annotated[int, Field(ge=0)] = 0
    expert_intermediate_size: Annotated[int, Field(ge=0)] = 0
    """Width of one expert."""
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    max_positions: PositiveInt
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; narrow models learn several times faster with more than the usual 0.02."""

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> Architecture:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}, not a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @model_validator(mode="after")
    def _plain_or_mixture(self) -> Architecture:
        keys = ("num_experts", "experts_per_token", "expert_intermediate_size")
        missing = [key for key in keys if not getattr(self, key)]
        if not self.intermediate_size and missing:
            raise ValueError(
                f"{', '.join(missing)} and intermediate_size are not set; set the latter for a plain model, the others for a mixture"
            )
        if self.intermediate_size and len(missing) < len(keys):
            raise ValueError(
                f"intermediate_size is {self.intermediate_size}, of a plain model, and {', '.join(k for k in keys if k not in missing)} of a mixture "
                "are set; remove one kind"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token}, more than num_experts {self.num_experts}")
        return self


class BuildModel(Section):
    """Trains a tokenizer on the demonstrations and initialises a model from numbers, for tasks that need no download."""

    stage: Literal["build_model"]
    output_dir: str
    seed: int = 0
    demonstrations: str
    """Record file whose text the tokenizer is trained on."""
    vocab_size: Annotated[int, Field(ge=300)]
    architecture: Architecture
    script: ClassVar[str] = "scripts/build_model.py"


# ------------------------------------------------------------------------------------------------------------------------- sft


class SFT(Section):
    """Supervised fine-tuning on chain-of-thought scratchpads, with TRL's SFTTrainer."""

    stage: Literal["sft"]
    output_dir: str
    seed: int = 0
    model: LanguageModel
    chat: Chat = Chat()
    demonstrations: str
    max_tokens: PositiveInt
    """A longer demonstration is left out, and counted."""
    training: OfflineTraining
    optimizer: Optimizer
    script: ClassVar[str] = "scripts/train_sft.py"


# ---------------------------------------------------------------------------------------------------------------- reward_model


class RewardModel(Section):
    """An outcome reward model on preference pairs, with TRL's RewardTrainer (Bradley-Terry)."""

    stage: Literal["reward_model"]
    output_dir: str
    seed: int = 0
    model: Model
    chat: Chat = Chat()
    train_pairs: str
    heldout_pairs: str
    max_tokens: PositiveInt
    head: Literal["classification", "likelihood"] = "classification"
    """A new row on the hidden state, or the language model's own log-probability of the response (see reward_models/outcome.py)."""
    centering: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the penalty on (sum of the two rewards)^2, which keeps the scores near zero; of the head `classification`."""
    margin_scale: Annotated[float, Field(ge=0)] = 0.0
    """What the margin of a pair, where its source has one, is multiplied with before the chosen response must be ahead by it
    (https://arxiv.org/abs/2307.09288, eq. 2). 0 leaves margins out."""
    training: OfflineTraining
    optimizer: Optimizer
    script: ClassVar[str] = "scripts/train_reward_model.py"


class ProcessRewardModel(Section):
    """A process reward model on labelled steps: the probability that each step is right (see rlhf/trainers/process.py)."""

    stage: Literal["process_reward_model"]
    output_dir: str
    seed: int = 0
    model: Model
    chat: Chat = Chat()
    train_steps: str
    heldout_steps: str
    """Solutions with errors and without; a part of them gives the threshold, the others F1."""
    separator: Annotated[str, Field(min_length=1)] = "\n"
    """What ends a step, in the records that are trained on and in the completions that are scored (see reward_models/steps.py)."""
    opening: str = ""
    """What the policy writes before its first step, such as an open think tag; put there for records that do without."""
    head: Literal["classification", "next_token", "likelihood"] = "classification"
    """A new row on the hidden states, the language model's odds that right_token and not wrong_token comes next, or the probability that the
    language model would write the step itself, for tasks in which a right step can be said in one way."""
    right_token: str | None = None
    wrong_token: str | None = None
    labels: Literal["hard", "soft"] = "hard"
    """Right or wrong, or the estimated probability that a solution which begins like this ends right."""
    after_first_error: Literal["ignore", "train"] = "ignore"
    """Whether steps after the first wrong one are trained on. What is right there is not defined: PRM800K stops labelling
    (https://arxiv.org/abs/2305.20050), automatic labels call all of them wrong, which teaches that wrong follows wrong."""
    max_tokens: PositiveInt
    """A longer solution is left out, and counted."""
    training: OfflineTraining
    optimizer: Optimizer
    script: ClassVar[str] = "scripts/train_process_reward_model.py"

    @model_validator(mode="after")
    def _tokens_belong_to_next_token(self) -> ProcessRewardModel:
        for key, token in (("right_token", self.right_token), ("wrong_token", self.wrong_token)):
            if (self.head == "next_token") != (token is not None):
                problem = "is not set" if token is None else f"is {token!r}, which nothing would read"
                raise ValueError(
                    f"head is {self.head} and {key} {problem}; give both tokens, such as + and -, to the head next_token only"
                )
        return self


class EvaluateProcess(Section):
    """How well a process model finds the first wrong step of labelled solutions, counted as ProcessBench does."""

    stage: Literal["evaluate_process"]
    output_dir: str
    seed: int = 0
    model: str
    """Folder of a process reward model."""
    chat: Chat = Chat()
    solutions: Annotated[dict[str, Source], Field(min_length=1)]
    """Label to a source of labelled steps, such as processbench."""
    threshold_on: str | None = None
    """Label of the solutions a quarter of which gives the threshold, for all; the rest of them is scored. By default the model's own counts."""
    tokens_per_batch: PositiveInt = 16_384
    """Of a forward pass, padding included."""
    script: ClassVar[str] = "scripts/evaluate_process.py"

    @model_validator(mode="after")
    def _threshold_is_on_a_label(self) -> EvaluateProcess:
        if self.threshold_on is not None and self.threshold_on not in self.solutions:
            raise ValueError(
                f"threshold_on is {self.threshold_on!r}; {nearest(self.threshold_on, list(self.solutions))}"
            )
        return self


Offline = SFT | RewardModel | ProcessRewardModel
"""Stages that train on a fixed data set."""


# ------------------------------------------------------------------------------------------------------------------------ grpo


class WeightSchedule(Section):
    """A component's weight moves in a straight line to another one, by the number of the rollout batch: from 1, as in metrics.jsonl."""

    to: float
    first_batch: PositiveInt = 1
    """Up to it, it is the component's `weight`."""
    last_batch: PositiveInt
    """From it on, it is `to`."""

    @model_validator(mode="after")
    def _batches_in_order(self) -> WeightSchedule:
        if self.first_batch >= self.last_batch:
            raise ValueError(
                f"first_batch is {self.first_batch} and last_batch is {self.last_batch}; the weight moves between them, so raise last_batch"
            )
        return self


class Applies(Section):
    """Which completions a component judges. Elsewhere it is missing, which is no 0: it stays out of its group's mean and standard deviation,
    and neither helps nor harms the completion in the comparison. With a critic, which compares nothing, it adds nothing."""

    verdict: Literal["correct", "wrong"] | None = None
    columns: dict[str, tuple[str | int | float, ...]] = {}
    """Column of the problems, such as subject or level, to the values it may have; without any, all but empty ones."""


class Gate(Section):
    """A component counts as 0 where another one's raw value is too small, or missing."""

    component: str
    at_least: float = 1.0


class RewardComponent(Section):
    """A named part of the reward. It adds weight x clip(raw / scale) to the total, where it applies and its gates are open."""

    name: Annotated[str, Field(pattern=r"^[\w.:-]+$")]
    """Of its metrics; two components may be of the same kind."""
    kind: str
    """What it is; the same as the name by default."""
    weight: float = 1.0
    schedule: WeightSchedule | None = None
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Raw values are divided by it."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Values are kept between -clip and clip, after the division."""
    applies: Applies = Applies()
    gates: tuple[Gate, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _kind_is_the_name(cls, raw: Any) -> Any:
        return {"kind": raw["name"], **raw} if isinstance(raw, dict) and "name" in raw else raw


class RuleReward(RewardComponent):
    """A rule, or any function `my_package.module:name` with the signature of a reward component."""

    kind: Annotated[str, Field(pattern=r"^(correctness|format|length|overlong|repetition|[\w.]+:\w+)$")]
    buffer_tokens: PositiveInt | None = None
    """Of `overlong`: the last tokens before rollout.max_new_tokens, over which the punishment grows from 0 to -1."""

    @model_validator(mode="after")
    def _buffer_belongs_to_overlong(self) -> RuleReward:
        if (self.kind == "overlong") != (self.buffer_tokens is not None):
            raise ValueError(
                "reward overlong has no buffer_tokens; say over how many of the last tokens the punishment grows, DAPO takes a fifth of the longest length"
                if self.kind == "overlong"
                else f"reward {self.kind} has buffer_tokens {self.buffer_tokens}, which only overlong reads; remove it"
            )
        return self


class ModelReward(RewardComponent):
    """A trained model that judges completions."""

    path: str
    placement: Literal["whole", "sharded"] = "whole"
    """`whole` on every rank, or, under ZeRO-3, `sharded` over the ranks, for a model that does not fit onto one: every rank then takes part in
    every forward pass, whatever its own rollouts. Without ZeRO-3 both are whole."""


class RewardModelReward(ModelReward):
    """A trained outcome reward model; its raw value is the score standardised by its held-out statistics."""

    kind: Literal["reward_model"]  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    clip: Annotated[float, Field(gt=0)] | None = 3.0
    """Standard deviations, with a scale of 1, beyond which a score no longer grows."""
    batch_size: PositiveInt = 64


class ProcessRewardModelReward(ModelReward):
    """A trained process reward model: rewards of the steps of a completion, at the last token of each, or one for all of it."""

    kind: Literal["process_reward_model"]  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    step_value: Literal["probability", "signed"] = "probability"
    """p, the probability that the step is right, or 2 p - 1, with which a step that is more likely wrong than right costs something: what
    algorithm.step_credit `min` is made for, as behind the worst step it counts 0."""
    aggregate: Literal["min", "product", "mean", "last"] | None = None
    """One number for the whole completion, of the steps' probabilities; by default every step earns its own (algorithm.step_credit)."""
    tokens_per_batch: PositiveInt = 16_384
    """Of a forward pass, padding included."""


class Endpoint(Section):
    """A server of someone else's, over HTTP."""

    url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")]
    key_variable: str | None = None
    """Environment variable that holds the API key."""
    concurrency: PositiveInt = 16
    """Requests under way at once, per rank."""
    attempts: PositiveInt = 5
    """Of a request that fails by no fault of ours: no connection, overload, an internal error, no answer in time."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """For the whole answer to an attempt, not for its next byte."""


class RewardServerReward(RewardComponent, Endpoint):
    """A reward model of the kind above behind `vllm serve` for pooling models, at `url`; what it does not score is undecided."""

    kind: Literal["reward_model"]  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    path: str
    """Folder with the model's reward_statistics.json. Its weights are not read."""
    clip: Annotated[float, Field(gt=0)] | None = 3.0
    batch_size: PositiveInt = 16
    """Sequences per request."""


class JudgeModel(Endpoint):
    """A language model behind an OpenAI-compatible server (`url` up to and including `/v1`) that judges completions by a rubric."""

    model: str | None = None
    """What the server calls the model; by default the only one it lists."""
    rubric: str | None = None
    """What makes an answer good, in words; a general rubric by default."""
    rubric_file: str | None = None
    """The same as a text file."""
    scale: tuple[int, int] = (1, 10)
    """Worst and best whole number; the reward is where between them the score lies, from 0 to 1."""
    show_reference: bool = True
    """Whether the judge sees the reference answer, where there is one."""
    explanation_chars: Annotated[int, Field(ge=0)] = 300
    """Of the sentence that the judge writes before its verdict; 0 for none."""
    max_tokens: PositiveInt = 512
    """Of a verdict. One that is cut by it is undecided."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the server is told the form of a verdict. It is checked here in any case. A server that refuses the schema's maxLength may take
    json_object, or an explanation_chars of 0."""
    cache: str | None = None
    """SQLite file of the verdicts, which several processes may share; on a local disk."""

    @model_validator(mode="after")
    def _rubric_once(self) -> JudgeModel:
        if self.rubric is not None and self.rubric_file is not None:
            raise ValueError("rubric and rubric_file are both set; remove one of them")
        return self

    @model_validator(mode="after")
    def _scale_in_order(self) -> JudgeModel:
        low, high = self.scale
        if not low < high <= low + 100:
            raise ValueError(f"scale is {low} to {high}; give the worst score first and the best at most 100 above it")
        return self

    @model_validator(mode="after")
    def _room_for_the_explanation(self) -> JudgeModel:
        least = 16 + self.explanation_chars // 4
        if self.max_tokens < least:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, too few for a verdict with explanation_chars {self.explanation_chars}; set it to {least} or more"
            )
        return self


class JudgeReward(RewardComponent):
    """A language model as judge; its raw value is the score from 0 to 1. What it does not decide is undecided."""

    kind: Literal["judge"]  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    judge: JudgeModel


REWARD_CLASSES = {
    "reward_model": "RewardModelReward",
    "process_reward_model": "ProcessRewardModelReward",
    "judge": "JudgeReward",
}
"""Kinds of component that are no rules, and their classes."""


def _reward_class(raw: Any) -> str:
    """Name of the class of an entry of `rewards`; what is nothing else is a rule."""
    fields = raw if isinstance(raw, dict) else getattr(raw, "__dict__", {})
    found = REWARD_CLASSES.get(str(fields.get("kind") or fields.get("name")), "RuleReward")
    return "RewardServerReward" if found == "RewardModelReward" and fields.get("url") is not None else found


Reward = Annotated[
    Annotated[RewardModelReward, Tag("RewardModelReward")]
    | Annotated[ProcessRewardModelReward, Tag("ProcessRewardModelReward")]
    | Annotated[RewardServerReward, Tag("RewardServerReward")]
    | Annotated[JudgeReward, Tag("JudgeReward")]
    | Annotated[RuleReward, Tag("RuleReward")],
    Discriminator(_reward_class),
]


class Reference(Section):
    """What the KL penalty refers to."""

    kind: Literal["frozen", "lora_base", "moving_average"] = "frozen"
    """`frozen`: the weights at `path`. `lora_base`: the policy with its adapters off. `moving_average`: starts as a copy of the policy and
    follows it (https://arxiv.org/abs/2404.09656)."""
    path: str | None = None
    revision: str | None = None
    dtype: Dtype = "float32"
    mix: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the policy in a moving average, each time it follows."""
    every_steps: PositiveInt = 64
    """Optimizer steps between two times that a moving average follows."""

    @model_validator(mode="after")
    def _path_belongs_to_frozen(self) -> Reference:
        if (self.kind == "frozen") != (self.path is not None):
            problem = "has no path" if self.path is None else f"has the path {self.path}, which nothing would read"
            raise ValueError(
                f"reference.kind is {self.kind} and it {problem}; name the weights for kind frozen and only there"
            )
        return self


class Algorithm(Section):
    """What the members of the family share (the equations are in rlhf/losses.py, kl.py and masking.py)."""

    loss: Literal["clipped", "sequence_clipped", "cispo", "sapo", "vespo"] = "clipped"
    """PPO's clip on each token's ratio, GSPO's on the sequence's, CISPO's clipped weight, SAPO's soft gate, VESPO's weight of the sequence."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """Above clip_low it is DAPO's clip-higher. The losses of GSPO want bounds near 4e-4; CISPO's weight ends at 1 + clip_high."""
    ratio_ceiling: Annotated[float, Field(gt=1)] | None = None
    """Largest ratio of a token whose advantage is negative: the two-sided clip, for the clipped losses."""
    sapo_temperature_positive: Annotated[float, Field(gt=0)] = 1.0
    sapo_temperature_negative: Annotated[float, Field(gt=0)] = 1.05
    aggregation: Literal["token", "sequence", "constant", "sequence_sum"] = "token"
    """Mean over all tokens of an optimizer step (DAPO), mean over sequences of each one's mean (GRPO), sum over a constant (Dr. GRPO), or mean
    over sequences of each one's sum (LUSPO, with the loss sequence_clipped)."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """What a nat of entropy is worth in the loss, each token weighted as in the policy loss."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weight tokens by how much likelier the trainer finds them than the engine did, bounded (TIS) or dropped beyond the bound (MIS)."""
    sampler_correction_level: Literal["token", "sequence"] = "token"
    sampler_correction_max: Annotated[float, Field(gt=1)] = 2.0
    entropy_target: Annotated[float, Field(ge=0)] | None = None
    """Nats per token: the coefficient grows by entropy_step while the entropy is at or below it, up to entropy_maximum, and shrinks above, where
    no bonus is paid (https://arxiv.org/abs/2505.22312)."""
    entropy_step: Annotated[float, Field(gt=0)] = 0.005
    entropy_maximum: Annotated[float, Field(gt=0)] = 1.0
    top_entropy_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of an optimizer step's tokens, those of highest entropy, that get a policy gradient (https://arxiv.org/abs/2506.01939); costs a
    forward pass before the step."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    """A term of the loss, or subtracted from the reward: of each token in PPO, of the sequence (its sum) elsewhere."""
    kl_weighted: bool = False
    """Multiply the term of the loss by the ratio, which makes its gradient unbiased off policy (DeepSeek-V3.2, TRL's default)."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Nats per token that an adaptive coefficient steers to (https://arxiv.org/abs/1909.08593)."""
    kl_horizon: Annotated[float, Field(gt=0)] = 10_000.0
    """Completions over which an adaptive coefficient moves by its error."""
    truncated: Literal["grade", "wrong", "mask"] = "wrong"
    """A completion cut by max_new_tokens is graded as it stands, counts as wrong, or is kept out of the loss."""
    step_credit: Literal["sum", "min"] = "sum"
    """Of rewards of steps, where a component gives such: a token is responsible for the sum of those that end at it or later
    (https://arxiv.org/abs/2402.03300), or, up to the worst step of the completion, for that one (PURE, https://arxiv.org/abs/2504.15275)."""
    step_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the soft minimum of `min`, in units of the steps' rewards before their weight; smaller is closer to the worst step alone."""

    @model_validator(mode="after")
    def _coefficients(self) -> Algorithm:
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError(
                f"kl_target is {self.kl_target} but kl_coefficient, where it starts, is 0; set a coefficient or remove the target"
            )
        if self.kl_weighted and (self.kl_in == "reward" or self.kl_coefficient == 0):
            raise ValueError(
                "kl_weighted needs a KL term in the loss; set kl_coefficient and kl_in to loss, or remove it"
            )
        if self.ratio_ceiling is not None and self.loss not in ("clipped", "sequence_clipped"):
            raise ValueError(
                f"ratio_ceiling is {self.ratio_ceiling} and loss is {self.loss!r}, which does not clip; remove it"
            )
        return self


class GroupAlgorithm(Algorithm):
    """How the samples of a prompt are compared (the equations are in rlhf/advantages.py)."""

    advantage: Literal["group_relative", "leave_one_out", "batch_normalised", "group_baseline"] = "group_relative"
    """GRPO, RLOO, REINFORCE++, REINFORCE++ with baseline."""
    scale_by_std: bool = True
    """Divide by the standard deviation (GRPO) or not (Dr. GRPO)."""
    normalise_components: bool = False
    """Compare each reward component within its group before they are added (GDPO); `advantage` is then not used."""

    @model_validator(mode="after")
    def _components(self) -> GroupAlgorithm:
        if self.normalise_components and not self.scale_by_std:
            raise ValueError(
                "normalise_components divides by standard deviations and scale_by_std is false; set one of them the other way"
            )
        if self.normalise_components and self.kl_in == "reward":
            raise ValueError(
                "normalise_components compares components and kl_in reward is none of them; set kl_in to loss"
            )
        return self


class PPOAlgorithm(Algorithm):
    """PPO with a critic (https://arxiv.org/abs/1707.06347), as InstructGPT uses it (https://arxiv.org/abs/2203.02155)."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["loss", "reward"] = "reward"
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    trace: Annotated[float, Field(ge=0, le=1)] = 0.95
    """The lambda of generalised advantage estimation."""
    whiten: bool = True
    """Advantages to mean 0 and standard deviation 1 over the real tokens of a rollout batch."""


class Critic(Section):
    """The value model. A reward model brings its head; a language model gets one that starts at 0."""

    path: str
    revision: str | None = None
    dtype: Dtype = "float32"
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    optimizer: Optimizer
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    """How far a value may move from where it was at sampling before its gradient ends."""
    warmup_batches: Annotated[int, Field(ge=0)] = 0
    """Rollout batches that train only the critic, before the policy moves."""


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


class Guards(Section):
    """Bounds whose breach stops the run with a sentence, before a checkpoint is written."""

    max_kl_sampler: Annotated[float, Field(gt=0)] = 0.05
    """Nats per token between the engine that samples and the trainer, on policy."""
    max_router_disagreement: Share = 0.25
    """Share of (token, layer) of a mixture that may go to other experts in the engine than in the trainer, on policy; in bfloat16 a tenth is
    usual. Measured with rollout.record_experts."""
    max_undecided_share: Share = 0.1
    """Share of completions the grader may fail to judge."""
    max_kl_stale: Annotated[float, Field(gt=0)] = 1.0
    """The same bound for rollouts of an older policy, with training.max_staleness above 0."""
    freshness_tolerance: Annotated[float, Field(gt=0)] = 0.05
    """Mean absolute difference, in nats, between the engine's and the trainer's log-probabilities of a probe after each sync."""


class Watch(Section):
    """Signs that the policy games its reward, looked for after every rollout batch (see rlhf/watch.py, which says what each is)."""

    action: Literal["off", "warn", "stop"] = "warn"
    """What an alarm does, besides a line on the console, a row in alarms.jsonl and a file with the ten completions that show it best."""
    window: Annotated[int, Field(ge=3)] = 5
    """Rollout batches whose mean is compared with that of as many others."""
    significance: Annotated[float, Field(gt=0)] = 3.0
    """Standard errors that a difference of means must have."""
    max_correctness_loss: Share = 0.1
    """That correctness may lose against its best window while the reward rises."""
    max_surface_share: Share = 0.5
    """Of the variance behind the advantages, by components of the kinds format, length, overlong and repetition."""
    max_repetition: Share = 0.3
    """Share of the 8-grams of tokens that stood in the completion before; an alarm also needs twice that of the first window."""
    max_kl_slope: Annotated[float, Field(gt=0)] = 0.01
    """Nats per token and optimizer step, with a reference."""
    min_spread: Share = 0.25
    """Of the standard deviation within groups in the first window."""
    max_length_growth: Annotated[float, Field(gt=1)] = 2.0
    """Factor over the mean length in the first window."""
    ceiling: Share = 0.9
    """Correctness above which only divergence is an alarm: what is left to compare is form."""


class RolloutServer(Section):
    """vLLM servers that sample: on other hosts or GPUs, or on other cores of this one (see docs/guides/servers.md)."""

    urls: tuple[Annotated[str, Field(pattern=r"^https?://[^/]+$")], ...] = ()
    """Of replicas that scripts/serve.py started elsewhere. Without any, the main process starts `replicas` here."""
    replicas: PositiveInt = 1
    first_port: Annotated[int, Field(ge=1024, le=65_000)] = 8400
    """Replicas started here listen on it and on the ports after it, on the loopback interface."""
    devices: tuple[str, ...] = ()
    """What each replica started here may use, such as "4,5": its CUDA_VISIBLE_DEVICES, or its cores on a CPU."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one copy of the weights."""
    data_parallel: PositiveInt = 1
    """Copies of the weights behind one URL."""
    weights: Literal["folder", "nccl"] = "folder"
    """How new weights get there: as files in a folder that every host sees, or from GPU to GPU."""
    folder: str | None = None
    """For the files; by default in memory for replicas started here, and under output_dir for others."""
    update_in_flight: bool = False
    """Replace the weights in the middle of completions instead of waiting for their end (https://arxiv.org/abs/2509.19128); asynchronous only."""
    request_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """After which a request goes to another replica."""
    patience_seconds: Annotated[float, Field(gt=0)] = 900.0
    """How long the run waits when no replica answers, starting included."""

    @model_validator(mode="after")
    def _devices_of_each(self) -> RolloutServer:
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(
                f"devices names {len(self.devices)} sets and replicas is {self.replicas}; give one for each"
            )
        if self.urls and self.devices:
            raise ValueError("devices is for replicas started here, and urls names others; remove one of them")
        return self


class OnlineRollout(Rollout):
    engine: Literal["auto", "vllm", "transformers", "server"] = "auto"  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    server: RolloutServer | None = None
    """For the engine `server`."""
    prompts_per_batch: PositiveInt
    """Over all ranks. A rollout batch is sampled by one policy version."""
    record_experts: bool = False
    """Note which experts of a mixture the engine sent each token to: policy.router_replay needs it, moe/disagreement is measured with it.
    On a CPU the engine then computes a prompt once for each sample."""
    refill_rounds: Annotated[int, Field(ge=0)] = 0
    """How often groups without signal are replaced by fresh prompts' groups before training: dynamic sampling (DAPO,
    https://arxiv.org/abs/2503.14476, section 3.2) with a budget. What is left without signal after the last round stays."""

    @model_validator(mode="after")
    def _server_has_its_section(self) -> OnlineRollout:
        if (self.engine == "server") != (self.server is not None):
            problem = (
                "there is no rollout.server"
                if self.server is None
                else "rollout.server is set, which nothing would read"
            )
            raise ValueError(
                f"rollout.engine is {self.engine} and {problem}; give both (server: {{}} starts one here) or neither"
            )
        if self.engine == "server" and self.record_experts:
            raise ValueError(
                "rollout.record_experts is set and rollout.engine is server, whose experts are not read; set engine to vllm"
            )
        return self


class OnlineTraining(Section):
    num_batches: PositiveInt
    """Rollout batches."""
    minibatches_per_batch: PositiveInt = 1
    """Optimizer steps per pass over a rollout batch; beyond the first the data is off policy."""
    passes_per_batch: PositiveInt = 1
    tokens_per_micro_batch: PositiveInt
    """Tokens per rank and forward pass, padding included: the memory knob. It never changes the gradient."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Rollout batches that are sampled while older ones are trained on: asynchronous training on rollouts of a policy at most so many batches old.
    0 is the synchronous loop."""
    layout: Literal["shared", "padded"] = "shared"
    """`shared` computes a prompt once for all its completions and pads nothing, where the model's attention allows it."""
    checkpoint_every: PositiveInt = 10
    """Rollout batches between checkpoints."""
    checkpoint_every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints, besides those; also in the middle of a rollout batch, which is then stored with the rest."""
    completions_every: Annotated[int, Field(ge=0)] = 1
    """Rollout batches between those whose completions are kept for reading and audits, with every component of their rewards; 0 keeps none."""
    keep_checkpoints: PositiveInt = 2
    """The newest so many stay."""
    keep_best: str | None = None
    """Key of a metric, such as reward/correctness: the checkpoint whose last finished rollout batch has its highest value stays as well, and its
    weights end up under `best` in output_dir."""


class Online(Section):
    """Reinforcement learning with verifiable and learned rewards, in this project's own loop."""

    output_dir: str
    seed: int = 0
    policy: Policy
    reference: Reference | None = None
    chat: Chat = Chat()
    problems: str
    demonstrations: str
    """Reference solutions: before training they must earn the full reward, and after each weight push both sides score some of them."""
    rollout: OnlineRollout
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    grader: Grader = Grader()
    algorithm: Algorithm
    training: OnlineTraining
    optimizer: Optimizer
    guards: Guards = Guards()
    watch: Watch = Watch()

    @model_validator(mode="after")
    def _relations(self) -> Online:
        if self.algorithm.kl_coefficient > 0 and self.reference is None:
            raise ValueError(
                f"algorithm.kl_coefficient is {self.algorithm.kl_coefficient} but reference is not set; "
                "name the weights under reference.path or set algorithm.kl_coefficient to 0"
            )
        if self.algorithm.kl_coefficient == 0 and self.reference is not None:
            raise ValueError(
                "reference is set but algorithm.kl_coefficient is 0, so nothing would read it; remove reference or raise the coefficient"
            )
        if self.reference is not None:
            kind, lora = self.reference.kind, self.policy.lora is not None
            if (kind == "lora_base" and not lora) or (kind == "moving_average" and lora):
                raise ValueError(
                    f"reference.kind is {kind} and policy.lora is {'set' if lora else 'not set'}; with LoRA take lora_base or frozen, "
                    "without it frozen or moving_average"
                )
        if self.policy.router_replay and not self.rollout.record_experts:
            raise ValueError(
                "policy.router_replay is set but rollout.record_experts is not, so there would be nothing to replay; set it"
            )
        if self.rollout.prompts_per_batch % self.training.minibatches_per_batch:
            raise ValueError(
                f"rollout.prompts_per_batch is {self.rollout.prompts_per_batch}, not a multiple of training.minibatches_per_batch "
                f"{self.training.minibatches_per_batch}; whole groups go into each optimizer step"
            )
        if self.training.tokens_per_micro_batch < self.rollout.max_prompt_tokens + self.rollout.max_new_tokens:
            raise ValueError(
                f"training.tokens_per_micro_batch is {self.training.tokens_per_micro_batch}, less than one sequence of "
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {self.rollout.max_prompt_tokens + self.rollout.max_new_tokens}; raise it"
            )
        if self.training.max_staleness > 0 and self.rollout.engine != "server":
            raise ValueError(
                f"training.max_staleness is {self.training.max_staleness} and rollout.engine is {self.rollout.engine}, which samples in the process that trains; "
                "set rollout.engine to server, or max_staleness to 0"
            )
        if self.training.max_staleness > 0 and self.algorithm.sampler_correction == "none":
            raise ValueError(
                f"training.max_staleness is {self.training.max_staleness} and algorithm.sampler_correction is none: rollouts of an older policy would be "
                "trained on as if they were its own; set it to truncate or mask"
            )
        sharded = [r for r in self.rewards if isinstance(r, ModelReward) and r.placement == "sharded"]
        if self.training.max_staleness > 0 and sharded:
            raise ValueError(
                f"training.max_staleness is {self.training.max_staleness} and rewards.reward_model.placement is sharded: its ranks score together, which "
                "would collide with training; set it to whole"
            )
        if (
            self.rollout.server is not None
            and self.rollout.server.update_in_flight
            and self.training.max_staleness == 0
        ):
            raise ValueError(
                "rollout.server.update_in_flight is true and training.max_staleness is 0, so no completion is ever in flight; raise it to 1"
            )
        if self.rollout.server is not None and self.policy.lora is not None and self.policy.lora.sync == "adapter":
            raise ValueError(
                "policy.lora.sync is adapter and rollout.engine is server, which takes whole weights; set sync to merged"
            )
        for reward in self.rewards:
            if isinstance(reward, RuleReward) and (reward.buffer_tokens or 0) > self.rollout.max_new_tokens:
                raise ValueError(
                    f"rewards.{reward.name}.buffer_tokens is {reward.buffer_tokens}, more than rollout.max_new_tokens {self.rollout.max_new_tokens}; "
                    "every completion would be punished: lower it"
                )
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(
                f"rewards name the same component twice: {', '.join(names)}; merge them, or give each a name and say under kind what it is"
            )
        taken = [name for name in names if f"reward/{name}" in MEANING and name != "correctness"]
        if taken:
            raise ValueError(
                f"rewards names a component {taken[0]!r}, which is a metric of its own; choose another name"
            )
        for reward in self.rewards:
            for gate in reward.gates:
                if gate.component not in names or gate.component == reward.name:
                    problem = "itself" if gate.component == reward.name else "no component"
                    others = [name for name in names if name != reward.name]
                    raise ValueError(
                        f"rewards.{reward.name}.gates names {gate.component!r}, which is {problem}; {nearest(gate.component, others)}"
                    )
        metrics = [*MEANING, *(f"reward/{name}" for name in names)]
        if self.training.keep_best is not None and self.training.keep_best not in metrics:
            raise ValueError(
                f"training.keep_best is {self.training.keep_best!r}, which is no metric; {nearest(self.training.keep_best, metrics)}"
            )
        if not any(reward.name == reward.kind == "correctness" for reward in self.rewards):
            raise ValueError(
                f"rewards has no correctness component (has: {', '.join(names)}); add it, with weight 0 if it is only to be reported"
            )
        return self


class GRPO(Online):
    """The members of the family that compare the samples of a prompt: GRPO, Dr. GRPO, RLOO, DAPO, REINFORCE++, GSPO, CISPO, SAPO, GDPO."""

    stage: Literal["grpo"]
    algorithm: GroupAlgorithm = GroupAlgorithm()  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    script: ClassVar[str] = "scripts/train_grpo.py"

    @model_validator(mode="after")
    def _groups(self) -> GRPO:
        if self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"group_relative compares samples of one prompt and rollout.samples_per_prompt is {self.rollout.samples_per_prompt}; set it to 2 or more"
            )
        return self


class PPO(Online):
    """Proximal policy optimisation with a critic."""

    stage: Literal["ppo"]
    algorithm: PPOAlgorithm = PPOAlgorithm()  # type: ignore[reportIncompatibleVariableOverride]
    critic: Critic
    script: ClassVar[str] = "scripts/train_ppo.py"

    @model_validator(mode="after")
    def _warmup(self) -> PPO:
        if self.critic.warmup_batches >= self.training.num_batches:
            raise ValueError(
                f"critic.warmup_batches is {self.critic.warmup_batches} of training.num_batches {self.training.num_batches}, so the policy would never be trained; lower it"
            )
        if self.rollout.refill_rounds:
            raise ValueError(
                "rollout.refill_rounds replaces groups without signal; with a critic every completion has one: set it to 0"
            )
        return self


# ----------------------------------------------------------------------------------------------------------------- label_steps


class LabellingRollout(Rollout):
    """Of the solutions; their completions differ in number and temperature only."""

    completions_per_prefix: PositiveInt = 8
    completion_temperature: Annotated[float, Field(gt=0)] = 1.0
    problems_per_chunk: PositiveInt = 64
    """Labelled together and stored together: what a kill costs at most. Part of the seed, so another value draws other samples."""

    @model_validator(mode="after")
    def _a_solved_problem_has_two_samples(self) -> LabellingRollout:
        if self.samples_per_prompt < 2:
            raise ValueError(
                "samples_per_prompt is 1; a wrong solution is labelled only where another one shows that the policy can solve the problem: set it to 2 or more"
            )
        return self


class LabelSteps(Section):
    """Labels the steps of a policy's own solutions by what becomes of completions from each prefix (reward_models/step_labels.py)."""

    stage: Literal["label_steps"]
    output_dir: str
    seed: int = 0
    policy: Weights
    chat: Chat = Chat()
    problems: str
    num_problems: PositiveInt | None = None
    """The first so many; all by default."""
    separator: Annotated[str, Field(min_length=1)] = "\n"
    """What ends a step (reward_models/steps.py); that of the process model."""
    estimate: Literal["soft", "hard", "binary_search"] = "soft"
    """Share of right completions after every step; whether there is one; or the same, up to the first wrong step, found with log2(steps) prefixes."""
    correct_share: Share | None = 0.5
    """Of the solutions of a chunk that are labelled; the others are left out. Null labels all."""
    min_steps: PositiveInt = 2
    """Solutions of fewer steps are left out."""
    rollout: LabellingRollout
    grader: Grader = Grader()
    script: ClassVar[str] = "scripts/label_steps.py"


# -------------------------------------------------------------------------------------------------------------------- evaluate


class Server(Section):
    """An OpenAI-compatible server that holds the weights."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    """Up to and including `/v1`."""
    name: str | None = None
    """What the server calls the model; by default the only one it lists."""
    prompts: Literal["tokens", "text", "messages"] = "tokens"
    """What is sent. `tokens` is what training and rollout use. `text` and `messages` let the server tokenize, `messages` render too; where
    models.<label>.path has a tokenizer, a prompt of another length than ours is an error: a second BOS, or another chat template."""
    key_variable: str | None = None
    """Environment variable that holds the API key."""
    logprobs: bool = True
    """Ask for log-probabilities, which weight the votes; some servers refuse to give them."""
    concurrency: PositiveInt = 16
    """Requests under way at once; each is one sample."""
    attempts: PositiveInt = 5
    """Of a request that fails by no fault of ours: no connection, overload, an internal error."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0


class EvaluatedModel(Weights):
    server: Server | None = None
    """Where to sample from; without it the weights are loaded by rollout.engine."""


class EvaluationRollout(Rollout):
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    problems_per_chunk: PositiveInt = 512
    """Sampled together and stored together, per rank: what a kill costs at most. Part of the seed, so another value draws other samples."""


class Benchmark(Section):
    """A published set of problems (see data/benchmarks.py)."""

    name: str
    path: str | None = None
    """File or folder in the form its authors ship; without it the hub's copy is downloaded at `revision`."""
    revision: str | None = None


class Selection(Section):
    """One answer out of n samples of a problem: by majority, by a reward model's best sample, by weighted vote (see rlhf/selection.py)."""

    ns: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Numbers of samples to choose from; each at most rollout.samples_per_prompt."""
    outcome_model: str | None = None
    """Folder of scripts/train_reward_model.py."""
    process_model: str | None = None
    """Folder of scripts/train_process_reward_model.py."""
    aggregate: Literal["min", "product", "mean", "last"] = "min"
    """What of a process model's steps is the score of a completion."""
    batch_size: PositiveInt = 64
    """Completions that the outcome model scores at once."""


class Evaluate(Section):
    """Accuracy of models on the same problems, with intervals, and their paired difference."""

    stage: Literal["evaluate"]
    output_dir: str
    seed: int = 0
    models: Annotated[dict[str, EvaluatedModel], Field(min_length=1)]
    """Label to weights; the first is the baseline the last is compared with."""
    chat: Chat = Chat()
    problems: str | None = None
    """Record file. Either this or `benchmark`."""
    benchmark: Benchmark | None = None
    num_problems: PositiveInt | None = None
    """The first so many; all by default."""
    perturbations: tuple[Literal["reworded", "numbers", "distraction", "typos"], ...] = ()
    """How the same problems are told differently, for the robustness figures (see data/perturbation.py)."""
    rollout: EvaluationRollout
    truncated: Literal["grade", "wrong"] = "grade"
    """A completion cut by max_new_tokens is graded as it stands, or counts as wrong."""
    accept: Literal["boxed", "marked", "bare", "last_number"] = "boxed"
    """How plainly a completion must say its answer; each takes what the ones before it take (see reward_models/grading/extraction.py)."""
    pass_at: tuple[PositiveInt, ...] = (1,)
    """The k of pass@k; each at most rollout.samples_per_prompt."""
    selection: Selection | None = None
    """Compare ways to choose one of a problem's samples."""
    num_shown: Annotated[int, Field(ge=0)] = 3
    """Problems whose answers by every model are kept for reading."""
    data_manifest: str | None = None
    """manifest.json of the data the models were trained on; its contamination report is shown beside the score."""
    script: ClassVar[str] = "scripts/evaluate.py"

    @model_validator(mode="after")
    def _one_source(self) -> Evaluate:
        if (self.problems is None) == (self.benchmark is None):
            both = "neither" if self.problems is None else "both"
            raise ValueError(
                f"{both} of problems and benchmark are set; name a record file under problems or a benchmark"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_file_names(self) -> Evaluate:
        for label in self.models:
            if not label or not all(c.isalnum() or c in "-_.+" for c in label):
                raise ValueError(
                    f"models has the label {label!r}, which names files; use letters, digits and -_.+ only"
                )
        return self

    @model_validator(mode="after")
    def _enough_samples(self) -> Evaluate:
        if max(self.pass_at) > self.rollout.samples_per_prompt:
            raise ValueError(
                f"pass_at asks for pass@{max(self.pass_at)} from rollout.samples_per_prompt = {self.rollout.samples_per_prompt} samples; "
                "raise samples_per_prompt or lower pass_at"
            )
        if self.selection is not None and max(self.selection.ns) > self.rollout.samples_per_prompt:
            raise ValueError(
                f"selection.ns asks for {max(self.selection.ns)} samples to choose from and rollout.samples_per_prompt is "
                f"{self.rollout.samples_per_prompt}; raise samples_per_prompt or lower ns"
            )
        if self.rollout.temperature == 0 and self.rollout.samples_per_prompt > 1:
            raise ValueError(
                f"rollout.temperature is 0, so all {self.rollout.samples_per_prompt} samples of a problem would be the same; "
                "set rollout.samples_per_prompt to 1 or raise the temperature"
            )
        return self


# ----------------------------------------------------------------------------------------------------------------------- judge


class Judging(Section):
    """Puts completions or preference pairs that are there already before a judge; a second run asks only for what is missing."""

    stage: Literal["judge"]
    output_dir: str
    judge: JudgeModel
    """Without a cache of its own, verdicts are kept in output_dir."""
    completions: str | None = None
    """JSON lines, or a folder of them, with the fields question, completion and, where there is one, reference. Either this or `pairs`."""
    pairs: str | None = None
    """File of preference pairs in any form of data/preferences.py; each is shown in both orders."""
    num_rows: PositiveInt | None = None
    """The first so many; all by default."""
    script: ClassVar[str] = "scripts/judge.py"

    @model_validator(mode="after")
    def _one_kind(self) -> Judging:
        if (self.completions is None) == (self.pairs is None):
            both = "neither" if self.pairs is None else "both"
            raise ValueError(f"{both} of completions and pairs are set; name one file")
        return self


# -------------------------------------------------------------------------------------------------------------------- pipeline


class PipelineStage(Section):
    recipe: str
    """A path; a bare file name is looked for beside the pipeline's own recipe."""
    overrides: tuple[str, ...] = ()


class Pipeline(Section):
    """Stages run one after the other, each its own `accelerate launch`."""

    stage: Literal["pipeline"]
    output_dir: str
    accelerate_config: str
    """An accelerate configuration file; it decides ranks, DeepSpeed and precision for every training stage."""
    stages: Annotated[tuple[PipelineStage, ...], Field(min_length=1)]
    script: ClassVar[str] = "scripts/run_pipeline.py"


Config = (
    PrepareData
    | CurateData
    | BuildModel
    | SFT
    | RewardModel
    | LabelSteps
    | ProcessRewardModel
    | EvaluateProcess
    | Judging
    | GRPO
    | PPO
    | Evaluate
    | Pipeline
)
STAGES: dict[str, type[Config]] = {get_args(c.model_fields["stage"].annotation)[0]: c for c in get_args(Config)}


# ---------------------------------------------------------------------------------------------------------------------- loading


def nearest(name: str, known: list[str]) -> str:
    """A sentence that names the closest known name, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as a dict, with what it `extends` underneath it."""
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(str(path), siblings) if siblings else "recipes live under recipes/"
        raise ValueError(f"recipe {path} does not exist; {hint}")
    if path.resolve() in seen:
        raise ValueError(f"recipe {path} extends itself through {' -> '.join(p.name for p in seen)}; break the circle")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values, got {type(raw).__name__}")
    for stage in raw.get("stages", ()) if raw.get("stage") == "pipeline" else ():
        # A bare name is a neighbour, so that a copied folder runs its own recipes and not those it was copied from.
        if isinstance(stage, dict) and isinstance(stage.get("recipe"), str) and "/" not in stage["recipe"]:
            stage["recipe"] = str(path.parent / stage["recipe"])
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    return merge(read_recipe(path.parent / str(parent), (*seen, path.resolve())), raw)


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`overlay` on top of `base`: mappings merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=3` as {"a": {"b": 3}}; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {text!r} is not of the form key.sub=value")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"the value of override {text!r} is not valid YAML") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def parse_config(raw: dict[str, Any], origin: str) -> Config:
    """A validated config from a raw recipe.

    Raises:
        ValueError: one line for each thing wrong, with its key, its value and the repair.
    """
    stage = raw.get("stage")
    if stage not in STAGES:
        problem = "has no stage key" if stage is None else f"names the stage {stage!r}"
        raise ValueError(f"{origin} {problem}; {nearest(str(stage), list(STAGES))}")
    try:
        return STAGES[stage].model_validate(raw)
    except ValidationError as error:
        lines = [explain(e, STAGES[stage]) for e in error.errors()]
        raise ValueError(f"{origin}: " + "; ".join(dict.fromkeys(lines))) from None


def explain(error: Any, root: type[Section]) -> str:
    """One pydantic error as a sentence."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}; {nearest(location[-1], known_keys(root, location[:-1]))}"
        case "missing":
            return f"key {key!r} is missing; add it"
        case "value_error":
            return (f"{key}: " if key else "") + error["msg"].removeprefix("Value error, ")
        case _:
            return f"key {key!r} has the value {error['input']!r:.60}; {error['msg'][0].lower()}{error['msg'][1:]}"


def known_keys(root: type[BaseModel], location: list[str]) -> list[str]:
    """Field names valid at a location, found by walking the schema."""
    models = [root]
    for part in location:
        inner = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [
            m for annotation in inner for m in sections_in(annotation)
        ] or models  # an index or a union tag stays where it is
        tagged = [m for m in models if part in {m.__name__, *_tags(m)}]
        models = tagged or models
    return [*dict.fromkeys(name for model in models for name in model.model_fields)]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field else ()


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """All sections mentioned by a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_in(inner)]


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config of a recipe file with `key.sub=value` overrides applied.

    Raises:
        ValueError: for anything a user can get wrong in it.
    """
    raw = read_recipe(Path(path))
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return parse_config(raw, str(path))


def to_yaml(config: Section) -> str:
    """A config as YAML that loads to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def trained_model(config: Config) -> Model | None:
    """The block of the model that a training stage trains; a critic besides it is not quantised."""
    return config.policy if isinstance(config, Online) else config.model if isinstance(config, Offline) else None


def batch_arithmetic(config: Config, num_ranks: int) -> list[tuple[str, str]]:
    """What one step of a training stage consists of, as (quantity, value) rows; empty for the other stages.

    Raises:
        ValueError: when the numbers do not divide over `num_ranks`.
    """
    if isinstance(config, Offline):
        kinds = {SFT: "demonstrations", RewardModel: "pairs", ProcessRewardModel: "solutions"}
        training, what = config.training, kinds[type(config)]
        accumulation = training.accumulation(num_ranks)
        return [
            ("ranks", f"{num_ranks}"),
            (
                f"{what} per optimizer step",
                f"{training.sequences_per_step:,} = {training.micro_batch_size} per micro-batch x {num_ranks} ranks x {accumulation} accumulated",
            ),
            ("longest sequence", f"{config.max_tokens:,} tokens"),
            ("optimizer steps", f"{training.num_steps:,}"),
            (f"{what} seen", f"{training.num_steps * training.sequences_per_step:,}"),
        ]
    if not isinstance(config, Online):
        return []
    rollout, training = config.rollout, config.training
    if rollout.prompts_per_batch % (num_ranks * training.minibatches_per_batch):
        raise ValueError(
            f"rollout.prompts_per_batch is {rollout.prompts_per_batch}, not a multiple of ranks x training.minibatches_per_batch = "
            f"{num_ranks} x {training.minibatches_per_batch}; change one of them"
        )
    completions = rollout.prompts_per_batch * rollout.samples_per_prompt
    warmup = config.critic.warmup_batches if isinstance(config, PPO) else 0
    moving = training.num_batches - warmup
    group = rollout.max_prompt_tokens + rollout.samples_per_prompt * rollout.max_new_tokens
    steps_per_batch = training.minibatches_per_batch * training.passes_per_batch
    policy = (
        "on policy"
        if steps_per_batch == 1
        else f"off policy by up to {steps_per_batch - 1} steps, corrected by the clipped ratio"
    )
    if training.max_staleness > 0:
        older = training.max_staleness * steps_per_batch
        before = (
            "the batch before is" if training.max_staleness == 1 else f"the {training.max_staleness} batches before are"
        )
        policy += f"; sampled while {before} trained on, {older} steps older, corrected by algorithm.sampler_correction"
    return [
        ("ranks", f"{num_ranks}"),
        (
            "completions per rollout batch",
            f"{completions:,} = {rollout.prompts_per_batch} prompts x {rollout.samples_per_prompt} samples",
        ),
        (
            "tokens sampled per rollout batch",
            f"at most {completions * rollout.max_new_tokens * (1 + rollout.refill_rounds):,}"
            + (f", refills of up to {rollout.refill_rounds} rounds included" if rollout.refill_rounds else ""),
        ),
        (
            "completions per optimizer step",
            f"{completions // training.minibatches_per_batch:,} ({completions // training.minibatches_per_batch // num_ranks:,} per rank)",
        ),
        ("micro-batch", f"at most {training.tokens_per_micro_batch:,} tokens per rank"),
        (
            "longest possible group",
            f"{group:,} tokens, "
            + (
                "fits into a micro-batch"
                if group <= training.tokens_per_micro_batch
                else "more than a micro-batch: its prompt is computed once for each piece"
            ),
        ),
        (
            "rollout batches",
            f"{training.num_batches:,}" + (f", the first {warmup} train the critic alone" if warmup else ""),
        ),
        (
            "optimizer steps",
            f"{moving * steps_per_batch:,} = {moving} batches x {training.minibatches_per_batch} mini-batches x {training.passes_per_batch} passes",
        ),
        ("data is", policy),
    ]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m rlhf.config RECIPE [key.sub=value ...]\nPrints the resolved recipe.")
        return 0 if arguments else 2
    try:
        config = load_config(arguments[0], arguments[1:])
        rows = batch_arithmetic(config, 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(to_yaml(config), end="")
    if rows:
        print("# on one rank:")
        for quantity, value in rows:
            print(f"#   {quantity}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
