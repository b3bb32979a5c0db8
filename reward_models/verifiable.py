"""Rewards that a rule decides. Each component maps a rollout to a number, in [0, 1] or for a punishment in [-1, 0], or None when it
cannot tell."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

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
