"""The stages that train on a fixed data set."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.models import LanguageModel
from rlhf.config.preference import DPO, ORPO
from rlhf.config.stages import OfflineStage


class SFT(OfflineStage):
    """Supervised fine-tuning on chain-of-thought scratchpads, with TRL's SFTTrainer."""

    stage: Literal["sft"]
    model: LanguageModel  # type: ignore[reportIncompatibleVariableOverride]  # frozen: safe
    demonstrations: str
    script: ClassVar[str] = "scripts/train_sft.py"


class RewardModel(OfflineStage):
    """An outcome reward model on preference pairs, with TRL's RewardTrainer (Bradley-Terry)."""

    stage: Literal["reward_model"]
    train_pairs: str
    heldout_pairs: str
    head: Literal["classification", "likelihood"] = "classification"
    """A new row on the hidden state, or the language model's own log-probability of the response (see reward_models/outcome.py)."""
    centering: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the penalty on (sum of the two rewards)^2, which keeps the scores near zero; of the head `classification`."""
    margin_scale: Annotated[float, Field(ge=0)] = 0.0
    """What the margin of a pair, where its source has one, is multiplied with before the chosen response must be ahead by it
    (https://arxiv.org/abs/2307.09288, eq. 2). 0 leaves margins out."""
    script: ClassVar[str] = "scripts/train_reward_model.py"


class ProcessRewardModel(OfflineStage):
    """A process reward model on labelled steps: the probability that each step is right (see rlhf/trainers/process.py)."""

    stage: Literal["process_reward_model"]
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


Offline = SFT | RewardModel | ProcessRewardModel | ORPO | DPO
"""Stages that train on a fixed data set."""
