"""Conversations in the three forms that files of them have, and such files as demonstrations.

`{"messages": [{"role", "content"}, …]}`, `{"conversations": [{"from", "value"}, …]}`, `{"instruction", "input", "output"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.records import Demonstration
from data.sources import Source, last_boxed, split_thoughts, text

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns that alternate from the user's first to the assistant's last."""

    system: str
    history: list[str]
    """All turns before the last question."""
    question: str
    response: str


def turns_of(messages: Any) -> list[tuple[str, str]]:
    """(role, text) of each message of a list in either form.

    Raises:
        ValueError: naming what is no message.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected a list of messages, got {messages!r:.80}")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"expected a message, got {message!r:.80}")
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"a message has the role {role!r:.40}; known: {', '.join(ROLES)}")
        turns.append((ROLES[role], text(message, "content", "value")))
    return turns


def conversation(turns: list[tuple[str, str]]) -> Conversation:
    """Raises a ValueError when the turns do not alternate from the user's to the assistant's."""
    system = ""
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1], turns[1:]
    roles = [role for role, _ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"turns must alternate from user to assistant, got {', '.join(roles) or 'none'}"[:160])
    *history, question, response = (said for _, said in turns)
    return Conversation(system=system, history=history, question=question, response=response)


def to_demonstration(row: Mapping[str, Any], key: str) -> list[Demonstration]:
    if "messages" in row or "conversations" in row:
        talk = conversation(turns_of(row["messages"] if "messages" in row else row["conversations"]))
    elif "instruction" in row:
        extra = row.get("input")
        question = text(row, "instruction") + (f"\n{extra.strip()}" if isinstance(extra, str) and extra.strip() else "")
        talk = Conversation(system="", history=[], question=question, response=text(row, "output"))
    else:
        raise ValueError(
            f"expected messages, conversations or instruction (has: {', '.join(map(str, row)) or 'nothing'})"
        )
    thoughts, said = split_thoughts(talk.response)
    return [
        Demonstration(
            id=key,
            question=talk.question,
            scratchpad=thoughts,
            answer=last_boxed(said) or "",
            response=talk.response,
            history=talk.history,
            system=talk.system,
        )
    ]


CHAT = Source(
    name="chat",
    kind=Demonstration,
    convert=to_demonstration,
    licence="as the file's owner states it",
    files={"train": ("*.jsonl", "*.parquet", "*.json")},
    note=" with messages, conversations, or instruction, input and output",
)
