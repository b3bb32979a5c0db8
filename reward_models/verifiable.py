"""Rewards that a rule decides. Each component maps a rollout to a number, in [0, 1] or for a punishment in [-1, 0], or None when it
cannot tell."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from reward_models.grading import grade
from rlhf.repetition import repeated_share
from rlhf.types import Rollout, StepReward

Value = float | Sequence[StepReward] | None
"""Of a whole completion, or of its steps; None where it cannot be told."""
Component = Callable[[Rollout, str], Value]
"""(rollout, text) -> value of one completion. `text` is the completion with what the chat template wrote of it
already, such as an open `<think>`."""

_FORMAT = re.compile(r"<think>.*?</think>\s*[^<]*\\boxed\{[^<]*\}\s*", re.DOTALL)


def correctness(rollout: Rollout, text: str) -> float | None:
    """1 when the boxed answer is the reference answer, 0 when it is not, None when the reference cannot be read."""
    return {"correct": 1.0, "wrong": 0.0, "undecided": None}[grade(text, rollout.prompt.reference).verdict]


def format_followed(rollout: Rollout, text: str) -> float | None:
    """1 when the completion ended by itself and is one pair of think tags, then a boxed answer.

    Empty thoughts count: whether to think is for the policy to find out.
    """
    return float(rollout.finish_reason == "stop" and _FORMAT.fullmatch(text) is not None)


def brevity(rollout: Rollout, text: str) -> float | None:
    """1 / (1 + tokens / 1000): a gentle preference for short completions; use a negative weight for the opposite."""
    return 1.0 / (1.0 + len(rollout.token_ids) / 1000)


def overlong(*, max_tokens: int, buffer_tokens: int) -> Component:
    """The soft overlong punishment of DAPO (https://arxiv.org/abs/2503.14476, eq. 13) for completions of at most `max_tokens`.

        0 up to max_tokens - buffer_tokens, then falling by 1 / buffer_tokens with every token, to -1 at max_tokens

    Raises:
        ValueError: when the buffer is longer than a completion may be.
    """
    if buffer_tokens > max_tokens:
        raise ValueError(
            f"reward overlong has buffer_tokens {buffer_tokens}, more than the {max_tokens} of rollout.max_new_tokens, so every completion "
            "would be punished; lower buffer_tokens"
        )

    def component(rollout: Rollout, text: str) -> float | None:
        return min(max((max_tokens - buffer_tokens - len(rollout.token_ids)) / buffer_tokens, -1.0), 0.0)

    return component


def cosine(*, max_tokens: int, at_zero: float, at_limit: float, exceeded: float | None = None) -> Component:
    """A value that goes from `at_zero` for no tokens to `at_limit` for `max_tokens` along half a cosine (https://arxiv.org/abs/2502.03373, eq. 1).

        at_limit + (at_zero - at_limit) (1 + cos(pi n / max_tokens)) / 2

    The paper has one for correct completions, which shall be short (at_zero > at_limit > 0), and one for wrong ones, which may be long
    (at_zero < at_limit <= 0), each with its own pair of numbers: two components with `applies.verdict`.

    Args:
        max_tokens: the longest completion, rollout.max_new_tokens.
        at_zero: value of an empty completion.
        at_limit: value at the limit.
        exceeded: value of a completion that was cut by the limit; `at_limit` by default.
    """

    def component(rollout: Rollout, text: str) -> float | None:
        if rollout.finish_reason == "length" and exceeded is not None:
            return exceeded
        share = min(len(rollout.token_ids) / max_tokens, 1.0)
        return at_limit + (at_zero - at_limit) * (1 + math.cos(math.pi * share)) / 2

    return component


def target_length(
    *, tokens: Mapping[str, int], form: Literal["exact", "at_most"], per_token: float, slack: float = 0.5
) -> Component:
    """How near a completion's length n is to the target of its thinking budget (L1, https://arxiv.org/abs/2503.04697, eq. 1 and 2).

        exact       - per_token |target - n|                               to be added to correctness
        at_most     clip(per_token (target - n) + slack, 0, 1)             to be gated by correctness, which makes it the paper's product

    `at_most` is `slack` at the target, 1 when (1 - slack) / per_token tokens shorter, and 0 when slack / per_token tokens longer.

    Args:
        tokens: target of each word that a budget may be; a budget that is a number is its own target.
        form: `exact` as L1-Exact, `at_most` as L1-Max.
        per_token: the paper's alpha, 0.0003 there.
        slack: the paper's delta, of `at_most`.

    The component has no value for a prompt without a budget, or with one that `tokens` does not name: say by `applies.columns` what it is for.
    """

    def component(rollout: Rollout, text: str) -> float | None:
        budget = str(rollout.prompt.columns.get("think", ""))
        target = int(budget) if budget.isdecimal() else tokens.get(budget)
        if target is None:
            return None
        left = target - len(rollout.token_ids)
        return -per_token * abs(left) if form == "exact" else min(max(per_token * left + slack, 0.0), 1.0)

    return component


def repetition(rollout: Rollout, text: str) -> float | None:
    """Minus the share of the completion's n-grams of tokens that stood in it before: a punishment in [-1, 0]."""
    return -repeated_share(rollout.token_ids)


RULES: dict[str, Component] = {
    "correctness": correctness,
    "format": format_followed,
    "length": brevity,
    "repetition": repetition,
}


def find_rule(name: str) -> Component:
    """A rule by its name in RULES, or `my_package.module:function`.

    Raises:
        ValueError: when the module or the function does not exist.
    """
    if name in RULES:
        return RULES[name]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward {name!r} cannot be imported ({error}); check the spelling and that the module is on PYTHONPATH"
        ) from None
