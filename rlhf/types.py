"""Values that cross a stage boundary. Frozen, named, and each guards its own invariants.

Letters used in shapes everywhere: `P` prompts, `G` samples per prompt, `B` sequences, `R` rows of `T` tokens, `N` trained tokens, `V` vocabulary.

Alignment, decided here once: every per-token tensor (log-probabilities, ratios, advantages) has one entry for each of the `N` tokens
trained on, and `scored` says which position's hidden state predicts it: the token before it in its own sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Verdict = Literal["correct", "wrong", "undecided"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question as the policy sees it."""

    id: str
    token_ids: tuple[int, ...]
    """The rendered conversation up to and including the generation prompt."""
    question: str
    reference: str
    """The reference answer a grader compares with."""
    columns: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)
    """What else the data says of the problem, such as its subject and level."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id!r} has no tokens; check the chat template")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion of one prompt."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """[T] the sampled tokens, end-of-sequence token included when there is one."""
    logprobs: tuple[float, ...]
    """[T] log-probabilities reported by the engine that sampled, at the sampling temperature."""
    finish_reason: FinishReason
    """`stop` when the policy ended it, `length` when `max_new_tokens` cut it."""
    text: str
    """The decoded completion, without the end-of-sequence token."""
    policy_version: int
    """Optimizer steps the sampling weights had seen."""
    weight: float = 1.0
    """What its advantages are multiplied with, because of how its problem was chosen (rlhf/curriculum.py)."""
    routed_experts: Tensor | None = field(default=None, compare=False)
    """[prompt + T - 1, L, K] the experts that the engine's routers sent each token to, the last one of the completion aside, which is not
    computed; integers as small as fit. None where the engine was not asked."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(
                f"prompt {self.prompt.id!r} got an empty completion; set rollout.max_new_tokens to 1 or more"
            )
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"{len(self.token_ids)} tokens but {len(self.logprobs)} log-probabilities for {self.prompt.id!r}"
            )
        computed = len(self.prompt.token_ids) + len(self.token_ids) - 1
        if self.routed_experts is not None and len(self.routed_experts) != computed:
            raise ValueError(
                f"experts of {len(self.routed_experts)} tokens for {self.prompt.id!r}, of which {computed} were computed"
            )


@dataclass(frozen=True, slots=True)
class StepReward:
    """What one step of a completion earns; a token is the shortest step."""

    position: int
    """Index in `Rollout.token_ids` of the step's last token."""
    value: float
    component: str = field(default="", compare=False)
    """Which component of the reward it comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the reward functions say of one rollout."""

    verdict: Verdict
    """Of the correctness grader. `undecided` is a fault of the grader or the reference, never of the policy."""
    value: float | None
    """The total reward; None exactly when undecided, so that it cannot be mistaken for a 0."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Each component's raw value, by name; of a component that judges steps, the sum. One that does not apply is missing."""
    scaled: Mapping[str, float] = field(default_factory=dict)
    """What the weights are for: after scale, clip and gates, of the components that apply and judge the whole completion."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of every component of the reward, applied or not, at the rollout batch that was scored."""
    steps: tuple[StepReward, ...] = ()
    """Weighted rewards of single steps or tokens, on top of `value`, which the end of the completion earns."""
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != (self.verdict == "undecided"):
            raise ValueError(
                f"score value {self.value} contradicts verdict {self.verdict!r}; only an undecided rollout has no value"
            )

    @property
    def weighted(self) -> dict[str, float]:
        """What each component that applies adds to the completion's reward, its steps included."""
        added = {name: self.weights[name] * value for name, value in self.scaled.items()}
        for step in self.steps:
            added[step.component] = added.get(step.component, 0.0) + step.value
        return added


RewardFn = Callable[[Sequence[Rollout]], list[Score]]
"""Scores a list of rollouts, in order."""


@runtime_checkable
class ScheduledReward(Protocol):
    """A reward function whose weights depend on the rollout batch."""

    def at(self, batch: int) -> RewardFn:
        """As it is for rollout batch number `batch`, from 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch of `R` rows and the `N` tokens of it that are trained on."""

    input_ids: Tensor
    """[R, T]"""
    position_ids: Tensor
    """[R, T] place of each token in its own sequence."""
    attention_mask: Tensor | None
    """[R, T] True on real tokens; None where `layout` says who sees whom."""
    layout: tuple[Any, ...] | None
    """Groups of a single packed row (rlhf/attention.py); None for padded rows."""
    scored: Tensor
    """[N] place, in the rows laid end to end, whose hidden state predicts each trained token."""
    targets: Tensor
    """[N] the trained tokens."""
    sequences: Tensor
    """[N] which of `rows` each of them belongs to, from 0."""
    sampler_logprobs: Tensor
    """[N] as the rollout engine reported them."""
    rows: tuple[int, ...]
    """[B] index of each sequence in the rollout batch it came from."""
    kept: tuple[int, ...]
    """Those of `rows` that are trained on, in the order of their tokens: what belongs to the `N` tokens is theirs laid end to end."""
    routed_experts: Tensor | None = None
    """[R·T, L, K] the sampler's experts at each position, rows laid end to end; of a prompt computed once, those of its first sample."""

    @property
    def num_tokens(self) -> int:
        """Tokens a forward pass computes, padding included."""
        return self.input_ids.numel()
