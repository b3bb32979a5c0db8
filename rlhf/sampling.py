"""Samples of many problems, stored as they come, so that a killed evaluation goes on where it stopped.

A chunk of problems is sampled with a seed of its own and appended as one line a problem. Each line carries a key: a hash of everything
that the samples depend on. A line with another key, or half a line, counts for nothing; the rest is never sampled again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.rollout.engine import Decode, RolloutEngine, Sampling
from rlhf.rollout.forcing import Forcing, generate_forced
from rlhf.types import FinishReason, Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A problem as it is put to a model."""

    id: str
    text: str
    """What is asked, before any chat template."""
    token_ids: tuple[int, ...] | None
    """The rendered conversation up to and including the generation prompt; None where a server renders it and we cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sample, from whichever engine."""

    text: str
    num_tokens: int
    finish_reason: FinishReason
    confidence: float | None
    """Geometric mean of its tokens' probabilities; None where the engine does not tell."""
    thinking_tokens: int | None = None
    """Of its tokens, those of thoughts; None where nobody counted."""
    was_cut: bool = False
    """Whether its thoughts were ended by force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One problem's samples, a line of the file."""

    id: str
    key: str
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    prompt_tokens: int
    seconds: float
    """This problem's part of its chunk's time."""
    weights: tuple[float, ...]
    """Confidence of each sample; empty where the engine does not tell."""
    thinking: tuple[int, ...] = ()
    """Tokens of thoughts of each sample; empty where nobody counted."""
    was_cut: tuple[bool, ...] = ()
    """Whether the thoughts of each sample were ended by force."""


Generate = Callable[[Sequence[Question], int], list[list[Completion]]]
"""(questions, seed) → the samples of each."""


def confidence(logprobs: Sequence[float]) -> float:
    """Geometric mean of token probabilities: exp(mean log p)."""
    return math.exp(math.fsum(logprobs) / len(logprobs))


def sampling_key(settings: Mapping[str, Any], question: Question) -> str:
    """Hash of everything that a problem's samples depend on: weights, engine, sampling settings, seed, and the prompt itself."""
    prompt = question.text if question.token_ids is None else list(question.token_ids)
    return hashlib.sha256(json.dumps([settings, prompt], sort_keys=True).encode()).hexdigest()[:24]


def read_sampled(file: Path) -> tuple[dict[str, Sampled], int]:
    """({key and id: samples}, lines that are not whole) of a file that may have been cut by a kill."""
    found: dict[str, Sampled] = {}
    broken = 0
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in row.items()}
                    sampled = Sampled(**values)
                except (ValueError, TypeError, AttributeError):
                    broken += 1
                else:
                    found[f"{sampled.key} {sampled.id}"] = sampled
    return found, broken


def sample_all(
    questions: Sequence[Question],
    file: Path,
    *,
    settings: Mapping[str, Any],
    seed: int,
    problems_per_chunk: int,
    build: Callable[[], Generate],
    say: Callable[[str], None] = lambda text: None,
) -> list[Sampled]:
    """The samples of every question, read from `file` or appended to it, in order.

    A chunk of which one line is missing is sampled whole: its samples are those of an uninterrupted run.

    Args:
        questions: all that this rank samples.
        file: of this rank and model.
        settings: what the samples depend on besides prompt and seed.
        seed: of the first chunk; the others follow.
        problems_per_chunk: questions sampled and stored together.
        build: makes the engine; called only when something is missing.
        say: told how far it is.
    """
    settings = {**settings, "seed": seed, "problems_per_chunk": problems_per_chunk}
    keys = [sampling_key(settings, question) for question in questions]
    stored, broken = read_sampled(file)
    if broken:
        say(f"{file.name}: {broken} line{'s' if broken > 1 else ''} cut by a kill, sampled again")
    kept = sum(f"{key} {q.id}" in stored for key, q in zip(keys, questions, strict=True))
    if stored and kept < len(stored):
        say(f"{file.name}: {len(stored) - kept} problems were sampled with other settings and are left aside")
    generate: Generate | None = None
    for number, start in enumerate(range(0, len(questions), problems_per_chunk)):
        chunk = range(start, min(start + problems_per_chunk, len(questions)))
        if all(f"{keys[i]} {questions[i].id}" in stored for i in chunk):
            continue
        if generate is None:
            if kept:
                say(f"{kept} of {len(questions)} problems were sampled before; going on")
            generate = build()
        started = time.perf_counter()
        completions = generate([questions[i] for i in chunk], seed + number)
        seconds = (time.perf_counter() - started) / len(chunk)
        fresh = [_sampled(questions[i], keys[i], c, seconds) for i, c in zip(chunk, completions, strict=True)]
        _append(file, fresh)
        stored |= {f"{s.key} {s.id}": s for s in fresh}
        if len(questions) > problems_per_chunk:
            say(f"  {chunk.stop:,} of {len(questions):,} problems, {seconds * len(chunk):.1f} s")
    return [stored[f"{key} {question.id}"] for key, question in zip(keys, questions, strict=True)]


def _sampled(question: Question, key: str, completions: Sequence[Completion], seconds: float) -> Sampled:
    told = [c.confidence for c in completions if c.confidence is not None]
    return Sampled(
        id=question.id,
        key=key,
        texts=tuple(c.text for c in completions),
        lengths=tuple(c.num_tokens for c in completions),
        truncated=tuple(c.finish_reason == "length" for c in completions),
        weights=tuple(told) if len(told) == len(completions) else (),
        thinking=tuple(c.thinking_tokens for c in completions if c.thinking_tokens is not None),
        was_cut=tuple(c.was_cut for c in completions) if completions[0].thinking_tokens is not None else (),
        prompt_tokens=len(question.token_ids or ()),
        seconds=seconds,
    )


def _append(file: Path, rows: Sequence[Sampled]) -> None:
    """At once and down to the disk; after half a line of a killed run a new one is begun."""
    whole = not file.is_file() or not file.stat().st_size or file.read_bytes()[-1:] == b"\n"
    text = "".join(json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in rows)
    with file.open("a", encoding="utf-8") as out:
        out.write(text if whole else "\n" + text)
        out.flush()
        os.fsync(out.fileno())


def from_engine(
    engine: RolloutEngine, sampling: Sampling, *, thoughts: Callable[[Rollout], int] | None = None
) -> Generate:
    """A rollout engine as a source of samples; `thoughts` counts the tokens of a completion's thoughts."""

    def generate(questions: Sequence[Question], seed: int) -> list[list[Completion]]:
        rollouts = engine.generate(_prompts(questions), sampling, seed=seed)
        completions = [
            Completion(
                text=rollout.text,
                num_tokens=len(rollout.token_ids),
                finish_reason=rollout.finish_reason,
                confidence=confidence(rollout.logprobs),
                thinking_tokens=None if thoughts is None else thoughts(rollout),
            )
            for rollout in rollouts
        ]
        return _by_prompt(completions, sampling)

    return generate


def from_forced(engine: RolloutEngine, sampling: Sampling, forcing: Forcing, decode: Decode) -> Generate:
    """A rollout engine whose thoughts are cut at a number of tokens; confidence is that of the tokens that were sampled."""

    def generate(questions: Sequence[Question], seed: int) -> list[list[Completion]]:
        completions = []
        for forced in generate_forced(engine, _prompts(questions), sampling, forcing, decode, seed=seed):
            assert forced.finish_reason is not None
            completions.append(
                Completion(
                    text=decode(forced.token_ids),
                    num_tokens=forced.sampled_tokens,
                    finish_reason=forced.finish_reason,
                    confidence=confidence(forced.logprobs),
                    thinking_tokens=forced.thinking_tokens,
                    was_cut=forced.was_cut,
                )
            )
        return _by_prompt(completions, sampling)

    return generate


def _prompts(questions: Sequence[Question]) -> list[Prompt]:
    prompts = []
    for question in questions:
        assert question.token_ids is not None, "an engine of ours takes token ids"
        prompts.append(Prompt(id=question.id, token_ids=question.token_ids, question=question.text, reference=""))
    return prompts


def _by_prompt(completions: list[Completion], sampling: Sampling) -> list[list[Completion]]:
    per_prompt = sampling.samples_per_prompt
    return [completions[i : i + per_prompt] for i in range(0, len(completions), per_prompt)]
