"""Budget forcing (s1, https://arxiv.org/abs/2501.19393): thoughts are cut at a number of tokens and the answer is asked for at once.

    prompt · opening · [thoughts, at most N tokens] · closing · [answer]

Thoughts that end by themselves before the limit are left alone, or, with waits, are made to go on: their closing tag is taken away and the
word `wait` put in its place. For evaluation only: what is put in was not sampled.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf.rollout.engine import Decode, RolloutEngine, Sampling
from rlhf.types import FinishReason, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Forcing:
    """What is put in, as token ids, and where."""

    thinking_tokens: int
    """Sampled tokens of thoughts at most; 0 asks for the answer at once."""
    answer_tokens: int
    """Sampled tokens after the thoughts at most."""
    close_tag: str
    """The text that ends the thoughts."""
    opening: tuple[int, ...] = ()
    """Begins every completion; empty where the chat template does."""
    closing: tuple[int, ...] = ()
    """Put where thoughts are cut: the tag, and perhaps the beginning of an answer."""
    line_break: tuple[int, ...] = ()
    """Put before `closing` where the thoughts do not end with a line."""
    wait: tuple[int, ...] = ()
    """Put in the place of a tag that comes too early."""
    num_waits: int = 0

    def __post_init__(self) -> None:
        if self.thinking_tokens < 0 or self.answer_tokens < 1:
            raise ValueError(
                f"thinking_tokens is {self.thinking_tokens} and answer_tokens {self.answer_tokens}; set them to 0 or more and 1 or more"
            )
        if self.num_waits and not self.wait:
            raise ValueError(f"num_waits is {self.num_waits} and wait is empty; say what is put in, such as Wait")


@dataclass(slots=True, kw_only=True)
class Forced:
    """A completion, in the making and made."""

    prompt: Prompt
    token_ids: list[int]
    """Everything after the prompt, what was put in included."""
    thinking_tokens: int = 0
    """Tokens before the closing tag that were sampled."""
    sampled_tokens: int = 0
    """All that were sampled, those before a tag that was taken away included."""
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens that were sampled."""
    was_cut: bool = False
    """Whether the thoughts ended by force."""
    waits: int = 0
    finish_reason: FinishReason | None = None
    """`stop` when the policy ended the answer, `length` when its limit did; None while it is open."""


def thoughts_end(token_ids: Sequence[int], close_tag: str, decode: Decode) -> int | None:
    """Tokens before the one with which the closing tag begins; None where there is no tag.

    A token that holds the tag's first character and characters before it belongs to the tag.
    """
    text = decode(token_ids)
    start = text.find(close_tag)
    if start < 0:
        return None
    return _tokens_within(token_ids, start, decode)


def _tokens_within(token_ids: Sequence[int], characters: int, decode: Decode) -> int:
    """How many first tokens say no more than the first so many characters."""
    return bisect_right(_Lengths(token_ids, decode), characters, hi=len(token_ids) + 1) - 1


@dataclass(frozen=True, slots=True)
class _Lengths(Sequence[int]):
    """Characters of the first n tokens, n = 0, 1, …; decoded only where it is looked at."""

    token_ids: Sequence[int]
    decode: Decode

    def __len__(self) -> int:
        return len(self.token_ids) + 1

    def __getitem__(self, n: int) -> int:  # type: ignore[reportIncompatibleMethodOverride]
        return len(self.decode(self.token_ids[:n]))


def generate_forced(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling, forcing: Forcing, decode: Decode, *, seed: int
) -> list[Forced]:
    """`samples_per_prompt` completions of each prompt, those of one prompt next to each other; `max_new_tokens` is not looked at.

    Every round is one call of the engine for all that are still open, with a prefix of their own as part of the prompt.
    """
    one = dataclasses.replace(sampling, samples_per_prompt=1)
    made = [
        Forced(prompt=prompt, token_ids=list(forcing.opening))
        for prompt in prompts
        for _ in range(sampling.samples_per_prompt)
    ]
    thinking, answering = list(made), list[Forced]()
    rounds = 0
    while thinking:
        by_room: dict[int, list[Forced]] = {}
        for f in thinking:
            room = forcing.thinking_tokens - f.thinking_tokens
            if room > 0:
                by_room.setdefault(room, []).append(f)
            else:
                answering.append(_close(f, forcing, decode))
        thinking = []
        for room, of in sorted(by_room.items()):
            sampled = _continue(engine, of, dataclasses.replace(one, max_new_tokens=room), seed + rounds)
            rounds += 1
            for f, finish in zip(of, sampled, strict=True):
                thinking += _after_thinking(f, finish, forcing, decode, answering)
    if answering:
        answer = dataclasses.replace(one, max_new_tokens=forcing.answer_tokens)
        for f, finish in zip(answering, _continue(engine, answering, answer, seed + rounds), strict=True):
            f.finish_reason = finish
    return made


def _continue(engine: RolloutEngine, of: Sequence[Forced], sampling: Sampling, seed: int) -> list[FinishReason]:
    """Sample on from where each is."""
    prompts = [dataclasses.replace(f.prompt, token_ids=(*f.prompt.token_ids, *f.token_ids)) for f in of]
    rollouts = engine.generate(prompts, sampling, seed=seed)
    for f, rollout in zip(of, rollouts, strict=True):
        f.token_ids += rollout.token_ids
        f.logprobs += rollout.logprobs
        f.sampled_tokens += len(rollout.token_ids)
    return [rollout.finish_reason for rollout in rollouts]


def _after_thinking(
    f: Forced, finish: FinishReason, forcing: Forcing, decode: Decode, answering: list[Forced]
) -> list[Forced]:
    """What a stretch of thoughts leads to; the completion itself where it must think on."""
    begin = len(forcing.opening)
    end = thoughts_end(f.token_ids[begin:], forcing.close_tag, decode)
    if end is None:
        f.thinking_tokens = len(f.token_ids) - begin - f.waits * len(forcing.wait)
        if finish == "stop":  # it ended its turn without closing its thoughts
            f.finish_reason = finish
            return []
        return [f]
    f.thinking_tokens = end - f.waits * len(forcing.wait)
    if f.waits < forcing.num_waits and f.thinking_tokens < forcing.thinking_tokens:
        f.token_ids = f.token_ids[: begin + end] + list(forcing.wait)
        f.waits += 1
        return [f]
    if finish == "stop":
        f.finish_reason = finish
    else:
        answering.append(f)
    return []


def _close(f: Forced, forcing: Forcing, decode: Decode) -> Forced:
    """Its thoughts ended by force; of a tag that it had begun to write nothing is left."""
    text, tag = decode(f.token_ids), forcing.close_tag
    begun = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
    kept = (
        max(_tokens_within(f.token_ids, len(text) - begun, decode), len(forcing.opening)) if begun else len(f.token_ids)
    )
    f.thinking_tokens -= len(f.token_ids) - kept
    del f.token_ids[kept:]
    if not decode(f.token_ids).endswith("\n"):
        f.token_ids += forcing.line_break
    f.token_ids += forcing.closing
    f.was_cut = True
    return f
