"""The keys that stages of a kind share."""

from __future__ import annotations

from rlhf.config.models import Model, Weights
from rlhf.config.sections import Chat, Grader, OfflineTraining, Optimizer, PositiveInt, Section


class OfflineStage(Section):
    """Trains on a fixed data set."""

    output_dir: str
    seed: int = 0
    model: Model
    chat: Chat = Chat()
    max_tokens: PositiveInt
    """What is longer is left out, and counted; nothing is ever cut. Of a pair it is either response, prompt included."""
    training: OfflineTraining
    optimizer: Optimizer


class SamplingStage(Section):
    """Samples a policy to make data."""

    output_dir: str
    seed: int = 0
    policy: Weights
    chat: Chat = Chat()
    problems: str
    num_problems: PositiveInt | None = None
    """The first so many; all by default."""
    grader: Grader = Grader()
