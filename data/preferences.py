"""Preference pairs: HH-RLHF, UltraFeedback-binarised, and any file with a chosen and a rejected response."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from data.conversations import Conversation, conversation, turns_of
from data.records import PreferencePair
from data.sources import Source, text

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def pair(
    key: str, chosen: Conversation, rejected: Conversation, *, margin: float | None = None
) -> list[PreferencePair]:
    """Raises a ValueError when the two answer different questions, or say the same."""
    if (chosen.system, chosen.history, chosen.question) != (rejected.system, rejected.history, rejected.question):
        raise ValueError("chosen and rejected differ before their last response")
    if chosen.response == rejected.response:
        raise ValueError("chosen and rejected are the same text")
    return [
        PreferencePair(
            id=key,
            question=chosen.question,
            chosen=chosen.response,
            rejected=rejected.response,
            history=chosen.history,
            system=chosen.system,
            margin=margin,
        )
    ]


def from_hh(row: Mapping[str, Any], key: str) -> list[PreferencePair]:
    """Both fields are whole conversations as one text, `\\n\\nHuman: … \\n\\nAssistant: …`."""
    return pair(key, _dialogue(text(row, "chosen"), "chosen"), _dialogue(text(row, "rejected"), "rejected"))


def _dialogue(transcript: str, name: str) -> Conversation:
    before, *said = _SPEAKER.split("\n\n" + transcript.lstrip())
    if before.strip() or not said:
        raise ValueError(f"field {name!r} does not start with 'Human:' or 'Assistant:': {transcript!r:.80}")
    turns = [
        ("user" if who == "Human" else "assistant", words.strip())
        for who, words in zip(said[::2], said[1::2], strict=True)
    ]
    if not all(words for _, words in turns):
        raise ValueError(f"field {name!r} has an empty turn")
    return conversation(turns)


def from_pair(row: Mapping[str, Any], key: str) -> list[PreferencePair]:
    """The forms in use, told apart by their fields:

    `{prompt, chosen, rejected}` as texts; with `margin`, or with `score_chosen` and `score_rejected`, whose difference is the margin; with the two as message lists that begin with the same turns (UltraFeedback-binarised);
    as single messages after `conversations` (LLaMA-Factory); `{input, output_1, output_2, label}` (LLMBar).

    Raises:
        ValueError: for ties, for pairs of different questions, and for rows of none of these forms.
    """
    if "output_1" in row:
        return _from_numbered(row, key)
    scores = row.get("score_chosen"), row.get("score_rejected")
    if all(isinstance(score, int | float) for score in scores) and scores[0] <= scores[1]:  # type: ignore[operator]
        raise ValueError(
            f"the chosen response scores {scores[0]} and the rejected one {scores[1]}: no preference to learn"
        )
    chosen, rejected = (_side(row, name) for name in ("chosen", "rejected"))
    return pair(key, chosen, rejected, margin=_margin(row, *scores))


def _margin(row: Mapping[str, Any], chosen: Any, rejected: Any) -> float | None:
    if row.get("margin") is not None:
        if type(row["margin"]) not in (int, float):
            raise ValueError(f"field 'margin' must be a number, got {row['margin']!r:.40}")
        return float(row["margin"])
    told = all(type(score) in (int, float) and math.isfinite(score) for score in (chosen, rejected))
    return float(chosen - rejected) if told else None


def _side(row: Mapping[str, Any], name: str) -> Conversation:
    value = row.get(name)
    if isinstance(value, list):
        return conversation(turns_of(value))
    before = row.get("messages", row.get("conversations", row.get("prompt")))
    answer = text(value, "content", "value") if isinstance(value, Mapping) else text(row, name)
    if isinstance(before, list):
        return conversation([*turns_of(before), ("assistant", answer)])
    system, question = row.get("system"), text(row, "prompt", "question", "instruction", "input")
    return Conversation(
        system=system if isinstance(system, str) else "", history=[], question=question, response=answer
    )


def _from_numbered(row: Mapping[str, Any], key: str) -> list[PreferencePair]:
    label = row.get("label")
    if type(label) is not int or label not in (1, 2):
        raise ValueError(f"field 'label' must be 1 or 2, got {label!r:.40}")
    outputs = [text(row, "output_1"), text(row, "output_2")]
    question = text(row, "input")
    sides = [Conversation(system="", history=[], question=question, response=output) for output in outputs]
    return pair(key, sides[label - 1], sides[2 - label])


HH_RLHF = Source(
    name="hh_rlhf",
    kind=PreferencePair,
    convert=from_hh,
    licence="MIT",
    files={
        split: (f"*{split}.jsonl.gz", f"*/{split}.jsonl.gz", f"{split}.jsonl", f"**/{split}.jsonl.gz")
        for split in ("train", "test")
    },
    repository="Anthropic/hh-rlhf",
    revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
)
ULTRAFEEDBACK = Source(
    name="ultrafeedback",
    kind=PreferencePair,
    convert=from_pair,
    licence="MIT",
    files={
        "train": ("train_prefs*.parquet", "data/train_prefs-*.parquet"),
        "test": ("test_prefs*.parquet", "data/test_prefs-*.parquet"),
    },
    repository="HuggingFaceH4/ultrafeedback_binarized",
    revision="3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
)
PAIRS = Source(
    name="pairs",
    kind=PreferencePair,
    convert=from_pair,
    licence="as the file's owner states it",
    files={"train": ("*.jsonl", "*.parquet", "*.json")},
    note=" with the fields prompt, chosen and rejected",
)
