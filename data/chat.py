"""The one place where records become text, and text becomes token ids, for training, rollout and evaluation alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.records import Demonstration, PreferencePair, Problem
from rlhf.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template given to tokenizers built here. It does not open `<think>`: that choice is the policy's."""


def with_budget(question: str, think: str) -> str:
    """What the user says: the question, and below it the thinking budget where there is one.

    How many coins does she have?

    think: short
    """
    return f"{question}\n\nthink: {think}" if think else question


def render_response(scratchpad: str, answer: str) -> str:
    """What an ideal assistant writes: thoughts between the tags (none when it answers at once), then the boxed answer."""
    thoughts = f"{scratchpad}\n" if scratchpad else ""
    return f"{THINK_OPEN}\n{thoughts}{THINK_CLOSE}\n\\boxed{{{answer}}}"


def response_of(demonstration: Demonstration) -> str:
    """What its assistant says: verbatim where the source has it, else rendered from scratchpad and answer."""
    return demonstration.response or render_response(demonstration.scratchpad, demonstration.answer)


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """Renders conversations with the tokenizer's own chat template.

    Token ids, not text, leave this class: no caller adds a special token or tokenizes a rendered string again.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    think: str | None = None
    """Thinking budget of the questions that come with none."""

    @property
    def stop_token_id(self) -> int:
        """The token that ends an assistant turn."""
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ValueError(
                f"tokenizer {self.tokenizer.name_or_path} has no single eos token; set eos_token in its tokenizer_config.json"
            )
        return eos

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return pad

    def asked(self, question: str, think: str = "") -> str:
        """The question as the user puts it, with its own thinking budget or the recipe's."""
        return with_budget(question, think or self.think or "")

    def messages(
        self, question: str, *, history: Sequence[str] = (), system: str = "", think: str = ""
    ) -> list[dict[str, str]]:
        """The conversation up to a question; `history` alternates user and assistant, `system` and `think` replace the recipe's."""
        first = system or self.system_prompt
        turns = [("user", "assistant")[i % 2] for i in range(len(history) + 1)]
        texts = [*history, self.asked(question, think)]
        said = [{"role": role, "content": text} for role, text in zip(turns, texts, strict=True)]
        return [{"role": "system", "content": first}, *said] if first else said

    def prompt_text(self, question: str, *, history: Sequence[str] = (), system: str = "", think: str = "") -> str:
        messages = self.messages(question, history=history, system=system, think=think)
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert isinstance(text, str)
        return text

    def prompt_ids(self, question: str, *, history: Sequence[str] = (), system: str = "", think: str = "") -> list[int]:
        # The template has written every special token already; a second BOS would be a different prompt.
        text = self.prompt_text(question, history=history, system=system, think=think)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def response_ids(self, response: str, *, truncated: bool = False) -> list[int]:
        """Token ids of an assistant turn, its stop token included; one that was cut off has none."""
        ids = self.tokenizer.encode(response, add_special_tokens=False)
        return ids if truncated and ids else [*ids, self.stop_token_id]

    def demonstration_ids(self, demonstration: Demonstration) -> tuple[list[int], list[int]]:
        """(prompt, response): the loss is on the response, its stop token included, and on nothing else."""
        d = demonstration
        prompt = self.prompt_ids(d.question, history=d.history, system=d.system, think=d.think)
        return prompt, self.response_ids(self.completion(response_of(d)))

    def demonstrated(self, demonstration: Demonstration) -> Rollout:
        """A demonstration as if a policy had written its response."""
        prompt_ids, response_ids = self.demonstration_ids(demonstration)
        d = demonstration
        return Rollout(
            prompt=Prompt(id=d.id, token_ids=tuple(prompt_ids), question=d.question, reference=d.answer),
            token_ids=tuple(response_ids),
            logprobs=(0.0,) * len(response_ids),
            finish_reason="stop",
            text=self.completion(response_of(d)),
            policy_version=0,
        )

    def pair_ids(self, pair: PreferencePair) -> tuple[list[int], list[int], list[int]]:
        """(prompt, chosen, rejected), each response with its stop token unless a limit cut it."""
        prompt = self.prompt_ids(pair.question, history=pair.history, system=pair.system, think=pair.think)
        chosen, rejected = (
            self.response_ids(self.completion(response), truncated=finish == "length")
            for response, finish in ((pair.chosen, pair.chosen_finish), (pair.rejected, pair.rejected_finish))
        )
        return prompt, chosen, rejected

    def prompt(
        self, id: str, question: str, reference: str, columns: Mapping[str, str | int | float] | None = None
    ) -> Prompt:
        """A question as the policy sees it, with the reference answer and what else the data says of it.

        Its thinking budget is the column `think`, or the recipe's, which then becomes that column.
        """
        think = str((columns or {}).get("think", "")) or self.think or ""
        token_ids = tuple(self.prompt_ids(question, think=think))
        columns = {**(columns or {}), "think": think} if think else columns or {}
        return Prompt(id=id, token_ids=token_ids, question=question, reference=reference, columns=columns)

    def problem_prompt(self, problem: Problem) -> Prompt:
        """A problem as the policy sees it, thinking budget included."""
        return self.prompt(problem.id, problem.question, problem.answer, problem.columns)

    def rollout(self, prompt: Prompt, response: str, *, truncated: bool) -> Rollout:
        """A response of which only the text is known, as this tokenizer has it; one that was cut off has no stop token."""
        text = self.completion(response)
        token_ids = tuple(self.response_ids(text, truncated=truncated))
        return Rollout(
            prompt=prompt,
            token_ids=token_ids,
            logprobs=(0.0,) * len(token_ids),
            finish_reason="length" if truncated else "stop",
            text=text,
            policy_version=0,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion without its stop token; every other token stays visible."""
        ids = list(token_ids)
        if ids and ids[-1] == self.stop_token_id:
            ids.pop()
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @property
    def prefill(self) -> str:
        """What the template writes of the assistant's turn by itself: `<think>` and what follows, or nothing."""
        text = self.prompt_text("?")
        return text[text.rindex(THINK_OPEN) :] if text.rstrip().endswith(THINK_OPEN) else ""

    def completion(self, response: str) -> str:
        """The part of a response that is left for the policy to write."""
        return response.removeprefix(self.prefill)

    def require_round_trip(self, question: str, response: str) -> None:
        """Raise when this tokenizer and template cannot represent our text faithfully.

        Raises:
            ValueError: naming what is lost or doubled.
        """
        ids = self.response_ids(response)
        if self.decode(ids) != response:
            raise ValueError(
                f"the tokenizer does not give back what it was given: {response!r:.120} became {self.decode(ids)!r:.120}; use another tokenizer"
            )
        prompt = self.prompt_ids(question)
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos, bos]:
            raise ValueError(
                f"prompts start with {self.tokenizer.bos_token!r} twice; the chat template and the tokenizer both add it: remove it from one of them"
            )
        if question not in self.prompt_text(question):
            raise ValueError(
                f"the chat template does not show the question {question!r:.80}; check chat_template.jinja beside the tokenizer"
            )
