"""The stage that measures accuracy against thinking tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.evaluation import EvaluationRollout
from rlhf.config.models import Weights
from rlhf.config.sections import Chat, Grader, PositiveInt, Section, Think


class BudgetForcing(Section):
    """Thoughts cut at a number of tokens (rlhf/rollout/forcing.py)."""

    thinking_tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """The limits to try, each a point of the curve."""
    answer_tokens: PositiveInt = 16
    """Left for what comes after the thoughts."""
    think: Think | None = None
    """Thinking budget in the prompt meanwhile; that of chat.think by default."""
    closing: str = "</think>\n\\boxed{"
    """Put where thoughts are cut, on a line of its own: the tag, and perhaps the beginning of an answer."""
    num_waits: Annotated[int, Field(ge=0)] = 0
    """How often thoughts that end before the limit are made to go on."""
    wait: str = "Wait"
    """Put in the place of their closing tag."""


class EvaluateThinking(Section):
    """Accuracy of one model, or several, under thinking budgets in the prompt and, of the last one, under budget forcing."""

    stage: Literal["evaluate_thinking"]
    output_dir: str
    seed: int = 0
    models: Annotated[dict[str, Weights], Field(min_length=1)]
    """Label to weights."""
    chat: Chat = Chat()
    problems: str
    num_problems: PositiveInt | None = None
    """The first so many; all by default. What their records say of a budget is not looked at."""
    budgets: tuple[Think, ...] = ("off", "short", "long")
    """Put to the model in the prompt, one after the other, in the order in which accuracy should rise."""
    forcing: BudgetForcing | None = None
    rollout: EvaluationRollout
    truncated: Literal["grade", "wrong"] = "wrong"
    """A completion cut by a limit is graded as it stands, or counts as wrong. Thoughts cut by force with an answer after them are none."""
    grader: Grader = Grader()
    script: ClassVar[str] = "scripts/evaluate_thinking.py"

    @model_validator(mode="after")
    def _relations(self) -> EvaluateThinking:
        if not self.budgets and self.forcing is None:
            raise ValueError(
                "budgets is empty and forcing is not set, so there is nothing to measure; give one of them"
            )
        if self.forcing is not None and self.forcing.num_waits and not self.forcing.wait:
            raise ValueError("forcing.num_waits is set and forcing.wait is empty; say what is put in")
        return self
