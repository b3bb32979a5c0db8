"""The components of a reward."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rlhf.config.sections import PositiveInt, Schedule, Section, Think


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
    schedule: Schedule | None = None
    """Of the weight."""
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


class CosineReward(RewardComponent):
    """From `at_zero` tokens to `at_limit` tokens, rollout.max_new_tokens, along half a cosine (reward_models/verifiable.py)."""

    kind: Literal["cosine"]  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    at_zero: float
    """Value of an empty completion."""
    at_limit: float
    """Value of one of rollout.max_new_tokens."""
    exceeded: float | None = None
    """Value of one that was cut by it; at_limit by default."""


class TargetLengthReward(RewardComponent):
    """How near a completion's length is to the target of its prompt's thinking budget (reward_models/verifiable.py)."""

    kind: Literal["target_length"]  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    tokens: dict[Think, PositiveInt] = {}
    """Target of each budget that is a word; numbers are their own."""
    form: Literal["exact", "at_most"] = "exact"
    """L1-Exact, minus the distance, or L1-Max, which should be gated by correctness."""
    per_token: Annotated[float, Field(gt=0)] = 0.0003
    slack: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of `at_most`: the value at the target; 0.5 by default."""

    @model_validator(mode="after")
    def _slack_belongs_to_at_most(self) -> TargetLengthReward:
        if self.form == "exact" and self.slack is not None:
            raise ValueError(f"form is exact and slack is {self.slack}, which only at_most reads; remove it")
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
    """p, the probability that the step is right, or 2 p - 1, with which a step that is more likely wrong than right costs something.
    algorithm.step_credit `min` needs the latter: behind the worst step it counts 0, which no probability is below."""
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
    "cosine": "CosineReward",
    "target_length": "TargetLengthReward",
}
"""Kinds of component with keys of their own, and their classes."""


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
    | Annotated[CosineReward, Tag("CosineReward")]
    | Annotated[TargetLengthReward, Tag("TargetLengthReward")]
    | Annotated[RuleReward, Tag("RuleReward")],
    Discriminator(_reward_class),
]
