"""Rewards that a rule decides. Each component maps a rollout to a number in [0, 1], or None when it cannot tell."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from reward_models.grading import grade
from rlhf.types import Rollout

Component = Callable[[Rollout, str], float | None]
"""(rollout, text) -> value. `text` is the completion with what the chat template wrote of it already, such as an open `<think>`."""

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


RULES: dict[str, Component] = {"correctness": correctness, "format": format_followed, "length": brevity}


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
