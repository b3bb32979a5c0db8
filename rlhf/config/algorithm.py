"""How the policy is updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.models import Lora
from rlhf.config.sections import Dtype, Optimizer, PositiveInt, Schedule, Section, scheduled


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
    entropy_schedule: Schedule | None = None
    """Of the coefficient."""
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

    def entropy_coefficient_at(self, batch: int) -> float:
        """Of rollout batch number `batch`, from 0."""
        return scheduled(self.entropy_coefficient, self.entropy_schedule, batch + 1)

    @model_validator(mode="after")
    def _coefficients(self) -> Algorithm:
        if self.entropy_schedule is not None and self.entropy_schedule.to < 0:
            raise ValueError(f"entropy_schedule.to is {self.entropy_schedule.to}; set it to 0 or more")
        if self.entropy_schedule is not None and self.entropy_target is not None:
            raise ValueError("entropy_schedule and entropy_target both move entropy_coefficient; remove one of them")
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

    advantage: Literal["group_relative", "leave_one_out", "batch_normalised", "group_baseline", "pass_at_k"] = (
        "group_relative"
    )
    """GRPO, RLOO, REINFORCE++, REINFORCE++ with baseline, and the best of k samples of a prompt in place of each one."""
    pass_at: Annotated[int, Field(ge=2)] | None = None
    """The k of `pass_at_k`: at most rollout.samples_per_prompt."""
    scale_by_std: bool = True
    """Divide by the standard deviation (GRPO) or not (Dr. GRPO)."""
    normalise_components: bool = False
    """Compare each reward component within its group before they are added (GDPO); `advantage` is then not used."""
    step_credit: Literal["sum", "min", "own"] = "sum"  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    """As above, or a token is responsible for its own step alone: the least noise, where a wrong step is not what an earlier one led to."""

    @model_validator(mode="after")
    def _components(self) -> GroupAlgorithm:
        if (self.advantage == "pass_at_k") != (self.pass_at is not None):
            raise ValueError(
                f"advantage is {self.advantage} and pass_at is {self.pass_at}; pass_at_k needs a k under pass_at, and nothing else reads it"
            )
        if self.advantage == "pass_at_k" and self.normalise_components:
            raise ValueError("advantage is pass_at_k and normalise_components would not use it; remove one of them")
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
