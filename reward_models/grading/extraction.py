"""Which part of a completion is the answer: the last `\\boxed{}` after the thoughts, and nothing else."""

from __future__ import annotations

MAX_LENGTH = 200_000
"""Characters looked at, from the end; a completion may be hostile."""

BOXED = "\\boxed{"
THINK_CLOSE = "</think>"


def extract_boxed(text: str) -> str | None:
    """Content of the last closed `\\boxed{...}` after the last `</think>`, braces nested as they come; None without one.

    Reads left to right once, so it is linear in the length of the text whatever is in it.
    """
    text = text[-MAX_LENGTH:]
    text = text[text.rfind(THINK_CLOSE) + len(THINK_CLOSE) :] if THINK_CLOSE in text else text
    found, position = None, 0
    while (start := text.find(BOXED, position)) >= 0:
        depth, position = 1, start + len(BOXED)
        while position < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        if not depth:
            found = text[start + len(BOXED) : position - 1]
    return found
